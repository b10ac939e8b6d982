"""Fixtures shared by the tests: a small GGUF file made by gguf-py, the built runtime, the demo model.

The scripts of tools/ are importable by name.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import athena_gguf.runtime
from athena_gguf.conversion import ConvertOptions

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))


@pytest.fixture(scope="session")
def runtime() -> Path:
    """The folder of the built binaries, llama.cpp's type tests among them; does nothing if they are built."""
    return athena_gguf.runtime.build(tests=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of random weights, made in seconds; not to be changed."""
    import tiny_model

    return tiny_model.make(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_base(tiny_model: Path, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its BF16 GGUF."""
    from athena_gguf.gguf_file import write_base

    path = tmp_path_factory.mktemp("tiny") / "base.gguf"
    write_base(tiny_model, path)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text of 4,000 words that the small model's tokenizer knows."""
    import tiny_model

    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(tiny_model.words(4000))
    return path


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration windows that the small model's texts fill many of."""
    monkeypatch.setattr("athena_gguf.conversion.WINDOW", 64)


@pytest.fixture
def options(text: Path, tiny_base: Path) -> Callable[..., ConvertOptions]:
    """Options of a quick conversion of the small model; keywords change them."""

    def make(**changes: Any) -> ConvertOptions:
        settings: dict[str, Any] = {
            "calibration": (str(text),),
            "calibration_tokens": 1024,
            "base": tiny_base,
            "device": "cpu",
        }
        return ConvertOptions(**(settings | changes))

    return make


@pytest.fixture(scope="session")
def demo_directory() -> Path:
    """The demo model under the git-ignored demo/, where scripts/quickstart puts it too; a 93 MB download, once."""
    import demo_model

    directory = ROOT / "demo" / "SmolLM2-135M-Instruct"
    demo_model.make(directory)
    return directory


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a cluster of two machines with a processor each, which are processes here."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_worker_niceness", "0")  # not behind everything else on a busy machine
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        handler = signal.getsignal(signal.SIGTERM)  # which Ray replaces
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=1)
            signal.signal(signal.SIGTERM, handler)
            yield cluster.address
        finally:
            cluster.shutdown()


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """A file with every kind of metadata value and tensors of four types, written by gguf-py."""
    path = tmp_path / "tiny.gguf"
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.uint32", 2**32 - 1)
    writer.add_int8("a.int8", -3)
    writer.add_uint64("a.uint64", 2**63)
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 1 / 3)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Größe")
    writer.add_array("a.strings", ["one", "two", "", "drei", "vier"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.floats", [0.25, -8.0])
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_BF16))
    writer.add_tensor("norm.weight", rng.standard_normal(96).astype(np.float32))
    matrix = rng.standard_normal((6, 128)).astype(np.float32)
    for name, kind in (("linear.weight", "BF16"), ("embedding.weight", "Q8_0")):
        data = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("experts.weight", rng.standard_normal((3, 4, 64)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
