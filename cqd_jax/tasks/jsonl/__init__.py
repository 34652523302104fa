"""A user's own questions from a file, judged by a rule."""

from cqd_jax.tasks.jsonl.task import Questions, jsonl

__all__ = ["Questions", "jsonl"]
