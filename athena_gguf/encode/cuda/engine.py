"""The steps of encoding some rows on a CUDA device: searches and reductions by our kernels, dense algebra by torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from athena_gguf.encode.cuda.launch import array, configure, simulated
from athena_gguf.encode.cuda.products import Halves, halve
from athena_gguf.encode.cuda.scales import ROWS, SHARE, descend, pick, reduce
from athena_gguf.encode.cuda.search import WARP, SearchShape, rows_of_block, search_kernel, words_of_step
from athena_gguf.encode.cuda.sweep import settle
from athena_gguf.encode.horizon import COMMIT, HORIZON
from athena_gguf.encode.metric import Lanes, Metric
from athena_gguf.encode.scales import (
    BYTE_SWEEPS,
    FIT_SWEEPS,
    OFFSETS,
    expand,
    first_codes,
    middles_table,
    scale_table,
)
from athena_gguf.format import GROUP, LANES, AType
from athena_gguf.gpu import mixed

if TYPE_CHECKING:
    import torch

_PRODUCTS = 1 << 27  # numbers that a step of the refit holds at most
_ITEMS = 1 << 20  # lanes of rows that a search takes at most


class CudaSteps:
    """As `athena_gguf.encode.cpu.CpuSteps`. `weight` [rows, columns], columns lane by lane, on the device."""

    plain_shape = SearchShape(0, COMMIT)  # without errors to feed back

    def __init__(self, weight: torch.Tensor, metric: Metric, kind: AType) -> None:
        self.w, self.metric, self.kind = weight, metric, kind
        self.rows, self.steps = len(weight), metric.steps
        self.search_shape = SearchShape(HORIZON[kind.name], COMMIT)
        self.h = Halves.of(metric)
        # Rows last: neighbouring threads work on neighbouring rows.
        self.target = self.h.product(weight)[:, metric.inverse].T.contiguous()

    def product(self, error: torch.Tensor) -> torch.Tensor:
        """`error` [rows, columns] times the curvature."""
        return self.h.product(error)

    def initial_scales(self) -> torch.Tensor:
        import torch

        middle = first_codes(self.w, self.kind)
        best = torch.full(middle.shape, torch.inf, device=self.w.device)
        codes = torch.zeros_like(middle)
        unit = self.metric.passing.unit
        chunk = max(1, _ITEMS // LANES)
        for a in range(0, self.rows, chunk):
            w, middle_of, best_of, codes_of = (v[a : a + chunk] for v in (self.w, middle, best, codes))
            tried = torch.empty_like(middle_of)
            scale = torch.empty(len(w), self.steps, device=w.device)
            search = _Search(self, self.metric.passing, LANES, w, scale, self.plain_shape)
            keep = configure(pick, -(-tried.numel() // 128), 128)
            arguments = tuple(map(array, (w, search.values, scale, unit, tried, best_of, codes_of)))
            for offset in OFFSETS:
                tried.copy_((middle_of.short() + offset).clamp_(0, 255))
                scale.copy_(expand(tried))
                search(0)
                keep(*arguments)
        return codes

    def feedback_pass(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        lanes, upper, steps = self.metric.passing, self.metric.upper, self.steps
        x = self.w.clone()
        symbols = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        target = torch.empty(self.rows, steps, device=x.device)
        search = _Search(self, lanes, 1, target, scale, self.search_shape)
        for lane in range(LANES):
            a, z = lane * steps, lane * steps + steps
            target.copy_(x[:, a:z])
            search(lane)
            symbols[:, a:z] = search.symbols
            values[:, a:z] = search.values
            if z < x.shape[1]:
                errors = (x[:, a:z] - search.values * scale) @ lanes.inverse[lane]
                x[:, z:].addmm_(errors, upper[a:z, z:], alpha=-1)
        return symbols, values

    def sweep(self, pull: torch.Tensor, scale: torch.Tensor, symbols: torch.Tensor, values: torch.Tensor) -> None:
        import torch

        metric, steps = self.metric, self.steps
        target, shift, moved = torch.empty(3, self.rows, steps, device=pull.device)
        parts = self.h.buffer(self.rows, steps)
        search = _Search(self, metric.sweeping, 1, target, scale, self.search_shape)
        found = (pull, shift, scale, search.cost, search.symbols, search.values, symbols, values, moved)
        settled = tuple(map(array, found))
        run_settle = configure(settle, -(-self.rows // 4), (WARP, 4))
        for lane in range(LANES):
            a, z = lane * steps, lane * steps + steps
            # Completing the square: with the other lanes fixed, the loss is the distance to this target under the
            # lane's own block of h, and a constant.
            torch.mm(pull[:, a:z], metric.lane_inverses[lane], out=shift)
            torch.addcmul(shift, values[:, a:z], scale, out=target)
            search(lane)
            run_settle(*settled, a)
            self.h.add_product(pull, moved, lane, parts)

    def refit(self, values: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        import torch

        columns, rows = self.target.shape
        groups = columns // GROUP
        found = codes.T.contiguous()
        chunk = min(rows, max(ROWS, _PRODUCTS // groups**2 // ROWS * ROWS))
        tables = scale_table(values.device), middles_table(values.device)
        for a in range(0, rows, chunk):
            natural = values[a : a + chunk].T[self.metric.inverse]
            target = self.target[:, a : a + chunk]
            right = (target * natural).view(groups, GROUP, -1).sum(1)
            normal = self._normal(natural)
            part = found[:, a : a + chunk].contiguous()
            inputs = map(array, (normal, right, *tables))
            results = map(array, (torch.empty_like(right), part))
            run = configure(descend, -(-part.shape[1] // ROWS), (ROWS, SHARE), 4 * ROWS * groups)
            run(*inputs, FIT_SWEEPS, BYTE_SWEEPS, *results)
            found[:, a : a + chunk] = part
        return found.T.contiguous()

    def _normal(self, values: torch.Tensor) -> torch.Tensor:
        """The normal equations [groups, groups, rows] of the scales of `values` [columns, rows] int8."""
        import torch

        columns, rows = values.shape
        groups = columns // GROUP
        normal = torch.empty(groups, groups, rows, device=values.device)
        some = max(1, _PRODUCTS // (columns * rows))
        blocks = self.metric.plain.view(columns, groups, GROUP).transpose(0, 1)
        grouped = values.view(groups, GROUP, rows)
        exact = mixed(values.device)
        # Levels are whole numbers below 256, which bfloat16 has.
        grouped = grouped.bfloat16().repeat(1, 2, 1) if exact else grouped.float()
        width = 128
        for g in range(0, groups, some):
            block, level = blocks[g : g + some, g * GROUP :], grouped[g : g + some]
            if exact:
                products = torch.bmm(torch.cat(halve(block), 2), level, out_dtype=torch.float32)
            else:
                products = torch.bmm(block, level)
            grid = (-(-rows // width), groups - g, len(products))
            configure(reduce, grid, width)(array(products), array(values), g, array(normal))
        return normal


class _Search:
    """Searches of `count` lanes at once, with their buffers. In: `x` [rows, count * steps] targets, which lose old
    errors where lanes are longer than the horizon, and `scale` [rows, steps], both as they are at the call. Results:
    `symbols` uint8 and `values` int8, as x; `cost` [rows, count] float32."""

    def __init__(
        self, steps: CudaSteps, lanes: Lanes, count: int, x: torch.Tensor, scale: torch.Tensor, shape: SearchShape
    ) -> None:
        import torch

        if simulated():
            shape = replace(shape, warps=1, exchange="shared")
        rows, device = len(x), x.device
        blocks = -(-rows * count // rows_of_block(steps.kind, shape))
        self.symbols = torch.empty(x.shape, dtype=torch.uint8, device=device)
        self.values = torch.empty(x.shape, dtype=torch.int8, device=device)
        words = (blocks * shape.warps, words_of_step(steps.kind, shape), steps.steps)
        back = torch.empty(words, dtype=torch.int32, device=device)
        # What the arrays look at must live as long as they do.
        band = lanes.band(max(1, shape.horizon))
        self.held = (x, scale, lanes, band, back)
        self.cost = torch.empty(rows, count, device=device)
        self.count = count
        self.inputs = tuple(map(array, (x, scale, lanes.unit, band, lanes.factor)))
        self.results = tuple(map(array, (back, self.symbols, self.values, self.cost)))
        self.kernel = configure(search_kernel(steps.kind, shape), blocks, WARP * shape.warps)

    def __call__(self, lane: int) -> None:
        """From `lane` on."""
        self.kernel(*self.inputs, lane, self.count, *self.results)
