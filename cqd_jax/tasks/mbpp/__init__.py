"""MBPP as a task."""

from cqd_jax.tasks.mbpp.task import Mbpp, mbpp

__all__ = ["Mbpp", "mbpp"]
