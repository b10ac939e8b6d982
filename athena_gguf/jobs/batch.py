"""Runs the jobs: one after the other within a model, models side by side; a killed job is started once more."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path

from athena_gguf import progress
from athena_gguf.errors import AthenaError
from athena_gguf.jobs import state
from athena_gguf.jobs.pools import LocalPool, Pool, RayPool
from athena_gguf.jobs.process import Attempt
from athena_gguf.jobs.report import BatchReport, JobReport, Status
from athena_gguf.jobs.spec import Batch, Job, read_batch
from athena_gguf.lock import locked

_DRAWN_SECONDS, _LINE_SECONDS = 2.0, 30.0  # between two looks at what jobs do, for a bar's text and for a line
ATTEMPTS = 2  # of a job that was killed, or whose machine was lost


def run_batch(path: Path, *, workers: int | None = None, ray: str | None = None) -> BatchReport:
    """Make every file that the file of jobs `path` asks for, except those that were made before with the same settings
    and are still there.

    `ray`: address of a Ray cluster to run on, or "local" for one of `workers` workers on this machine. `workers`:
    models at once, None for one on this machine and as many as a cluster takes. Goes on after a job fails.
    Raises AthenaError if the file of jobs is wrong, a folder cannot be written, or the cluster is not there.
    """
    batch = read_batch(path)
    try:
        batch.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AthenaError(f"{batch.out}: {error.strerror}; choose another folder with out =") from error
    with locked(batch.state, "out ="):
        kept = {job.name: result for job in batch.jobs if (result := state.finished(batch.state, job)) is not None}
        reports = {name: _report(batch, name, "kept", 0, [], kept[name]) for name in kept}
        to_do = [job for job in batch.jobs if job.name not in kept]
        if kept:
            progress.note(f"{len(kept)} of {len(batch.jobs)} files are there already")
        if ray is None and any(job.spread for job in to_do):
            progress.note("spread = true does nothing without --ray: there are no other machines")
        if to_do:
            limit = workers or (1 if ray in (None, "local") else len(to_do))
            pool: Pool = LocalPool(batch.state, limit) if ray is None else RayPool(batch.state, limit, ray)
            try:
                reports |= _run(batch, to_do, pool, limit)
            finally:
                pool.stop()
        report = BatchReport(tuple(reports[job.name] for job in batch.jobs))
        _write(batch.state / "report.json", report)
        if not batch.keep_work and report.ok:
            shutil.rmtree(batch.work, ignore_errors=True)
        return report


def _run(batch: Batch, jobs: list[Job], pool: Pool, limit: int) -> dict[str, JobReport]:
    """One job of every model at a time, up to `limit` models, and one job that is spread for every machine."""
    queues: dict[str, deque[Job]] = {}
    for job in jobs:
        queues.setdefault(job.group, deque()).append(job)
    attempts: dict[str, list[Attempt]] = {job.name: [] for job in jobs}
    reports: dict[str, JobReport] = {}
    waiting = deque(queues.values())
    running: dict[Future[Attempt], Job] = {}

    def begin() -> None:
        """Every job that there is room for, in order."""
        for queue in list(waiting):
            if len(running) >= limit:
                return
            job = queue[0]
            if job.spread is None:
                alone = bool(job.settings.get("sequential"))  # on one machine
                job = replace(job, spread=not alone and pool.spreads(len(running) + len(waiting)))
            spread = sum(bool(other.spread) for other in running.values())
            if job.spread and spread >= max(1, pool.machines()):
                continue
            waiting.remove(queue)
            running[pool.submit(job)] = job

    begin()
    name = f"batch of {len(jobs)} jobs"
    with progress.bar(name, len(jobs)) as advance:
        while running:
            pause = _DRAWN_SECONDS if progress.drawn() else _LINE_SECONDS
            ended = wait(running, timeout=pause, return_when=FIRST_COMPLETED).done
            if not ended:
                progress.tell(name, "; ".join(state.doing(batch.state, job) for job in running.values()))
            for future in ended:
                job = running.pop(future)
                made = attempts[job.name]
                made.append(future.result())
                last = made[-1]
                if last.killed and len(made) < ATTEMPTS:
                    progress.note(f"warning: {job.name}: {last.message}; it is started once more")
                    running[pool.submit(job)] = job
                    continue
                status: Status = "done" if last.result is not None else "killed" if last.killed else "failed"
                if last.result is not None:
                    state.remember(batch.state, job, last.result)
                    progress.note(f"{job.name}: done in {last.seconds:.1f} s")
                else:
                    progress.note(f"warning: {job.name}: {last.message}")
                reports[job.name] = _report(batch, job.name, status, len(made), made, last.result)
                advance(1)
                queue = queues[job.group]
                queue.popleft()
                if queue:
                    waiting.appendleft(queue)
                begin()
    return reports


def _report(
    batch: Batch, name: str, status: Status, count: int, attempts: list[Attempt], result: dict[str, object] | None
) -> JobReport:
    job = next(job for job in batch.jobs if job.name == name)
    return JobReport(
        name=name,
        model=job.model,
        file=job.out,
        status=status,
        message=attempts[-1].message if attempts else "",
        attempts=count,
        seconds=sum(attempt.seconds for attempt in attempts),
        result=result,
        log=str(state.log_file(batch.state, job)),
    )


def _write(path: Path, report: BatchReport) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    os.replace(new, path)
