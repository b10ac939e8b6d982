"""What became of every job, as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["done", "kept", "failed", "killed"]


@dataclass(frozen=True)
class JobReport:
    """`status`: done; kept, as it was made before with the same settings; failed; or killed, twice. `message`: why.
    `result`: the fields of the conversion's result (athena_gguf.summary.Result), None without one. `attempts`: made in
    this run, `seconds`: of all of them."""

    name: str
    model: str
    file: str
    status: Status
    message: str
    attempts: int
    seconds: float
    result: dict[str, Any] | None
    log: str


@dataclass(frozen=True)
class BatchReport:
    jobs: tuple[JobReport, ...]

    @property
    def ok(self) -> bool:
        """Whether every file is there."""
        return all(job.status in ("done", "kept") for job in self.jobs)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "jobs": [asdict(job) for job in self.jobs]}

    def table(self) -> str:
        """A line a job, then why jobs failed, then the sums."""
        rows = [["job", "status", "MiB", "bits a weight", "predicted KLD", "seconds", "attempts"]]
        for job in self.jobs:
            cells = ["-", "-", "-"]
            if job.result is not None:
                kld = job.result["predicted_kld"]
                cells = [f"{job.result['bytes'] / 2**20:.1f}", f"{job.result['bpw']:.3f}", f"{kld:.4g}" if kld else "-"]
            rows.append([job.name, job.status, *cells, f"{job.seconds:.1f}", str(job.attempts)])
        width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        left = (0, 1)
        lines = [
            "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, width, strict=True)))
            for row in rows
        ]
        lines += [f"{job.name}: {job.message}; log: {job.log}" for job in self.jobs if job.result is None]
        counts = Counter(job.status for job in self.jobs)
        lines.append(", ".join(f"{counts[s]} {s}" for s in ("done", "kept", "failed", "killed") if counts[s]))
        return "\n".join(line.rstrip() for line in lines)
