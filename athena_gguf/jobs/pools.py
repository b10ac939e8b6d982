"""Where the jobs' processes run: on this machine, or on a Ray cluster."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, Protocol

from athena_gguf import progress
from athena_gguf.errors import AthenaError
from athena_gguf.jobs.process import Attempt, Process
from athena_gguf.jobs.spec import Job


class Pool(Protocol):
    def submit(self, job: Job) -> Future[Attempt]: ...

    def stop(self) -> None:
        """End what still runs."""


class LocalPool:
    """Up to `workers` jobs at once on this machine, each with its share of the processors."""

    def __init__(self, state: Path, workers: int) -> None:
        self._state = state
        self._threads = ThreadPoolExecutor(workers, "batch")
        self._shares: SimpleQueue[list[int]] = SimpleQueue()
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        for number in range(workers):
            self._shares.put([] if workers == 1 else cpus[number % max(1, len(cpus)) :: workers])
        self._running: set[int] = set()
        self._processes: dict[int, Process] = {}
        self._lock = Lock()
        self._stopped = False

    def submit(self, job: Job) -> Future[Attempt]:
        return self._threads.submit(self._run, job)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes.values():
                process.stop()
        self._threads.shutdown(cancel_futures=True)

    def _run(self, job: Job) -> Attempt:
        share = self._shares.get()
        process = Process(job, self._state, share)
        try:
            return process.run(self._started)
        finally:
            with self._lock:
                self._processes.pop(id(process), None)
            self._shares.put(share)

    def _started(self, process: Process) -> None:
        with self._lock:
            self._processes[id(process)] = process
            if self._stopped:
                process.stop()


class RayPool:
    """Jobs as tasks of a Ray cluster whose machines share the folders of the batch.

    `address`: of the cluster, or "local" for a cluster of `workers` workers on this machine. On a real cluster a job
    takes the processors of the smallest machine, and a GPU where there are any. Raises AthenaError if Ray is not
    installed or the cluster cannot be reached.
    """

    def __init__(self, state: Path, workers: int, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise AthenaError("--ray needs Ray: pip install 'athena-gguf[ray]'") from None
        self._ray, self._state = ray, state
        quiet: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False, "logging_level": logging.ERROR}
        try:
            if address == "local":
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a trial tells nobody
                ray.init(address="local", num_cpus=workers, **quiet)
            else:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # whatever a wrong address makes Ray raise
            raise AthenaError(f"--ray {address}: cannot reach the cluster: {error}") from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = 1 if address == "local" else min(node.get("CPU", 1) for node in nodes)
        gpus = 1 if address != "local" and any(node.get("GPU") for node in nodes) else 0
        progress.note(f"Ray: {len(nodes)} machines, {cpus:g} processors a job")
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_attempt)
        self._refs: list[Any] = []

    def submit(self, job: Job) -> Future[Attempt]:
        reference = self._task.remote(job, str(self._state))
        self._refs.append(reference)
        future: Future[Attempt] = Future()

        def deliver(inner: Future[Attempt]) -> None:
            error = inner.exception()
            if error is None:
                future.set_result(inner.result())
            elif isinstance(error, self._ray.exceptions.RayTaskError):
                future.set_exception(error)
            else:  # the worker died, or its machine
                future.set_result(Attempt(0.0, message=f"its worker was lost: {_first_line(error)}", killed=True))

        reference.future().add_done_callback(deliver)
        return future

    def stop(self) -> None:
        for reference in self._refs:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()


def _attempt(job: Job, state: str) -> Attempt:
    return Process(job, Path(state)).run()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
