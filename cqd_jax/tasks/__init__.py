"""What a model is judged by: problems, and the tasks and episodes that text problems are made of."""

from cqd_jax.tasks.episode import Answer, Engine, Episode, FromData, Message, Request
from cqd_jax.tasks.execution import Execute, Harness, Job, Outcome, Service
from cqd_jax.tasks.problem import Problem, Sample, Scored, TrainingSignal, Transcript, Usage, Verified, task_scores
from cqd_jax.tasks.task import Example, Split, Task, grade, grade_population
from cqd_jax.tasks.text import TextProblem
from cqd_jax.tasks.traced import TracedProblem

__all__ = [
  "Answer",
  "Engine",
  "Episode",
  "Example",
  "Execute",
  "FromData",
  "Harness",
  "Job",
  "Message",
  "Outcome",
  "Problem",
  "Request",
  "Sample",
  "Scored",
  "Service",
  "Split",
  "Task",
  "TextProblem",
  "TracedProblem",
  "TrainingSignal",
  "Transcript",
  "Usage",
  "Verified",
  "grade",
  "grade_population",
  "task_scores",
]
