"""Speed and loss of the CUDA encoder on random weights of real shapes, stage by stage.

    python tools/bench_encode_gpu.py [--shapes 4096x4096 14336x4096 4096x14336] [--types A3] [--variants] [--check 16]

Rows x columns. The curvature has a spectrum that falls as a power law, in a random basis, with strong and weak columns.
Every stage is timed by CUDA events, the first run of a kernel (its compilation) left out; the floor of the heaviest
ones is their operations over what the card was measured to do in the same run. `--variants` tries other shapes of the
search kernel instead; `--check` compares the losses of some rows with the CPU encoder's.
"""

import argparse
import time
import traceback
import warnings

import torch

from athena_gguf.encode import EncodeOptions, Metric
from athena_gguf.encode.cuda import engine
from athena_gguf.encode.cuda.search import SearchShape
from athena_gguf.encode.matrix import _Encoder, encode_rows
from athena_gguf.encode.scales import expand
from athena_gguf.format import LANES, TYPES, pack_rows

VARIANTS = (
    SearchShape(32, 8),
    SearchShape(48, 8),
    SearchShape(64, 8),
    SearchShape(32, 8, warps=2),
    SearchShape(32, 8, warps=8),
    SearchShape(48, 8, warps=2),
)


def curvature(columns: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """[columns, columns]: eigenvalues as 1 / rank, columns of unequal strength."""
    torch.manual_seed(seed)
    basis = torch.randn(columns, columns, device=device) / columns**0.5
    basis *= torch.arange(1, columns + 1, device=device).rsqrt()[:, None]
    basis *= torch.randn(columns, device=device).mul_(0.5).exp_()
    return basis.T @ basis


def gibibytes() -> float:
    return torch.cuda.max_memory_allocated() / 2**30


def timed(work, repeats: int = 1) -> float:
    """Milliseconds."""
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def ceilings(device: torch.device) -> dict[str, float]:
    a = torch.randn(8192, 8192, device=device)
    found = {}
    for name, b in (("float32 products", a), ("bfloat16 products", a.bfloat16())):
        b @ b
        found[name] = 2 * 8192**3 / timed(lambda b=b: b @ b, 5) * 1e3
    b = torch.empty(1 << 28, device=device)
    b.copy_(b + 1)
    found["memory bytes"] = 8 * b.numel() / timed(lambda: b.add_(1), 5) * 1e3
    p = torch.cuda.get_device_properties(device)
    # One shuffle or memory instruction of a warp a clock and multiprocessor.
    found["exchanges"] = p.multi_processor_count * getattr(p, "clock_rate", 1_755_000) * 1e3
    return found


def search_floor(kind, rows: int, columns: int, shape: SearchShape, peak: dict[str, float]) -> float:
    """Milliseconds of one round's shuffles and loads of the search."""
    fan, slots = 1 << kind.bits, max(1, kind.states // 32)
    rows_of_warp = 32 * slots // kind.states * shape.rows if slots == 1 else shape.rows
    exchanges = 2 * fan * slots * shape.rows + shape.horizon * slots * shape.rows + shape.horizon
    return rows * columns / rows_of_warp * exchanges / peak["exchanges"] * 1e3


def resources(kernel) -> str:
    dispatcher = getattr(kernel, "dispatcher", kernel)
    registers = list(dispatcher.get_regs_per_thread().values())
    local = list(dispatcher.get_local_mem_per_thread().values())
    return f"registers {registers}, bytes of local memory {local}"


def launch_time(encoder, lanes, shape: SearchShape) -> float:
    """Microseconds of this thread for handing the device one search."""
    w, steps = encoder.w[:8, : encoder.metric.steps].contiguous(), encoder.steps
    search = engine._Search(steps, lanes, 1, w, torch.ones_like(w), shape)
    search(0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        search(0)
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / 50 * 1e6


def halves_error(encoder, solution) -> float:
    """Relative error of the loss of 64 rows."""
    error = (encoder.w - solution.values * expand(solution.codes).repeat(1, LANES))[:64]
    by_halves = float((encoder.steps.product(error) * error).sum(dtype=torch.float64))
    h = encoder.metric.h
    exact = sum(
        float(((error.double() @ h[:, a : a + 512].double()) * error[:, a : a + 512]).sum())
        for a in range(0, len(h), 512)
    )
    return by_halves / exact - 1


def stages(
    kind, rows: int, columns: int, device: torch.device, peak: dict[str, float], totals: dict[str, float]
) -> None:
    h = curvature(columns, device)
    w = torch.randn(rows, columns, device=device) * 0.02
    torch.cuda.reset_peak_memory_stats()
    spent: dict[str, float] = {}
    holder = {}
    spent["metric"] = timed(lambda: holder.update(m=Metric(h, 0.01)))
    metric = holder["m"]
    print(f"\n{kind.name} {rows} x {columns}; peak memory of the metric {gibibytes():.2f} GiB")
    warnings.simplefilter("ignore")  # Numba's about small grids
    encode_rows(w[:64], metric, kind, EncodeOptions(sweeps=1))  # compiles
    torch.cuda.reset_peak_memory_stats()
    spent["set-up"] = timed(lambda: holder.update(e=_Encoder(w, metric, kind, True)))
    encoder = holder["e"]
    spent["initial scales"] = timed(lambda: holder.update(c=encoder.steps.initial_scales()))
    scale = expand(holder["c"])
    spent["feedback pass"] = timed(lambda: holder.update(v=encoder.steps.feedback_pass(scale)))
    symbols, values = holder["v"]
    spent["solution"] = timed(lambda: holder.update(s=encoder.solution(symbols, values, holder["c"])))
    s = holder["s"]
    spent["refit"] = timed(lambda: holder.update(f=encoder.steps.refit(s.values, s.codes)))
    spent["sweep"] = timed(lambda: encoder.steps.sweep(s.pull, scale, s.symbols, s.values))
    shape = encoder.steps.search_shape
    # The searches of a round by themselves.
    target, lanes = encoder.w[:, : metric.steps].contiguous(), metric.sweeping
    search = engine._Search(encoder.steps, lanes, 1, target, scale, shape)
    search(0)
    spent["searches of a round"] = LANES * timed(lambda: search(0), 4)
    print(f"  search: {resources(search.kernel)}; {launch_time(encoder, lanes, shape):.0f} us to launch")
    print(f"  loss by halves {halves_error(encoder, s):+.1e} off that in float64")
    natural = values.T[metric.inverse]
    part = natural[:, : max(32, engine._PRODUCTS // (columns // 64) ** 2)].contiguous()
    spent["normal equations"] = timed(lambda: encoder.steps._normal(part)) * rows / part.shape[1]
    spent["packing"] = timed(lambda: pack_rows(kind, s.symbols[:, metric.inverse], s.codes))
    started = time.perf_counter()
    whole = timed(lambda: holder.update(r=encode_rows(w, metric, kind, EncodeOptions())))
    wall = time.perf_counter() - started
    weights = rows * columns
    for name, ms in spent.items():
        print(f"  {name:22s} {ms:9.2f} ms  {1e6 * ms / weights:7.3f} ms a million weights")
    product = 2e3 * rows * columns**2
    floors = {
        "searches of a round": search_floor(kind, rows, columns, shape, peak),
        "normal equations": product / peak["bfloat16 products"] + 4e3 * weights * columns / 64 / peak["memory bytes"],
        "solution": 3 * product / peak["bfloat16 products"],
    }
    for name, floor in floors.items():
        print(f"  floor of {name:20s} {floor:9.2f} ms, measured {spent[name]:9.2f} ms: {spent[name] / floor:.2f} times")
    result = holder["r"]
    print(
        f"  whole {whole:9.1f} ms, {whole / weights * 7e9 / 1e3:6.1f} s for 7e9 weights; wall {wall:.2f} s; "
        f"loss {result.loss / result.power:.6f}; peak memory {gibibytes():.2f} GiB",
        flush=True,
    )
    totals[f"{kind.name} {rows}x{columns}"] = whole


def variants(kind, rows: int, columns: int, device: torch.device, shapes) -> None:
    metric = Metric(curvature(columns, device), 0.01)
    w = torch.randn(rows, columns, device=device) * 0.02
    print(
        f"\nvariants of the search, {kind.name} {rows} x {columns}: milliseconds of a round's searches, loss after it"
    )
    for shape in shapes:
        try:
            encoder = _Encoder(w, metric, kind, True)
            encoder.steps.search_shape = shape
            codes = encoder.steps.initial_scales()
            scale = expand(codes)
            target = encoder.w[:, : metric.steps].contiguous()
            search = engine._Search(encoder.steps, metric.passing, 1, target, scale, shape)
            start = time.perf_counter()
            search(0)
            torch.cuda.synchronize()
            compiled = time.perf_counter() - start
            ms = LANES * timed(lambda s=search: s(0), 4)
            found = encoder.feedback_pass(codes)
            swept = encoder.sweep(found)
            power = float(((encoder.w @ metric.h) * encoder.w).sum())
            print(
                f"  {shape}: {ms:8.2f} ms, loss {float(found.loss.sum()) / power:.6f}, after a sweep "
                f"{float(swept.loss.sum()) / power:.6f}; {resources(search.kernel)}; compiled in {compiled:.1f} s",
                flush=True,
            )
        except Exception:
            print(f"  {shape} failed")
            traceback.print_exc()


def check(kind, rows: int, columns: int, device: torch.device) -> None:
    """The same rows on both."""
    h = curvature(columns, device)
    w = torch.randn(rows, columns, device=device) * 0.02
    on_gpu = Metric(h, 0.01)
    on_cpu = Metric(h.cpu(), 0.01)
    a, b = encode_rows(w, on_gpu, kind, EncodeOptions()), None
    started = time.perf_counter()
    b = encode_rows(w.cpu(), on_cpu, kind, EncodeOptions())
    print(
        f"{kind.name} {rows} x {columns}: loss on the GPU {a.loss / a.power:.6f}, on the CPU {b.loss / b.power:.6f} "
        f"({a.loss / b.loss - 1:+.2e}); rows with equal bytes {(a.data == b.data).all(1).mean():.2f}, "
        f"equal bytes {(a.data == b.data).mean():.3f}; CPU {time.perf_counter() - started:.1f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096", "4096x14336"])
    parser.add_argument("--types", nargs="+", default=["A3"], choices=list(TYPES))
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--check", type=int, default=0, metavar="ROWS")
    args = parser.parse_args()
    device = torch.device("cuda")
    torch.cuda.synchronize()
    peak = ceilings(device)
    print(torch.cuda.get_device_name(device), {name: f"{v:.3g}/s" for name, v in peak.items()})
    totals: dict[str, float] = {}
    for name in args.types:
        for text in args.shapes:
            rows, columns = map(int, text.split("x"))
            kind, jobs = TYPES[name], []
            if args.variants:
                jobs.append(lambda k=kind, r=rows, c=columns: variants(k, min(r, 4096), c, device, VARIANTS))
            else:
                jobs.append(lambda k=kind, r=rows, c=columns: stages(k, r, c, device, peak, totals))
            if args.check:
                jobs.append(lambda k=kind, c=columns: check(k, args.check, c, device))
            for job in jobs:
                try:
                    job()
                except Exception:
                    traceback.print_exc()
                torch.cuda.empty_cache()
    print("\n" + "\n".join(f"{name}: {ms / 1e3:.2f} s" for name, ms in totals.items()))


if __name__ == "__main__":
    main()
