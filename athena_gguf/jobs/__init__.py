"""Batches: many conversions from one file of jobs, each in a process of its own (docs/batch.md)."""

from athena_gguf.jobs.batch import run_batch
from athena_gguf.jobs.report import BatchReport, JobReport
from athena_gguf.jobs.spec import Batch, Job, read_batch

__all__ = ["Batch", "BatchReport", "Job", "JobReport", "read_batch", "run_batch"]
