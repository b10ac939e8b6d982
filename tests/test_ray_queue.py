"""Encoding on a Ray cluster: cut into shares and put together again, against the encoding on this machine; errors. The
cluster here is a few lines that run tasks in this process; a real one is in test_batch.py."""

import pickle
import sys
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from athena_gguf.cluster import connected
from athena_gguf.encode import EncodeOptions, ray_queue
from athena_gguf.encode.ray_queue import RETRIES, RayQueue
from athena_gguf.encode.stage import _CpuQueue
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file import GGUFFile
from athena_gguf.plan import Plan

SHAPES = {"a.weight": (600, 128), "b.weight": (40, 128), "up.weight": (5, 40, 64), "gate.weight": (5, 24, 64)}


class Lost(Exception):
    """What Ray raises when a task's workers died."""


class TaskFailed(Lost):
    def __init__(self, cause):
        super().__init__("a long traceback")
        self.cause = cause


class Ray:
    """`lose`: whether workers die. Tasks end in the reverse of their order."""

    exceptions = SimpleNamespace(RayError=Lost, RayTaskError=TaskFailed)

    def __init__(self, lose=False):
        self.lose, self.tasks, self.in_flight, self.most = lose, [], 0, 0

    def put(self, value):
        return SimpleNamespace(value=pickle.dumps(value), id=len(self.tasks))

    def remote(self, **settings):
        assert settings == {"num_cpus": 1, "max_retries": RETRIES}

        def submit(function, *arguments):
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            self.tasks.append(arguments)
            found = (pickle.loads(a.value) if isinstance(a, SimpleNamespace) else a for a in arguments)
            return len(self.tasks) - 1, lambda: function(*found)

        return lambda function: SimpleNamespace(remote=lambda *arguments: submit(function, *arguments))

    def wait(self, references, num_returns):
        self.in_flight -= 1
        return references[-1:], references[:-1]

    def get(self, reference):
        if self.lose:
            raise Lost("the worker died\nand more")
        try:
            return reference[1]()
        except Exception as error:
            raise TaskFailed(error) from error

    def cancel(self, reference, force):
        pass


class Writer(dict):
    put = dict.__setitem__


@pytest.fixture
def base(tmp_path):
    path, rng = tmp_path / "base.gguf", np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    for name, shape in SHAPES.items():
        weights = gguf.quants.quantize(rng.standard_normal(shape, np.float32), gguf.GGMLQuantizationType.BF16)
        writer.add_tensor(name, weights, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(path) as file:
        yield file


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.setattr(ray_queue, "SHARE", 17000)
    return Plan("llama", dict(SHAPES), dict.fromkeys(SHAPES, "BF16"), dict.fromkeys(SHAPES, "A2"))


def on_cluster(plan, base, writer, ray):
    cluster = SimpleNamespace(ray=ray, cpus=1, slots=lambda: 1, store_bytes=lambda: 1 << 30)
    return RayQueue(plan, base, EncodeOptions(sweeps=1), writer, cluster)


def curvature(*shape):
    x = torch.randn(*shape[:-1], 3 * shape[-1], generator=torch.Generator().manual_seed(1))
    return x @ x.mT


def test_shares_give_the_bytes_of_one_machine(plan, base):
    layers = [(curvature(128, 128), ["a.weight", "b.weight"]), (curvature(5, 64, 64), ["up.weight", "gate.weight"])]
    found, ray = Writer(), Ray()
    with on_cluster(plan, base, found, ray) as queue:
        for matrix, names in layers:
            queue.add(matrix, names)
        queue.add(None, ["b.weight"])
        assert ray.most == 2  # one runs, one waits
        queue.drain()
    # Pieces of 256 rows, the rest of a with b, and four of the five experts with one after them.
    assert [[t.shape for t in pickle.loads(task[5].value)] for task in ray.tasks] == [
        [(256, 128)],
        [(256, 128)],
        [(88, 128), (40, 128)],
        [(4, 40, 64), (4, 24, 64)],
        [(1, 40, 64), (1, 24, 64)],
        [(40, 128)],
    ]
    alone = Writer()
    with _CpuQueue(plan, base, EncodeOptions(sweeps=1), alone) as queue:
        for matrix, names in layers:
            queue.add(matrix, names)
        queue.add(None, ["b.weight"])
        queue.drain()
    assert found.keys() == alone.keys() == set(SHAPES)
    for name, encoded in alone.items():
        np.testing.assert_array_equal(found[name].data, encoded.data)
        assert found[name].loss == pytest.approx(encoded.loss) and found[name].power == pytest.approx(encoded.power)


def test_errors_name_the_tensor_and_what_to_do(plan, base):
    matrices = curvature(5, 64, 64)
    matrices[4] *= -1
    with (
        on_cluster(plan, base, Writer(), Ray()) as queue,
        pytest.raises(AthenaError, match=r"tensor up.weight, expert 4: .* give more or other calibration text"),
    ):
        queue.add(matrices, ["up.weight", "gate.weight"])
        queue.drain()
    lost = r"tensor b.weight: its encoding on the Ray cluster was lost 4 times: the worker died; see .* --work-dir$"
    with on_cluster(plan, base, Writer(), Ray(lose=True)) as queue, pytest.raises(AthenaError, match=lost):
        queue.add(None, ["b.weight"])
        queue.drain()


def test_machines_have_one_version(plan, base, monkeypatch):
    with on_cluster(plan, base, Writer(), Ray()) as queue, pytest.raises(AthenaError, match="athena-gguf 9, and this"):
        queue.add(None, ["b.weight"])
        monkeypatch.setattr(ray_queue, "__version__", "9")
        queue.drain()


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(AthenaError, match=r"pip install 'athena-gguf\[ray\]'"), connected("auto"):
        pass
