"""Toy problems for tests of the loop, plain and traced, and runs of one method or several in a folder."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from cqd_jax.config.settings import OutputSettings
from cqd_jax.genotypes.space import dense_space
from cqd_jax.run.artifacts import ParamsWriter
from cqd_jax.run.context import RunContext
from cqd_jax.run.files import SCRIPT, make_run_dir, open_run
from cqd_jax.run.loop import Loop
from cqd_jax.run.methods import as_methods
from cqd_jax.store.history import History
from cqd_jax.tasks import Scored, TracedProblem
from cqd_jax.terminal.interrupt import Interrupt

NAMES = ("left", "right")
SHAPE = (6, 4)
THRESHOLDS = np.linspace(-0.6, 0.6, 8, dtype=np.float32)


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BASE = {"Dense_0": {"kernel": draw(0, *SHAPE), "bias": np.zeros(SHAPE[1:], np.float32)}}
CHANGES = {"Dense_0": {"kernel": draw(1, 2, *SHAPE), "bias": draw(2, 2, SHAPE[1])}}
"""The task vectors of two experts."""


def verdicts(kernel, bias):
  """[K, B] = [2, 8] verdicts. They compare single weights, so that NumPy and JAX agree to the bit."""
  return [kernel[:4].reshape(-1)[:8] > THRESHOLDS + bias[0], kernel[2:].reshape(-1)[:8] < THRESHOLDS + bias[1]]


class PowerCut(Exception):
  """The end of a session that could not say good-bye."""


class Plain:
  """The problem in NumPy, with a count of whom it was asked; the power is cut at the given call.

  Attributes:
    asked: of each call the split and how many individuals.
  """

  task_names = NAMES

  def __init__(self, cut_at=None, version="1", samples=()):
    self.cut_at = cut_at
    self.version = version
    self.asked = []
    self._samples = samples

  def fingerprint(self, split):
    return f"questions={split} grader={self.version}"

  def score(self, split, individuals, space):
    params = jax.tree.map(np.asarray, space.materialize(individuals))["Dense_0"]
    self.asked.append((split, len(params["kernel"])))
    if self.cut_at is not None and len(self.asked) >= self.cut_at:
      raise PowerCut
    rows = [verdicts(*each) for each in zip(params["kernel"], params["bias"], strict=True)]
    return Scored(np.array(rows, np.float32), 0.25)

  def samples(self, split, individual, space, count):
    return self._samples


def traced():
  """The same problem as JAX traces it."""

  def score(params, data):
    del data
    return jnp.stack(verdicts(params["Dense_0"]["kernel"], params["Dense_0"]["bias"]))

  nothing = np.zeros(1)
  return TracedProblem(score, {"validation": nothing, "test": nothing}, task_names=NAMES, batch_size=4)


METHODS = {
  "cycleqd": {"use": "cycleqd", "batch_size": 4},
  "cma_es": {"use": "cma_es", "batch_size": 4, "genotype": {"use": "coefficients", "granularity": "kernel"}},
  "nsga2": {"use": "nsga2", "batch_size": 4, "population_size": 6},
  "random_search": {"use": "random_search", "batch_size": 4},
  "task_arithmetic": {"use": "task_arithmetic", "scales": [0.2, 0.4, 0.6, 0.8, 1.0]},
}


def method_of(plug):
  (method,) = as_methods([plug])
  return method


def root_space(num_experts=2):
  changes = jax.tree.map(lambda leaf: jnp.asarray(np.concatenate([leaf] * 2)[:num_experts]), CHANGES)
  return dense_space(jax.tree.map(jnp.asarray, BASE), changes)


@contextlib.contextmanager
def run_context(path, problem, *, budget=18, seed=0, interrupt=None, **output):
  """The context of a run in a folder, which is made or opened."""
  files = open_run(path) if path.exists() else make_run_dir(path, SCRIPT, {}, "")
  settings = {"tensorboard": False, "checkpoint_every": 2, **output}
  with History(files.history, problem.task_names) as history:
    yield RunContext(
      files=files,
      console=Console(quiet=True),
      problem=problem,
      root=root_space(),
      history=history,
      interrupt=interrupt or Interrupt(),
      output=OutputSettings(**settings),
      seed=seed,
      budget=budget,
      swarm_sizes=(2,),
      expert_names=NAMES,
      writer=ParamsWriter(),
      parents={},
    )


def search(path, problem, *plugs, **settings):
  """Runs methods one after the other in a folder; returns what each came to."""
  with run_context(path, problem, **settings) as context:
    return [Loop(context, method_of(plug)).run() for plug in plugs]


def told(path, method):
  """What the history tells of a method, but for the seconds."""
  with History(path / "history.sqlite") as history:
    people, metrics = history.individuals(method), history.metrics(method)
  return {
    "born": people.born,
    "archive": people.archive,
    "parents": people.parents,
    "scores": people.scores,
    "taken": people.taken,
    "mutation": np.array(people.mutation),
    "notes": [{name: np.asarray(value) for name, value in sorted(note.items())} for note in people.notes],
    "metrics": {name: figure for name, figure in metrics.items() if name != "seconds"},
  }


def equal(one, other):
  """Raises unless both are the same to the bit; NaN is NaN."""
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)
