"""What ideas of others would gain: each on whole tensors, by its loss at equal size.

Takes the base file and the curvature that `athena-gguf convert ... --work-dir DIR` left in DIR:

    python tools/bench_ideas.py DIR [--type A3] [--blocks 2 15 28] [--rows 192] [--ideas IDEA ...]

The loss is tr(E H E^T), geometric mean over tensors, as a multiple of the encoder's own ("loss"). Ideas that store
more are measured against what the same bits would bring in the type: between A2, A3 and A4 the loss falls by the same
factor for every bit. "at equal size" is the loss divided by that of the encoder with those bits; below 1 the idea wins.
What an idea stores beside the symbols counts with 8 bits a number, positions of single weights with 16.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from athena_gguf.calibration.store import kept_curvatures
from athena_gguf.encode import EncodeOptions, Metric, encode_rows
from athena_gguf.encode.scales import SCALES
from athena_gguf.format import GROUP, TYPES, AType, decode_rows, unpack_rows
from athena_gguf.gguf_file import GGUFFile

EXPONENT = 0.25  # of what is folded into channels; a half would make all channels alike, and loses more
OUTLIERS = 0.005  # of all weights, kept apart


@dataclass
class Case:
    """One tensor: `weight` [rows, columns], `curvature` damped [columns, columns], its `metric`."""

    weight: torch.Tensor
    curvature: torch.Tensor
    kind: AType
    metric: Metric

    def encoded(self, weight: torch.Tensor, metric: Metric | None = None) -> tuple[torch.Tensor, np.ndarray]:
        """The decoded weights of an encoding, and its bytes."""
        data = encode_rows(weight, metric or self.metric, self.kind, EncodeOptions()).data
        return torch.from_numpy(decode_rows(self.kind, data, weight.shape[1])), data

    def loss(self, decoded: torch.Tensor) -> float:
        error = self.weight - decoded
        return float(((error @ self.curvature) * error).sum())

    def plain_loss(self) -> float:
        """Of the encoder as it is."""
        return self.loss(self.encoded(self.weight)[0])

    def under(self, weight: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
        """Decoded weights, encoded under a curvature that is damped already."""
        return self.encoded(weight, Metric(curvature, 1e-6))[0]


Found = tuple[float, float]  # loss, bits a weight more


def low_rank(case: Case, rank: int) -> Found:
    """Factors of so many rows and columns beside the symbols (LQER, L2QER, Athena): first the weights' own largest
    singular vectors, then, in turns, the encoding of what they leave and the optimum for the encoding's error, the
    truncated singular value decomposition in the metric of the curvature."""
    rows, columns = case.weight.shape
    half = torch.linalg.cholesky(case.curvature.double())
    u, s, v = torch.linalg.svd(case.weight.double(), full_matrices=False)
    product = ((u[:, :rank] * s[:rank]) @ v[:rank]).float()
    losses = []
    for _ in range(3):
        symbols, _ = case.encoded(case.weight - product)
        u, s, v = torch.linalg.svd((case.weight - symbols).double() @ half, full_matrices=False)
        right = torch.linalg.solve_triangular(half, v[:rank], upper=False, left=False)
        product = ((u[:, :rank] * s[:rank]) @ right).float()
        losses.append(case.loss(symbols + product))
    return min(losses), 8 * rank * (rows + columns) / (rows * columns)


def low_rank_third(case: Case) -> Found:
    rows, columns = case.weight.shape
    return low_rank(case, round(0.32 * rows * columns / (8 * (rows + columns))))


def low_rank_best(case: Case) -> Found:
    """The best of some small ranks, none among them."""
    found = [(case.plain_loss(), 0.0), *(low_rank(case, rank) for rank in (1, 2, 4, 8))]
    return min(found, key=lambda f: f[0] / SLOPE[case.kind.name] ** f[1])


def folded(case: Case) -> Found:
    """Columns scaled by a power of what they matter (conditional variance over power), as AWQ and SmoothQuant fold it
    into the norm before the layer."""
    needs = 1 / torch.linalg.inv(case.curvature.double()).diagonal().float()
    scale = (needs.sqrt() / case.weight.square().mean(0).sqrt().clamp_min(1e-8)) ** EXPONENT
    scale /= scale.log().mean().exp()
    decoded = case.under(case.weight * scale, case.curvature / scale[:, None] / scale)
    return case.loss(decoded / scale), 0.0


def rotated(case: Case) -> Found:
    """Inputs turned at random (QuaRot, QuIP), as one turn of the whole residual stream would."""
    generator = torch.Generator().manual_seed(0)
    columns = case.weight.shape[1]
    turn, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    curvature = (turn.T @ case.curvature.double() @ turn).float()
    decoded = case.under((case.weight.double() @ turn).float(), curvature)
    return case.loss((decoded.double() @ turn.T).float()), 0.0


def ordered(case: Case) -> Found:
    """Columns sorted by curvature, the largest first (GPTQ's activation order)."""
    order = case.curvature.diagonal().argsort(descending=True)
    decoded = torch.empty_like(case.weight)
    decoded[:, order] = case.under(case.weight[:, order], case.curvature[order][:, order])
    return case.loss(decoded), 0.0


def outliers(case: Case) -> Found:
    """The largest weights of all, against the root mean square of their group, replaced by zero before encoding and
    kept apart (element replacement)."""
    rows, columns = case.weight.shape
    groups = case.weight.view(rows, -1, GROUP)
    ratio = (groups / groups.square().mean(2, keepdim=True).sqrt().clamp_min(1e-12)).abs().view(rows, columns)
    apart = ratio >= ratio.flatten().kthvalue(int((1 - OUTLIERS) * ratio.numel())).values
    decoded, _ = case.encoded(torch.where(apart, 0.0, case.weight))
    return case.loss(torch.where(apart, case.weight, decoded)), (8 + 16) * float(apart.float().mean())


def scale_numbers(case: Case) -> Found:
    """The scales as 16-bit numbers in place of bytes, symbols fixed: what a finer coding of scales could bring."""
    decoded, data = case.encoded(case.weight)
    rows, columns = case.weight.shape
    scales = torch.from_numpy(SCALES[unpack_rows(case.kind, data, columns)[1]])
    levels = decoded.view(rows, -1, GROUP) / scales.clamp_min(1e-30)[..., None]
    scales = least_squares(case, lambda s: (levels * s[..., None]).view(rows, columns), scales)
    return case.loss((levels * scales[..., None]).view(rows, columns)), 8 / GROUP


def levels_refit(case: Case) -> Found:
    """The 128 levels chosen anew for the tensor, symbols and scales fixed (a table of its own)."""
    decoded, data = case.encoded(case.weight)
    rows, columns = case.weight.shape
    scales = torch.from_numpy(SCALES[unpack_rows(case.kind, data, columns)[1]]).repeat_interleave(GROUP, 1)
    index = (decoded / scales.clamp_min(1e-30)).round().long()
    lowest = int(index.min())
    start = torch.arange(lowest, int(index.max()) + 1).float()
    table = least_squares(case, lambda t: t[index - lowest] * scales, start)
    return case.loss(table[index - lowest] * scales), 8 * len(table) / (rows * columns)


def least_squares(case: Case, linear: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    """The numbers x, near `start`, that make case.loss(linear(x)) least: conjugate gradients."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=30, history_size=20, line_search_fn="strong_wolfe")
    unit = case.loss(linear(start))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        error = case.weight - linear(x)
        loss = ((error @ case.curvature) * error).sum() / unit
        loss.backward()
        return loss

    optimizer.step(closure)
    return x.detach()


IDEAS: dict[str, Callable[[Case], Found]] = {
    "low rank, 0.32 bits a weight": low_rank_third,
    "low rank, best of 0, 1, 2, 4, 8": low_rank_best,
    "channel scales folded into norms": folded,
    "random rotation of the inputs": rotated,
    "columns in order of curvature": ordered,
    f"{OUTLIERS:.1%} of the weights apart": outliers,
    "scales of 16 bits, symbols fixed": scale_numbers,
    "levels of the tensor's own, symbols fixed": levels_refit,
}
# The factor by which a bit more lowers the loss, from neighbouring types on the same tensors (set by main).
SLOPE: dict[str, float] = {}


def cases(work: Path, kind: AType, blocks: list[int], rows: int) -> Iterator[Case]:
    with GGUFFile(work / "base.gguf") as base:
        for found in kept_curvatures(work / "curvature"):
            for name in found.about.tensor_names:
                if any(name.startswith(f"blk.{block}.") for block in blocks):
                    metric = Metric(found.matrix, EncodeOptions.damping)
                    weight = torch.from_numpy(base.tensors[name].to_float32())
                    yield Case(weight[:rows].clone(), metric.plain, kind, metric)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--type", default="A3", choices=list(TYPES))
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 15, 28])
    parser.add_argument("--rows", type=int, default=1 << 30, help="of every tensor, at most")
    parser.add_argument("--ideas", nargs="+", default=list(IDEAS), choices=list(IDEAS), metavar="IDEA")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kind = TYPES[args.type]
    chosen = list(cases(args.work_dir, kind, args.blocks, args.rows))
    own = [case.plain_loss() for case in chosen]
    low, high = (TYPES[n] for n in (("A2", "A3") if args.type == "A2" else ("A3", "A4")))
    ends = [own if end is kind else [replace(c, kind=end).plain_loss() for c in chosen] for end in (low, high)]
    SLOPE[args.type] = mean_ratio(ends[1], ends[0])
    print(f"{args.type}, {len(chosen)} tensors; a bit more makes the loss {SLOPE[args.type]:.3f} times what it was")
    print("| idea | loss | bits a weight more | loss at equal size |\n|---|---|---|---|")
    for idea in args.ideas:
        found = [IDEAS[idea](case) for case in chosen]
        loss = mean_ratio([f[0] for f in found], own)
        bits = float(np.mean([f[1] for f in found]))
        print(f"| {idea} | {loss:.3f} | {bits:.3f} | {loss / SLOPE[args.type] ** bits:.3f} |", flush=True)


def mean_ratio(these: list[float], those: list[float]) -> float:
    return float(np.exp(np.mean(np.log(np.array(these) / np.array(those)))))


if __name__ == "__main__":
    main()
