"""DBBench, the database task of AgentBench: questions about a table, worked on by SQL."""

from cqd_jax.tasks.dbbench.answers import is_right
from cqd_jax.tasks.dbbench.episode import DBBench, gold_turns
from cqd_jax.tasks.dbbench.samples import Sample, Table, read_samples

__all__ = ["DBBench", "Sample", "Table", "gold_turns", "is_right", "read_samples"]
