"""Where the jobs' processes run: on this machine, or on a Ray cluster."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, Protocol

from athena_gguf.cluster import check_package, connected, first_line, package, task_error
from athena_gguf.jobs.process import Attempt, Process
from athena_gguf.jobs.spec import Job


class Pool(Protocol):
    def spreads(self, models: int) -> bool:
        """Whether a job is best encoded by several machines while so many models are not finished."""

    def machines(self) -> int:
        """How many there are, each of which has room for one job that is spread."""

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

    def spreads(self, models: int) -> bool:
        return False

    def machines(self) -> int:
        return 1

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

    A job takes the processors of the smallest machine, and a GPU where there are any. One that is spread
    (`Job.spread`) takes no processors, and its encoding those of all machines; of such jobs a machine has one.
    `address`, `workers`: as of athena_gguf.cluster.connected, which says what is raised.
    """

    def __init__(self, state: Path, workers: int, address: str) -> None:
        self._connection, self._state = ExitStack(), state
        self._cluster = self._connection.enter_context(connected(address, workers))
        self._ray = self._cluster.ray
        self._refs: list[Any] = []
        self._spread: dict[Any, str] = {}  # the machines of running jobs that are spread

    def spreads(self, models: int) -> bool:
        return not self._cluster.gpus and models < self.machines()

    def machines(self) -> int:
        return len(self._cluster.machines())

    def submit(self, job: Job) -> Future[Attempt]:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        settings: dict[str, Any] = {"num_cpus": self._cluster.cpus, "num_gpus": self._cluster.gpus, "max_retries": 0}
        machine = self._free_machine() if job.spread else None
        if machine is not None:
            # Processors that it held could not encode, and if every machine held one, none could.
            placed = NodeAffinitySchedulingStrategy(machine, soft=True)
            settings |= {"num_cpus": 0, "scheduling_strategy": placed}
        task = self._ray.remote(**settings)(_attempt)
        reference = task.remote(package(), asdict(job), str(self._state))
        self._refs.append(reference)
        if machine is not None:
            self._spread[reference] = machine
        future: Future[Attempt] = Future()

        def deliver(inner: Future[Attempt]) -> None:
            self._spread.pop(reference, None)
            error = inner.exception()
            if error is None:
                future.set_result(inner.result())
            elif isinstance(error, self._ray.exceptions.RayTaskError):
                future.set_result(Attempt(0.0, message=str(task_error(job.name, error))))
            else:  # the worker died, or its machine
                future.set_result(Attempt(0.0, message=f"its worker was lost: {first_line(error)}", killed=True))

        reference.future().add_done_callback(deliver)
        return future

    def _free_machine(self) -> str | None:
        """The one with the fewest jobs that are spread; None if all machines are gone."""
        held = Counter(list(self._spread.values()))
        return min(self._cluster.machines(), key=lambda machine: held[machine], default=None)

    def stop(self) -> None:
        for reference in self._refs:
            self._ray.cancel(reference, force=True)
        self._connection.close()


def _attempt(sent: tuple[str, int], fields: dict[str, Any], state: str) -> Attempt:
    """On a worker, whose cluster a job that is spread reaches under the address that this machine knows."""
    check_package(sent)
    job = Job(**fields)
    if job.spread:
        import ray

        job = replace(job, settings=job.settings | {"ray": ray.get_runtime_context().gcs_address})
    return Process(job, Path(state)).run()
