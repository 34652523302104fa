"""Tasks: what a model is judged by."""

from cqd_jax.tasks.execution import Execute, Harness, Job, Outcome
from cqd_jax.tasks.task import Example, Split, Task, grade, grade_population

__all__ = ["Example", "Execute", "Harness", "Job", "Outcome", "Split", "Task", "grade", "grade_population"]
