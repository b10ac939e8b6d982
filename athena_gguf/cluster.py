"""A Ray cluster: reaching it, and what a task of it takes."""

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

from athena_gguf import progress
from athena_gguf.errors import AthenaError
from athena_gguf.memory import cores


@dataclass(frozen=True)
class Cluster:
    """`ray`: the module, connected. A task takes `cpus` processors, all of the smallest machine (one of a cluster made
    here to try it), and a job besides `gpus` GPUs, one where any machine has some."""

    ray: Any
    cpus: int
    gpus: int

    def slots(self) -> int:
        """Tasks that run at once on the machines that are there now."""
        return sum(int(node["Resources"].get("CPU", 0) // self.cpus) for node in _alive(self.ray))

    def elsewhere(self) -> bool:
        """Whether there are other machines than this one."""
        return any(not _is_here(self.ray, node) for node in _alive(self.ray))

    def store_bytes(self) -> int:
        """Room of the object store that this process fills: this machine's, or that of the smallest one."""
        nodes = _alive(self.ray)
        near = [node for node in nodes if _is_here(self.ray, node)] or nodes
        return int(min(node["Resources"].get("object_store_memory", 0) for node in near))


@contextmanager
def connected(address: str, workers: int | None = None) -> Iterator[Cluster]:
    """The cluster; what still runs there for this process at the end is ended.

    `address`: of the cluster, "auto" for the one around, or "local" for a new one on this machine of `workers` workers
    with a processor each, as many as there are processors if None. Raises AthenaError if Ray is not installed, the
    cluster cannot be reached, or no machine of it has processors.
    """
    try:
        import ray
    except ImportError:
        raise AthenaError("--ray needs Ray: pip install 'athena-gguf[ray]'") from None
    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a trial tells nobody
        settings |= {"num_cpus": workers or cores(), "include_dashboard": False}
    with redirect_stdout(_Notes()):
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
            progress.note(f"Ray: {len(nodes)} machines, {cluster.slots()} tasks at once of {cpus} processors")
            yield cluster
        finally:
            ray.shutdown()


def _alive(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _is_here(ray: Any, node: dict[str, Any]) -> bool:
    return bool(node["NodeManagerAddress"] == ray.util.get_node_ip_address())


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray puts a handler of its own in the place of this program's for SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


class _Notes(io.TextIOBase):
    """Ray prints on stdout that a worker died; stdout is for results."""

    def write(self, text: str) -> int:
        for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
            if line.strip():
                progress.note(line.strip())
        return len(text)
