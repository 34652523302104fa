"""The durable loop: score, search, record, checkpoint, resume, compare, report. `run` is for scripts."""

from cqd_jax.run.context import Method
from cqd_jax.run.script import run
from cqd_jax.run.stages import Result

__all__ = ["Method", "Result", "run"]
