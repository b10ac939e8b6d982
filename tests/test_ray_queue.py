"""Encoding on a Ray cluster: cut into shares and put together again, against the encoding on this machine; errors. The
cluster here is a few lines that run tasks in this process; a real one is in test_batch.py."""

import pickle
import sys
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from athena_gguf import cluster, progress
from athena_gguf.cluster import RETRIES, Cluster, connected
from athena_gguf.encode import EncodeOptions, ray_queue
from athena_gguf.encode.ray_queue import RayQueue
from athena_gguf.encode.stage import _CpuQueue
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file import GGUFFile
from athena_gguf.plan import Plan

SHAPES = {"a.weight": (600, 128), "b.weight": (40, 128), "up.weight": (5, 40, 64), "gate.weight": (5, 24, 64)}


class Lost(Exception):
    """What Ray raises when a task's workers died."""


class NoMemory(Lost):
    """What Ray raises when its memory monitor killed the task's workers."""


class TaskFailed(Lost):
    def __init__(self, cause):
        super().__init__(f"a long traceback\n{type(cause).__name__}: {cause}")
        self.cause = cause


class Ray:
    """Machines by their ids: processors of each, which the first, "here", may have none of. `lose`: what a task's
    workers die of. Tasks end in the reverse of their order."""

    exceptions = SimpleNamespace(RayError=Lost, RayTaskError=TaskFailed, OutOfMemoryError=NoMemory)

    def __init__(self, lose=None, **machines):
        self.lose, self.machines, self.tasks, self.in_flight, self.most = lose, machines or {"here": 1}, [], [], 0
        self.silent = False  # until a task is cancelled, none ends
        self.most_bytes = 0

    def nodes(self):
        resources = {"object_store_memory": 1 << 30, "memory": 3 << 30}
        return [{"NodeID": n, "Alive": True, "Resources": resources | {"CPU": c}} for n, c in self.machines.items()]

    def get_runtime_context(self):
        return SimpleNamespace(get_node_id=lambda: "here")

    def put(self, value):
        """As Ray does: buffers beside what is pickled, which is for what describes them."""
        buffers = []
        described = pickle.dumps(value, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw()))
        return Put(described, buffers)

    def remote(self, **settings):
        assert settings == {"num_cpus": 1, "max_retries": RETRIES}

        def submit(function, options, *arguments):
            assert options.keys() <= {"memory", "label_selector"}
            self.tasks.append(SimpleNamespace(options=options, arguments=arguments))
            number = len(self.tasks) - 1
            self.in_flight.append(number)
            self.most = max(self.most, len(self.in_flight))
            stored = {id(a): a.n_bytes for n in self.in_flight for a in self.tasks[n].arguments if isinstance(a, Put)}
            self.most_bytes = max(self.most_bytes, sum(stored.values()))
            found = [a.value() if isinstance(a, Put) else a for a in arguments]
            return number, lambda: function(*found)

        def remote(function):
            return SimpleNamespace(
                options=lambda **options: SimpleNamespace(remote=lambda *a: submit(function, options, *a))
            )

        return remote

    def wait(self, references, num_returns, timeout):
        if self.silent:
            return [], references
        self.in_flight.remove(references[-1][0])
        return references[-1:], references[:-1]

    def get(self, reference):
        if self.lose:
            raise self.lose
        try:
            return reference[1]()
        except Exception as error:
            raise TaskFailed(error) from error

    def cancel(self, reference, force):
        self.silent = False
        if reference[0] in self.in_flight:
            self.in_flight.remove(reference[0])


class Put:
    def __init__(self, described, buffers):
        self.described, self.buffers = described, buffers
        self.n_bytes = sum(buffer.nbytes for buffer in buffers)

    def value(self):
        return pickle.loads(self.described, buffers=[memoryview(buffer).toreadonly() for buffer in self.buffers])


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


def on_cluster(plan, base, writer, ray, measures=False):
    return RayQueue(plan, base, EncodeOptions(sweeps=1), writer, Cluster(ray, 1, 0), measures)


def weights(task):
    return task.arguments[5]


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
    assert [[shape for _, shape, _, _ in weights(task).value()] for task in ray.tasks] == [
        [(256, 128)],
        [(256, 128)],
        [(88, 128), (40, 128)],
        [(4, 40, 64), (4, 24, 64)],
        [(1, 40, 64), (1, 24, 64)],
        [(40, 128)],
    ]
    for task in ray.tasks:  # no second copy of the weights, which are two bytes each, in what describes them
        put = weights(task)
        assert put.n_bytes == 2 * sum(np.prod(shape) for _, shape, _, _ in put.value()) and len(put.described) < 1000
        assert task.options == {"memory": 3 << 28}  # half a gigabyte and what little the task takes, rounded up
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


