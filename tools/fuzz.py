"""Feed damaged and hostile files to what reads them. docs/reliability.md has the counts.

    python tools/fuzz.py reader --runs 200000     # our GGUF reader, in this process
    python tools/fuzz.py models --runs 20000      # config.json, safetensors headers and shard indexes, likewise
    python tools/fuzz.py rows --seconds 600       # decoder and products of the A types, in C
    python tools/fuzz.py gguf --seconds 600       # the patched ggml: files, row validation, products of their tensors
    python tools/fuzz.py llama --seconds 600      # the patched llama.cpp: loading a model, then a few tokens

The last three are libFuzzer programs (tests/fuzz) under the address and undefined behaviour sanitizers, and need clang;
the last two also build ggml or llama.cpp that way. --folder keeps the builds, and the inputs that libFuzzer found worth
keeping. A finding ends the run with an exit code that is not 0, and leaves its input.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np

from athena_gguf.errors import AthenaError
from athena_gguf.format import TYPES
from athena_gguf.gguf_file import GGUFFile, types

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ROOT / "tests" / "fuzz"
EDGES = [0, 1, 2, 3, 7, 8, 9, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 32]
EDGES += [1 << 61, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1, 43, 119, 120, 121, 122, 123]


def mutate(data: bytes, rng: random.Random, head: int) -> bytes:
    """A few damages: bits, numbers, and stretches cut, doubled or moved; most of them in the first `head` bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(max(1, min(len(out), head if rng.random() < 0.9 else len(out))))
        what = rng.randrange(10)
        if what == 0:
            del out[at:]
        elif what == 1:
            del out[at : at + rng.randint(1, 40)]
        elif what == 2:
            out[at:at] = out[at : at + rng.randint(1, 80)] or b"\0"
        elif what == 3:
            other = rng.randrange(len(out) or 1)
            out[at : at + 16] = out[other : other + 16]
        elif what < 6 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        else:
            code = rng.choice("BIIQQQ")
            size = struct.calcsize(code)
            value = rng.choice([*EDGES, len(out), rng.getrandbits(8 * size)])
            out[at : at + size] = struct.pack("<" + code, value % (1 << 8 * size))
    return bytes(out)


def gguf_seed(folder: Path) -> tuple[bytes, int]:
    """A small GGUF file with values and tensors of many types, and the length of its header."""
    types.register()
    rng = np.random.default_rng(1)
    path = folder / "seed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("athena.format_version", 1)
    writer.add_custom_alignment(32)
    writer.add_bool("a", True)
    writer.add_float64("b", 0.5)
    writer.add_array("c", ["one", "two", ""])
    writer.add_array("d", [1, 2, 3])
    writer.add_tensor("norm", rng.standard_normal(64).astype(np.float32))
    for name, kind in TYPES.items():
        data = rng.integers(0, 256, (3, 5 * kind.group_bytes)).astype(np.uint8)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType(kind.ggml_type))
    for name in ("BF16", "Q8_0", "Q4_0"):
        dtype = gguf.GGMLQuantizationType[name]
        data = gguf.quants.quantize(rng.standard_normal((2, 64)).astype(np.float32), dtype)
        writer.add_tensor(name, data, raw_dtype=dtype)
    experts = rng.integers(0, 256, (2, 3, TYPES["A2"].group_bytes)).astype(np.uint8)
    writer.add_tensor("experts", experts, raw_dtype=gguf.GGMLQuantizationType(TYPES["A2"].ggml_type))
    _close(writer)
    return path.read_bytes(), int(gguf.GGUFReader(path).tensors[0].data_offset)


