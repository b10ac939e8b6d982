"""Three vector operations of the lane search, written as LLVM vector code.

The loops behind them run over few elements of arrays that might overlap, as far as LLVM can tell, so it leaves them
scalar; written as vectors they are four times faster, on any instruction set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from athena_gguf.encode.horizon import COMMIT

WIDTH = 2 * COMMIT  # floats of a vector; LLVM splits it to what the processor has
_FAST = ("fast",)
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)


def _data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return cgutils.create_struct_proxy(array_type)(context, builder, value=array).data


def _vector_at(builder: Any, pointer: Any, offset: Any, element: Any, width: int) -> Any:
    """Pointer to a vector that starts `offset` elements after `pointer`."""
    return builder.bitcast(builder.gep(pointer, [offset]), ir.VectorType(element, width).as_pointer())


def _splat(builder: Any, scalar: Any, width: int) -> Any:
    vector = ir.VectorType(scalar.type, width)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_INT, 0))
    zeros = ir.Constant(ir.VectorType(_INT, width), [0] * width)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def _constants(element: Any, values: npt.NDArray[Any]) -> Any:
    kind = float if element is _FLOAT else int
    return ir.Constant(ir.VectorType(element, len(values)), [kind(v) for v in values])


def make_relax(source: npt.NDArray[np.int32]) -> Any:
    """The step of the Viterbi search for a fixed trellis: `relax(a, paid, b, best, old)`.

    `source` [fan, states]: the old states that lead to each new one. In: `a`, `paid` [old states] and `b` [new states]
    float32. Out: `best` [new states] the minimum of `paid[p] + (a[p] - b[n])^2` over the fan, `old` int32 its place.
    Every run of equal or consecutive old states in `source`, of 8 or 16 new states, becomes one vector operation.
    """
    fan, states = source.shape
    width = next(
        w for w in (WIDTH, 8) if all(_is_run(source[f, n : n + w]) for f in range(fan) for n in range(0, states, w))
    )

    @intrinsic
    def relax(typing: Any, a: Any, paid: Any, b: Any, best: Any, old: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a_, paid_, b_, best_, old_ = (
                _data(context, builder, t, v) for t, v in zip(signature.args, args, strict=True)
            )

            def at(i: int) -> Any:
                return ir.Constant(ir.IntType(64), i)

            def load(pointer: Any, run: npt.NDArray[np.int32]) -> Any:
                if run[0] == run[-1]:
                    return _splat(builder, builder.load(builder.gep(pointer, [at(run[0])])), width)
                return builder.load(_vector_at(builder, pointer, at(run[0]), _FLOAT, width), align=4)

            results = []
            for n in range(0, states, width):
                target = builder.load(_vector_at(builder, b_, at(n), _FLOAT, width), align=4)
                low = _constants(_FLOAT, np.full(width, 3e38, np.float32))
                choice = _constants(_INT, np.zeros(width, np.int32))
                for f in range(fan):
                    run = source[f, n : n + width]
                    d = builder.fsub(load(a_, run), target, flags=_FAST)
                    cost = builder.fadd(load(paid_, run), builder.fmul(d, d, flags=_FAST), flags=_FAST)
                    less = builder.fcmp_ordered("<", cost, low)
                    low = builder.select(less, cost, low)
                    choice = builder.select(less, _constants(_INT, run), choice)
                results.append((n, low, choice))
            for n, low, choice in results:
                builder.store(low, _vector_at(builder, best_, at(n), _FLOAT, width), align=4)
                builder.store(choice, _vector_at(builder, old_, at(n), _INT, width), align=4)
            return context.get_dummy_value()

        return types.void(a, paid, b, best, old), generate

    return relax


def _is_run(places: npt.NDArray[np.int32]) -> bool:
    steps = np.diff(places)
    return bool((steps == 0).all() or (steps == 1).all())


@intrinsic
def subtract(typing: Any, out: Any, at: Any, base: Any, start: Any, row: Any, first: Any, factor: Any) -> Any:
    """`out[at + i] = base[start + i] - factor * row[first + i]` for i below 16; flat float32 arrays."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        out_, base_, row_ = (_data(context, builder, kinds[i], args[i]) for i in (0, 2, 4))
        values = builder.load(_vector_at(builder, base_, args[3], _FLOAT, WIDTH), align=4)
        weights = builder.load(_vector_at(builder, row_, args[5], _FLOAT, WIDTH), align=4)
        taken = builder.fmul(_splat(builder, args[6], WIDTH), weights, flags=_FAST)
        values = builder.fsub(values, taken, flags=_FAST)
        builder.store(values, _vector_at(builder, out_, args[1], _FLOAT, WIDTH), align=4)
        return context.get_dummy_value()

    index = types.intp
    return types.void(out, index, base, index, row, index, types.float32), generate


@intrinsic
def subtract_product(
    typing: Any, out: Any, at: Any, errors: Any, start: Any, factor: Any, first: Any, stride: Any
) -> Any:
    """`out[at + i] -= sum_k errors[start + k] * factor[first + stride * k + i]`, i and k below 8; flat arrays."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        out_, errors_, factor_ = (_data(context, builder, kinds[i], args[i]) for i in (0, 2, 4))
        place = _vector_at(builder, out_, args[1], _FLOAT, COMMIT)
        total = builder.load(place, align=4)
        row = builder.gep(factor_, [args[5]])
        for k in range(COMMIT):
            error = builder.load(builder.gep(errors_, [builder.add(args[3], ir.Constant(args[3].type, k))]))
            weights = builder.load(builder.bitcast(row, ir.VectorType(_FLOAT, COMMIT).as_pointer()), align=4)
            taken = builder.fmul(_splat(builder, error, COMMIT), weights, flags=_FAST)
            total = builder.fsub(total, taken, flags=_FAST)
            row = builder.gep(row, [args[6]])
        builder.store(total, place, align=4)
        return context.get_dummy_value()

    index = types.intp
    return types.void(out, index, errors, index, factor, index, index), generate