@pytest.mark.parametrize(
    ("lose", "match"),
    [
        (
            Lost("the worker died\nand more"),
            r"tensor b.weight: its encoding on the Ray cluster was lost 4 times: the worker died; see .* --work-dir$",
        ),
        (
            NoMemory("7 of 8 GB\nand more"),
            r"tensor b.weight: the machines of .* no memory for its encoding, 4 times: 7 of 8 GB; end .* --work-dir$",
        ),
        (
            TaskFailed(RuntimeError("it cannot be loaded:\nNo module named 'athena_gguf'")),
            r"tensor b.weight: its task .* failed: No module named 'athena_gguf'; has every machine athena-gguf \d",
        ),
        (TaskFailed(MemoryError("std::bad_alloc")), r"tensor b.weight: a machine .* has not enough memory: Mem"),
    ],
)
def test_what_ray_raises(plan, base, lose, match):
    with on_cluster(plan, base, Writer(), Ray(lose)) as queue, pytest.raises(AthenaError, match=match):
        queue.add(None, ["b.weight"])
        queue.drain()


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("athena_gguf.cluster.__version__", "9", r"has athena-gguf 9 \(method \d+\), and the one that uses it 0"),
        ("athena_gguf.encode.finished.METHOD", 99, r"\(method 99\), .* \(method \d+\); install the same"),
    ],
)
def test_machines_have_one_version(plan, base, monkeypatch, name, value, match):
    with on_cluster(plan, base, Writer(), Ray()) as queue, pytest.raises(AthenaError, match=match):
        queue.add(None, ["b.weight"])
        monkeypatch.setattr(name, value)
        queue.drain()


def test_a_machine_that_measures_encodes_only_while_it_waits(plan, base):
    """Two tasks for every processor of the others, then one for each here, which a measurement waits for."""
    found, ray = Writer(), Ray(here=1, other=1)
    with on_cluster(plan, base, found, ray, measures=True) as queue:
        queue.add(curvature(128, 128), ["a.weight"])
        elsewhere = {"label_selector": {"ray.io/node-id": "!here"}}
        apart = [task.options.keys() & {"label_selector"} != set() for task in ray.tasks]
        assert apart == [True, True, False] and all(ray.tasks[0].options[k] == v for k, v in elsewhere.items())
        queue.pause()
        assert ray.in_flight == [0, 1]
        queue.pause()
        assert ray.in_flight == [0, 1]
        queue.add(None, ["b.weight"])
        assert ray.in_flight == [0, 1, 3]
        # The other machine goes: its tasks come here, and the measurement waits for them.
        del ray.machines["other"]
        ray.silent = True
        queue.pause()
        assert ray.in_flight == [] and found.keys() == {"a.weight", "b.weight"}
        assert all("label_selector" not in task.options for task in ray.tasks[-2:])


def test_a_machine_with_a_gpu_measures_beside_its_tasks(plan, base):
    ray = Ray(here=1, other=1)
    with on_cluster(plan, base, Writer(), ray) as queue:
        queue.add(curvature(128, 128), ["a.weight"])
        queue.pause()
        assert ray.in_flight == [0, 1, 2] and all("label_selector" not in task.options for task in ray.tasks)


def test_shares_of_a_tensor_count_their_curvature_once(plan, base):
    """It lies in the object store once, and so do tasks of one tensor together when it is most of what there is."""
    ray, held = Ray(here=2), 128 * 128 * 4
    with on_cluster(plan, base, Writer(), ray) as queue:
        queue.room = held + 2 * 600 * 128
        queue.add(curvature(128, 128), ["a.weight"])
        assert ray.most == 3 and ray.most_bytes == queue.room
        queue.add(curvature(128, 128), ["b.weight"])  # another one waits until two tasks are done
        assert ray.in_flight == [0, 3]


def test_memory_of_a_task(plan, base):
    """A metric of every column's pair, and no more than the smallest machine that takes tasks has."""
    ray = Ray()
    with on_cluster(plan, base, Writer(), ray) as queue:
        shares = [SimpleNamespace(tensor=SimpleNamespace(shape=(256, 4096), columns=4096, n_elements=256 * 4096))]
        sent = SimpleNamespace(n_bytes=4 * 4096**2)
        needed = (1 << 29) + 34 * 4096**2 + 4 * 4096**2 + 4 * 256 * 4096
        assert needed <= queue._memory(shares, sent) < needed + (1 << 28)
        shares[0].tensor.columns = 16384
        assert queue._memory(shares, sent) == 3 << 30


def test_what_is_printed_becomes_notes(monkeypatch):
    said = []
    monkeypatch.setattr(progress, "note", said.append)
    notes = cluster._Notes()
    print("a", 1, file=notes)
    print("\x1b[31mb\x1b[0m\n\n c", end="", file=notes)
    assert said == ["a 1", "b"]
    notes.end()
    assert said == ["a 1", "b", "c"]


def test_a_handler_of_another_language_is_left(monkeypatch):
    """Python cannot put back what it did not set."""
    monkeypatch.setattr("signal.getsignal", lambda number: None)
    with cluster._handlers_kept():
        pass


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(AthenaError, match=r"pip install 'athena-gguf\[ray\]'"), connected("auto"):
        pass