def llama_seed(folder: Path) -> tuple[bytes, int]:
    """A model of one block with A2, A3 and A4 tensors and no vocabulary, and the length of its header."""
    types.register()
    rng = np.random.default_rng(2)
    path = folder / "seed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(48)
    writer.add_tokenizer_model("no_vocab")
    shapes = {"token_embd": (48, 64), "output": (48, 64), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64)}
    shapes |= {"blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (128, 64)}
    shapes |= {"blk.0.ffn_up": (128, 64), "blk.0.ffn_down": (64, 128)}
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    for (name, (rows, columns)), kind in zip(shapes.items(), 3 * list(TYPES.values()), strict=True):
        data = rng.integers(0, 256, (rows, columns // 64 * kind.group_bytes)).astype(np.uint8)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType(kind.ggml_type))
    _close(writer)
    return path.read_bytes(), int(gguf.GGUFReader(path).tensors[0].data_offset)


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rows_seed(_: Path) -> tuple[bytes, int]:
    return bytes(range(200)), 200


SEEDS: dict[str, Callable[[Path], tuple[bytes, int]]] = {"gguf": gguf_seed, "llama": llama_seed, "rows": rows_seed}


def inputs(target: str, runs: int, seed: int) -> Iterator[bytes]:
    """The seed of a target, then `runs` mutations of it."""
    with tempfile.TemporaryDirectory() as folder:
        data, head = SEEDS[target](Path(folder))
    rng = random.Random(seed)
    yield data
    for _ in range(runs):
        yield mutate(data, rng, head)


def pack(path: Path, target: str, runs: int, seed: int) -> None:
    """Write the inputs as tests/fuzz/replay.c reads them."""
    with open(path, "wb") as out:
        for data in inputs(target, runs, seed):
            out.write(struct.pack("<I", len(data)) + data)


def read_gguf(path: Path) -> None:
    """Everything in a file: metadata, names, bytes, and the values of what can be decoded."""
    from athena_gguf.report.inspection import inspect_file

    inspect_file(path)
    with GGUFFile(path) as file:
        for tensor in file:
            try:
                tensor.to_float32()
            except AthenaError as error:
                assert tensor.name in str(error)


def fuzz_reader(runs: int, seed: int) -> dict[str, int]:
    """How many files were read and refused; any other end is a finding, and raises."""
    counts = {"read": 0, "refused": 0}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / "file.gguf"
        for number, data in enumerate(inputs("gguf", runs, seed)):
            path.write_bytes(data)
            try:
                with np.errstate(all="ignore"):  # values of floats that are not finite
                    read_gguf(path)
                counts["read"] += 1
            except AthenaError as error:
                assert "file.gguf" in str(error), (number, error)
                counts["refused"] += 1
            except BaseException:
                _keep(data, f"reader-{seed}-{number}.gguf")
                raise
    return counts


def _keep(data: bytes, name: str) -> None:
    Path(name).write_bytes(data)
    print(f"the input is in {name}", file=sys.stderr)


def change_json(value: object, rng: random.Random) -> object:
    """A JSON value with one part of it changed, anywhere."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(sorted(value))
        what = rng.random()
        if what < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: change_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], change_json(value[at], rng), *value[at + 1 :]]
    names = ["", "../x", "/etc/passwd", "model.safetensors", "llama", "Qwen2ForCausalLM", "\0", "x" * 1000, "float16"]
    return rng.choice([None, True, [], {}, -1, 0.5, 1e308, *EDGES, *names, [[]], {"a": {}}, rng.getrandbits(20)])


def damage_model(model: Path, rng: random.Random) -> None:
    """Change one of the files that `read_model` looks at."""
    what = rng.randrange(4)
    weights, config, index = (model / n for n in ("model.safetensors", "config.json", "model.safetensors.index.json"))
    if what == 0:
        config.write_bytes(mutate(config.read_bytes(), rng, 1 << 20))
    elif what == 1:
        config.write_text(json.dumps(change_json(json.loads(config.read_text()), rng)))
    elif what == 2:
        data = weights.read_bytes()
        head = 8 + int.from_bytes(data[:8], "little")
        weights.write_bytes(mutate(data, rng, head))
    else:
        found = {"metadata": {}, "weight_map": {f"tensor{i}": "model.safetensors" for i in range(4)}}
        text = json.dumps(change_json(found, rng)).encode()
        index.write_bytes(mutate(text, rng, 1 << 20) if rng.random() < 0.3 else text)


def read_model(model: Path) -> None:
    """The checks before a conversion, then the model's weights."""
    import torch

    from athena_gguf.gguf_file.base import check_model
    from athena_gguf.model import load_model

    check_model(model)
    load_model(model, torch.device("cpu"), torch.float32)


def fuzz_models(runs: int, seed: int) -> dict[str, int]:
    """As `fuzz_reader`, of model directories."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_model

    counts = {"read": 0, "refused": 0}
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, model = tiny_model.make(Path(folder) / "whole"), Path(folder) / "model"
        for number in range(runs):
            shutil.copytree(whole, model)
            damage_model(model, rng)
            try:
                read_model(model)
                counts["read"] += 1
            except AthenaError as error:
                assert "model" in str(error), (number, error)
                counts["refused"] += 1
            except BaseException:
                shutil.copytree(model, f"models-{seed}-{number}")
                print(f"the input is in models-{seed}-{number}", file=sys.stderr)
                raise
            shutil.rmtree(model)
    return counts


def bound_memory(mib: int) -> None:
    """What needs so much more address space than now ends in a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + mib * 2**20, resource.RLIM_INFINITY))


# `enum`: ggml reads numbers into variables of enum types before it checks them. `function`: it calls functions through
# pointers of other types.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=enum,function"]
SANITIZE += ["-g", "-O1"]


def build(target: str, folder: Path) -> Path:
    """The libFuzzer program of a target. Raises CalledProcessError if something cannot be built."""
    from athena_gguf.runtime import source_tree

    if not shutil.which("clang++"):
        raise SystemExit("clang is missing; on Debian or Ubuntu: sudo apt-get install clang")
    tree, program = source_tree(), folder / target
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{tree / part}" for part in ("include", "ggml/include", "ggml/src", "ggml/src/ggml-cpu")]
    if target == "rows":
        source = tree / "ggml" / "src"
        parts = [source / f"{name}.c" for name in ("ggml-athena", "ggml-athena-quantize")]
        parts += [source / "ggml-cpu" / f"{name}.c" for name in ("athena", "athena-gemm")]
        parts += [TARGETS.parent / "c" / f"{name}.c" for name in ("ggml_abort", "gemm")]
        native = ["-O2", "-march=native", "-fsanitize=fuzzer"]
        run("clang", "-std=c11", *SANITIZE, *native, *includes, *parts, TARGETS / "rows.c", "-o", program, "-lm")
        return program
    where = folder / "build"
    # as in release builds: ggml's own assertions stop at values that are not finite, which any file may hold
    flags = " ".join([*SANITIZE, "-fsanitize=fuzzer-no-link", "-DNDEBUG"])
    options = ["CMAKE_BUILD_TYPE=None", "BUILD_SHARED_LIBS=OFF", "GGML_OPENMP=OFF", "LLAMA_BUILD_COMMON=OFF"]
    options += [f"CMAKE_{language}_FLAGS={flags}" for language in ("C", "CXX")]
    options += [
        "CMAKE_C_COMPILER=clang",
        "CMAKE_CXX_COMPILER=clang++",
        "LLAMA_BUILD_TESTS=OFF",
        "LLAMA_BUILD_TOOLS=OFF",
    ]
    options += ["LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_APP=OFF", "LLAMA_BUILD_UI=OFF", "LLAMA_OPENSSL=OFF"]
    options += ["LLAMA_BUILD_NUMBER=0", "LLAMA_BUILD_COMMIT=athena"]
    run("cmake", "-G", "Ninja", "-S", tree, "-B", where, *(f"-D{option}" for option in options))
    run("cmake", "--build", where, "--target", *(("llama",) if target == "llama" else ("ggml",)))
    libraries = [where / "src" / "libllama.a"] if target == "llama" else []
    libraries += [where / "ggml" / "src" / f"lib{name}.a" for name in ("ggml", "ggml-cpu", "ggml", "ggml-base")]
    made = folder / f"{target}.o"
    run(
        "clang",
        "-std=gnu11",
        *SANITIZE,
        "-fsanitize=fuzzer-no-link",
        *includes,
        "-c",
        TARGETS / f"{target}.c",
        "-o",
        made,
    )
    run("clang++", *SANITIZE, "-fsanitize=fuzzer", made, *libraries, "-o", program, "-lpthread", "-ldl", "-lm")
    return program


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


def fuzz_native(target: str, runs: int | None, seconds: int | None, seed: int, folder: Path) -> None:
    """Build the target, give libFuzzer some damaged files to start from and let it run."""
    program, corpus = build(target, folder), folder / f"{target}-corpus"
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(inputs(target, 100, seed)):
        (corpus / f"seed-{number}").write_bytes(data)
    longest = max(path.stat().st_size for path in corpus.glob("seed-*"))
    options = [
        f"-max_len={2 * longest}",
        f"-seed={seed + 1}",
        "-malloc_limit_mb=1024",
        "-timeout=60",
        "-print_final_stats=1",
    ]
    options.append(f"-artifact_prefix={folder}/")
    if target != "rows":  # ggml prints every value that is no number; with a finding's file the program says what it is
        options.append("-close_fd_mask=3")
    if target != "rows":  # some inputs are given up halfway
        os.environ["ASAN_OPTIONS"] = "detect_leaks=0"
        options.append("-detect_leaks=0")
    options += [f"-runs={runs}"] * (runs is not None) + [f"-max_total_time={seconds}"] * (seconds is not None)
    run(program, *options, corpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["reader", "models", *SEEDS])
    parser.add_argument("--runs", type=int)
    parser.add_argument("--seconds", type=int, help="of the C programs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz")
    chosen = parser.parse_args()
    start = time.monotonic()
    if chosen.target in SEEDS:
        fuzz_native(chosen.target, chosen.runs, chosen.seconds, chosen.seed, chosen.folder.absolute())
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    fuzz, extra = (fuzz_reader, 256) if chosen.target == "reader" else (fuzz_models, 4096)
    fuzz(1, chosen.seed)  # imports what is needed, before memory is bounded
    bound_memory(extra)
    counts = fuzz(chosen.runs or 10_000, chosen.seed)
    print(f"{chosen.target}: {counts}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
