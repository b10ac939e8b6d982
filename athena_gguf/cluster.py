"""A Ray cluster: reaching it, what a task of it takes, and what its errors mean here."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from athena_gguf import __version__, progress
from athena_gguf.errors import AthenaError
from athena_gguf.memory import cores, is_shortage

RETRIES = 3  # of a task whose worker or machine is lost, or that the machine's memory had no room for


@dataclass(frozen=True)
class Cluster:
    """`ray`: the module, connected. A task takes `cpus` processors, all of the smallest machine (one of a cluster made
    here to try it), and a job besides `gpus` GPUs, one where any machine has some."""

    ray: Any
    cpus: int
    gpus: int

    def here(self) -> str:
        """The id of this machine."""
        return str(self.ray.get_runtime_context().get_node_id())

    def slots(self) -> dict[str, int]:
        """Tasks that run at once on each of the machines that are there now and have room for one, by their ids."""
        return {node: count for node, (count, _) in self._room().items()}

    def machines(self) -> list[str]:
        """The ids of the machines that are there now and have room for a job."""
        return [node for node, (_, gpus) in self._room().items() if gpus >= self.gpus]

    def _room(self) -> dict[str, tuple[int, float]]:
        """Tasks at once, and GPUs, of the machines that have room for a task, by their ids."""
        found = {}
        for node in _alive(self.ray):
            if count := int(node["Resources"].get("CPU", 0) // self.cpus):
                found[node["NodeID"]] = count, node["Resources"].get("GPU", 0)
        return found

    def task_bytes(self) -> int:
        """Memory that the smallest machine with room for a task has for tasks; 0 if it does not say."""
        nodes = [node["Resources"] for node in _alive(self.ray)]
        return int(min((n.get("memory", 0) for n in nodes if n.get("CPU", 0) >= self.cpus), default=0))

    def store_bytes(self) -> int:
        """Room of the object store that this process fills: this machine's."""
        here = self.here()
        near = [node for node in _alive(self.ray) if node["NodeID"] == here]
        return int(min((node["Resources"].get("object_store_memory", 0) for node in near), default=0))


@contextmanager
def connected(address: str, workers: int | None = None) -> Iterator[Cluster]:
    """The cluster; what still runs there for this process at the end is ended. Until then what this process prints on
    stdout becomes notes: Ray prints there that a worker died, and stdout is for results.

    `address`: of the cluster, "auto" for the one around, or "local" for a new one on this machine of `workers` workers
    with a processor each, as many as there are processors if None. Raises AthenaError if Ray is not installed, the
    cluster cannot be reached, or no machine of it has processors.
    """
    try:
        import ray
    except ImportError:
        raise AthenaError("--ray needs Ray: pip install 'athena-gguf[ray]'") from None
    # Without it a task that the memory of no machine has room for is tried for ever. Read when the driver starts.
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a trial tells nobody
        settings |= {"num_cpus": workers or cores(), "include_dashboard": False}
    with redirect_stdout(_Notes()) as notes:
        try:
            with _handlers_kept():
                ray.init(**settings)
        except Exception as error:  # whatever a wrong address makes Ray raise
            raise AthenaError(f"--ray {address}: cannot reach the cluster: {error}") from error
        try:
            nodes = [node["Resources"] for node in _alive(ray)]
            processors = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
            if not processors:
                raise AthenaError(f"--ray {address}: no machine of the cluster offers processors; ray start adds some")
            cpus = 1 if address == "local" else min(processors)
            gpus = 1 if address != "local" and any(node.get("GPU") for node in nodes) else 0
            cluster = Cluster(ray, cpus, gpus)
            at_once = sum(cluster.slots().values())
            progress.note(f"Ray: {len(nodes)} machines, {at_once} tasks at once of {cpus} processors")
            yield cluster
        finally:
            ray.shutdown()
            notes.end()


def package() -> tuple[str, int]:
    """What must be the same on every machine for files to be: the version and the number of the encoding's method."""
    from athena_gguf.encode.finished import METHOD

    return __version__, METHOD


def check_package(sent: tuple[str, int]) -> None:
    """On a worker: raises AthenaError unless `package()` here is what the driver has."""
    if (found := package()) != tuple(sent):
        there, here = (f"{version} (method {method})" for version, method in (sent, found))
        raise AthenaError(
            f"a machine of the Ray cluster has athena-gguf {here}, and the one that uses it {there}; install the same"
        )


def task_error(what: str, error: Any) -> AthenaError:
    """What to raise for a RayTaskError of the task that did `what`."""
    if isinstance(error.cause, AthenaError):
        return error.cause
    said = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
    if isinstance(error.cause, Exception) and is_shortage(error.cause):
        return AthenaError(f"{what}: a machine of the Ray cluster has not enough memory: {said}; give it fewer tasks")
    return AthenaError(
        f"{what}: its task on the Ray cluster failed: {said}; has every machine athena-gguf {__version__}?"
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _alive(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray puts a handler of its own in the place of this program's for SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # None: of a handler that was not set from Python, which Python cannot set again.
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


class _Notes(io.TextIOBase):
    """Every line that is written is a note, without its colours."""

    def __init__(self) -> None:
        self.begun = ""
        self.lock = threading.Lock()  # Ray prints in a thread of its own

    def write(self, text: str) -> int:
        with self.lock:
            *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            self._note(line)
        return len(text)

    def end(self) -> None:
        """Say the last line if it did not end."""
        with self.lock:
            line, self.begun = self.begun, ""
        self._note(line)

    def _note(self, line: str) -> None:
        if said := re.sub(r"\x1b\[[0-9;]*m", "", line).strip():
            progress.note(said)
