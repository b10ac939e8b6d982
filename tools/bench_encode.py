"""What each part of the encoder is worth: loss and CPU time of variants on some rows of some tensors.

Takes the base file and the curvature that `athena-gguf convert ... --work-dir DIR` left in DIR:

    python tools/bench_encode.py DIR [--type A3] [--rows 64]

The loss is the geometric mean, over the tensors, of tr(E H E^T) / tr(W H W^T) in percent; "time" is CPU seconds a
million weights in one thread, without compilation.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from athena_gguf.calibration.store import kept_curvatures
from athena_gguf.encode import EncodeOptions, Metric, encode_rows, scales
from athena_gguf.format import TYPES
from athena_gguf.gguf_file import GGUFFile

VARIANTS = (
    ("one pass, scales from the peak", {"sweeps": 0}, (0,)),
    ("one pass, scales searched", {"sweeps": 0}, scales.OFFSETS),
    ("three passes, scales searched", {"passes": 3, "sweeps": 0}, scales.OFFSETS),
    ("one pass and four sweeps, scales from the peak", {"sweeps": 4}, (0,)),
    ("one pass and one sweep, scales searched", {"sweeps": 1}, scales.OFFSETS),
    ("one pass and four sweeps, scales searched (default)", {"sweeps": 4}, scales.OFFSETS),
    ("one pass and eight sweeps, scales searched", {"sweeps": 8}, scales.OFFSETS),
    ("two passes and three sweeps, scales searched", {"passes": 2, "sweeps": 3}, scales.OFFSETS),
    ("default, curvature's diagonal only", {"diagonal": True}, scales.OFFSETS),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--type", default="A3", choices=list(TYPES))
    parser.add_argument("--rows", type=int, default=64, help="of every tensor")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 14, 29])
    args = parser.parse_args()
    torch.set_num_threads(1)
    kind = TYPES[args.type]
    chosen = []
    with GGUFFile(args.work_dir / "base.gguf") as base:
        for c in kept_curvatures(args.work_dir / "curvature"):
            name = c.about.tensor_names[0]
            if any(name.startswith(f"blk.{b}.") for b in args.blocks):
                weight = torch.from_numpy(base.tensors[name].to_float32(slice(0, args.rows)))
                chosen.append((weight, c.matrix))
    weights = sum(w.numel() for w, _ in chosen)
    encode_rows(chosen[0][0][:8], Metric(chosen[0][1], 0.01), kind, EncodeOptions(sweeps=1))  # compiles
    print(f"{args.type}, {len(chosen)} tensors of {args.rows} rows")
    for label, variant, offsets in VARIANTS:
        scales.OFFSETS = offsets
        options = dict(variant)
        diagonal = options.pop("diagonal", False)
        losses, spent = [], 0.0
        for weight, matrix in chosen:
            metric = Metric(torch.diag(matrix.diagonal()) if diagonal else matrix, EncodeOptions.damping)
            start = time.thread_time()
            encoded = encode_rows(weight, metric, kind, EncodeOptions(**options))
            spent += time.thread_time() - start
            if diagonal:  # judged by the whole curvature
                from athena_gguf.format import decode_rows

                e = weight - torch.from_numpy(decode_rows(kind, encoded.data, weight.shape[1]))
                whole = Metric(matrix, EncodeOptions.damping).plain
                losses.append(float(((e @ whole) * e).sum() / ((weight @ whole) * weight).sum()))
            else:
                losses.append(encoded.loss / encoded.power)
        loss = 100 * np.exp(np.mean(np.log(losses)))
        print(f"{label:55s} loss {loss:7.4f} %  time {1e6 * spent / weights:6.2f} s")


if __name__ == "__main__":
    main()
