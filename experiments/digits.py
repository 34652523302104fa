"""Two networks that know five handwritten digits each, merged into networks that know all ten.

python experiments/digits.py --run-dir runs/digits

The base has seen all digits, briefly. Each expert was fine-tuned on five of them and has forgotten the others. Training
takes a few seconds on a CPU. A domain of your own needs no more than this: params, and a `score` that JAX can trace.

python experiments/digits.py --method m2n2 [--pre-trained]

is another experiment, that of M2N2's authors (arXiv:2508.16204, github SakanaAI/natural_niches): networks with one
hidden layer evolve from two random ones, or from two that were trained briefly on five digits each. 50,000 children
(10,000 of trained ones) are scored on all images for training; of the member that reads most of these the accuracy on
the last fifth of the images is shown, mean and standard deviation over the runs. Nothing is written to disk.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits  # scikit-learn comes with QDax

from cqd_jax.cli.main import in_words, make_console
from cqd_jax.config.plugs import Plug, resolve
from cqd_jax.genotypes.space import dense_space, take
from cqd_jax.run import run
from cqd_jax.search import Algorithm, SearchContext
from cqd_jax.tasks import Scored, TracedProblem
from cqd_jax.terminal.progress import progress
from cqd_jax.types import Params

TASKS = ("digits 0-4", "digits 5-9")
HELD_OUT, IN_ALL = 200, 896  # images of each task: for validation and again for test; the rest is for training
BATCH = 64
METHODS = (
  {"use": "cycleqd", "batch_size": 8, "crossover": {"use": "linear", "std": 0.1}},
  {"use": "task_arithmetic", "name": "task arithmetic, tuned scale"},
  {"use": "cma_es", "name": "CMA-ES, per kernel", "genotype": {"use": "coefficients", "granularity": "kernel"}},
)

SEARCHES = {
  "m2n2": {"use": "m2n2"},
  "ga": {"use": "m2n2", "alpha": 0.0, "attracted": False},
  "cycleqd": {
    "use": "cycleqd",
    "batch_size": 1,
    "crossover": "split_slerp",
    "cells": {"use": "grid", "shape": 15, "lower": 0.0, "upper": 1.0},
  },
}
"""What --method names. Of cycleqd the archives are for the digits 0-4 and 5-9, and the crossover is that of M2N2."""
SHAPES = ((64, 256), (256,), (256, 10), (10,))
SIZES = [int(np.prod(shape)) for shape in SHAPES]
FIRST_SEED, MARKS = 42, 10


class Perceptron(nn.Module):
  """Logits `[..., 10]` of images `[..., 64]`."""

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """See the class."""
    for _ in range(2):
      features = nn.relu(nn.Dense(64)(features))
    return nn.Dense(10)(features)


MODEL, OPTIMIZER = Perceptron(), optax.adam(1e-3)


def load_data() -> dict[str, dict[str, np.ndarray]]:
  """Train, validation and test, always the same: images `[K, B, 64]` from 0 to 1 and labels `[K, B]`."""
  images, labels = load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(labels))
  by_task = np.stack([order[labels[order] // 5 == task][:IN_ALL] for task in range(len(TASKS))])
  images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
  parts = zip(("validation", "test", "train"), np.split(by_task, [HELD_OUT, 2 * HELD_OUT], axis=1), strict=True)
  return {split: {"images": images[rows], "labels": labels[rows]} for split, rows in parts}


@jax.jit
def train_step(params: Params, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Params, Any, jax.Array]:
  """One step on the mean cross-entropy of a batch; gives the loss before it."""

  def loss(params: Params) -> jax.Array:
    logits = MODEL.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  value, gradient = jax.value_and_grad(loss)(params)
  updates, state = OPTIMIZER.update(gradient, state)
  return optax.apply_updates(params, updates), state, value


def train(name: str, params: Params, data: dict[str, np.ndarray], steps: int, seed: int, console: Console) -> Params:
  """Fits a model to images `[B, 64]` and their labels, in random batches."""
  state, source = OPTIMIZER.init(params), np.random.default_rng(seed)
  with progress(console, f"training {name}", steps) as advance:
    for _ in range(steps):
      batch = source.integers(len(data["labels"]), size=BATCH)
      params, state, loss = train_step(params, state, data["images"][batch], data["labels"][batch])
      advance(note=f"loss {float(loss):.3f}")
  return params


def train_all(
  data: dict[str, np.ndarray], seed: int, console: Console, *, base_steps: int = 40, expert_steps: int = 300
) -> tuple[Params, list[Params]]:
  """The base, which has seen a little of both tasks, and an expert for each."""
  both = {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in data.items()}
  fresh = MODEL.init(jax.random.key(seed), both["images"][:1])["params"]
  base = train("the base", fresh, both, base_steps, seed, console)
  halves = {task: {name: leaf[k] for name, leaf in data.items()} for k, task in enumerate(TASKS)}
  return base, [train(f"expert {task}", base, half, expert_steps, seed, console) for task, half in halves.items()]


def score(params: Params, data: dict[str, jax.Array]) -> jax.Array:
  """1 for each image that the model reads right, else 0: float32 `[K, B]`."""
  answers = MODEL.apply({"params": params}, data["images"]).argmax(-1)
  return (answers == data["labels"]).astype(jnp.float32)


def samples(params: Params, data: dict[str, jax.Array], count: int) -> Iterator[tuple[Any, ...]]:
  """Some images of each task as one model reads them: task, prompt, gold, answer, score, pictures."""
  answers = MODEL.apply({"params": params}, data["images"]).argmax(-1)
  for k, task in enumerate(TASKS):
    for image, label, answer in zip(data["images"][k, :count], data["labels"][k], answers[k], strict=False):
      picture = np.kron(np.asarray(image).reshape(8, 8) * 255, np.ones((8, 8))).astype(np.uint8)
      yield task, "Which digit?", str(label), str(answer), float(label == answer), (("digit", picture),)


def evolve(run_dir: Path, seed: int, children: int, console: Console) -> None:
  """Trains the models, then searches among their merges."""
  data = load_data()
  base, experts = train_all(data.pop("train"), seed, console)
  run(
    problem=TracedProblem(score, data, task_names=TASKS, samples=samples),
    base=base,
    experts=experts,
    methods=METHODS,
    budget=children,
    run_dir=run_dir,
    seed=seed,
    title=f"Share of {HELD_OUT} test images per task read right",
    console=console,
  )


def flat_logits(params: Params, images: jax.Array) -> jax.Array:
  """Logits `[B, 10]` of images `[B, 64]`; the params are one vector, in which M2N2 splits: two kernels with biases."""
  parts = jnp.split(params, np.cumsum(SIZES)[:-1])
  first, first_bias, second, second_bias = (part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True))
  hidden = nn.relu(images @ first + first_bias[None])
  second = jnp.pad(second, ((0, 0), (0, 6)))  # a CPU multiplies by 16 columns in half the time that 10 take
  return (hidden @ second)[:, :10] + second_bias[None]


def flat_score(params: Params, data: dict[str, jax.Array]) -> list[jax.Array]:
  """1 for each image that is read right, else 0: float32 `[B_k]` of each task. Those of the first come first."""
  right = flat_logits(params, data["images"]).argmax(-1) == data["labels"]
  num_first = data["starts"].shape[0]
  return [right[:num_first].astype(jnp.float32), right[num_first:].astype(jnp.float32)]


def authors_data() -> dict[str, dict[str, np.ndarray]]:
  """The authors' splits: images `[B, 64]` from 0 to 16 in the order of their tasks, and labels `[B]`.

  The first four fifths of the images are for training, and so for the search, the others for the test. "starts" is as
  long as there are images of the first task.
  """
  images, labels = load_digits(return_X_y=True)
  cut = int(0.8 * len(labels))
  data = {}
  for split, rows in (("validation", slice(None, cut)), ("test", slice(cut, None))):
    order = np.argsort(labels[rows] // 5, kind="stable")
    own = labels[rows][order].astype(np.int32)
    data[split] = {"images": images[rows][order].astype(np.float32), "labels": own, "starts": np.zeros((own < 5).sum())}
  return data


def two_networks(key: jax.Array, data: dict[str, np.ndarray], pre_trained: bool) -> jax.Array:
  """Random params `[2, 19210]`; or the same after ten steps, each on all images of one task."""
  fresh = 0.01 * jnp.stack([jax.random.normal(own, (sum(SIZES),)) for own in jax.random.split(key)])
  if not pre_trained:
    return fresh

  @jax.jit
  def trained(params: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    def loss(params: jax.Array) -> jax.Array:
      return optax.softmax_cross_entropy_with_integer_labels(flat_logits(params, images), labels).mean()

    optimizer = optax.adam(3e-3)

    def step(carry: Any, _: None) -> tuple[Any, None]:
      updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
      return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), None, length=10)[0][0]

  halves = [data["labels"] // 5 == task for task in range(len(TASKS))]
  return jnp.stack([trained(fresh[k], data["images"][rows], data["labels"][rows]) for k, rows in enumerate(halves)])


def make_search(name: str, pre_trained: bool, passes: int) -> Algorithm:
  """A search for vectors; networks that were trained are merged and not mutated."""
  mutation = "none" if pre_trained else {"use": "gaussian", "std": 0.01}
  plug = Plug.parse({**SEARCHES[name], "mutation": mutation})
  zeros = jnp.zeros(sum(SIZES))
  space = dense_space(zeros, jnp.zeros((2, *zeros.shape)))  # the base is 0, so params are task vectors
  return resolve("methods", plug, name)(SearchContext(space, lambda _, make: make(), TASKS, passes))


def make_run(
  algorithm: Algorithm, problem: TracedProblem, passes: int
) -> Callable[[jax.Array, jax.Array], list[float]]:
  """`(key, networks) -> test accuracies`, one after each of MARKS parts of a search; each part is one scan."""
  space = algorithm.space

  def one(state: Any, key: jax.Array) -> tuple[Any, None]:
    children, info = algorithm.ask(state, key)
    values = problem.traced_values("validation", children, space)
    return algorithm.tell(state, children, Scored(values), info)[0], None

  advance = jax.jit(lambda state, keys: jax.lax.scan(one, state, keys)[0], donate_argnums=0)

  def search(key: jax.Array, networks: jax.Array) -> list[float]:
    *parts, init_key = jax.random.split(key, MARKS + 1)
    state, accuracies = algorithm.init(init_key, networks, problem.score("validation", networks, space)), []
    for part in parts:
      state = advance(state, jax.random.split(part, passes // MARKS))
      population = algorithm.population(state)
      best = np.nanmean(population.values, axis=(1, 2)).argmax()
      values = problem.score("test", take(population.genotypes, best[None]), space).values
      accuracies.append(float(np.nanmean(values)))
    return accuracies

  return search


def compare_with_authors(name: str, pre_trained: bool, passes: int, runs: int, console: Console) -> np.ndarray:
  """Searches as often as asked, as many at a time as there are CPUs; prints and returns accuracies `[runs, MARKS]`."""
  data = authors_data()
  problem = TracedProblem(flat_score, data, task_names=TASKS)
  search = make_run(make_search(name, pre_trained, passes), problem, passes)
  trained = two_networks(jax.random.key(FIRST_SEED), data["validation"], True) if pre_trained else None  # once for all

  def run_one(seed: int) -> list[float]:
    key, own = jax.random.split(jax.random.key(seed))
    return search(key, two_networks(own, data["validation"], False) if trained is None else trained)

  started, found = time.perf_counter(), []
  with (
    progress(console, name, runs) as advance,
    ThreadPoolExecutor(min(runs, os.cpu_count() or 1)) as pool,
  ):
    for accuracies in pool.map(run_one, range(FIRST_SEED, FIRST_SEED + runs)):
      found.append(accuracies)
      advance(note=f"accuracy {accuracies[-1]:.3f}")
  seconds = (time.perf_counter() - started) / runs
  table = Table("forward passes", f"{name}: test accuracy, %", title=f"{runs} runs, {seconds:.1f} s each")
  for mark, column in enumerate(100 * np.array(found).T, start=1):
    table.add_row(f"{mark * (passes // MARKS):,}", f"{column.mean():.1f} ±{column.std():.1f}")
  console.print(table)
  return np.array(found)


def main() -> int:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--run-dir", type=Path, default=Path("runs/digits"))
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--children", type=int, help="models that each search may score (default: 400; see --method)")
  parser.add_argument("--method", choices=SEARCHES, help="the experiment of the authors of M2N2 (50,000 children)")
  parser.add_argument("--pre-trained", action="store_true", help="with --method: of trained networks (10,000 children)")
  parser.add_argument("--runs", type=int, default=10, help="with --method: how often (default: 10)")
  given = parser.parse_args()
  if given.method is None:
    return in_words(lambda: evolve(given.run_dir, given.seed, given.children or 400, make_console()))
  passes = given.children or (10_000 if given.pre_trained else 50_000)
  if passes < MARKS or given.runs < 1:
    parser.error(f"with --method: expected at least {MARKS} children and 1 run, got {passes} and {given.runs}")
  return in_words(lambda: compare_with_authors(given.method, given.pre_trained, passes, given.runs, make_console()))


if __name__ == "__main__":
  sys.exit(main())
