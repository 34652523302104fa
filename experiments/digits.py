"""Two networks that know five handwritten digits each, merged into networks that know all ten.

python experiments/digits.py --run-dir runs/digits

The base has seen all digits, briefly. Each expert was fine-tuned on five of them and has forgotten the others. Training
takes a few seconds on a CPU. A domain of your own needs no more than this: params, and a `score` that JAX can trace.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from sklearn.datasets import load_digits  # scikit-learn comes with QDax

from cqd_jax.cli.main import in_words, make_console
from cqd_jax.run import run
from cqd_jax.tasks import TracedProblem
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


def main() -> int:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--run-dir", type=Path, default=Path("runs/digits"))
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--children", type=int, default=400, help="models that each search may score (default: 400)")
  arguments = parser.parse_args()
  return in_words(lambda: evolve(arguments.run_dir, arguments.seed, arguments.children, make_console()))


if __name__ == "__main__":
  sys.exit(main())
