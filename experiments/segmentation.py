"""Three networks that each find one kind of thing in pictures, merged into networks that find all three.

python experiments/segmentation.py --data ../shared/data/segmentation --run-dir runs/segmentation

Cell nuclei, skin lesions and crop plants: the base was trained on all of them, briefly; each expert is the base
fine-tuned on one. A task's score is the mean IoU of a model's masks. The four models are trained once, in a few minutes
on 2 cores, and kept in the cache.

DATA holds nuclei.npz, skin.npz and plants.npz: for each split S of train, val and test S_images, uint8
`[N, 64, 64, 3]`, and S_masks, uint8 `[N, 64, 64]` of 0 and 1.
"""

import argparse
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from cqd_jax.cli.main import in_words, make_console
from cqd_jax.run import run
from cqd_jax.store.params import load_params, save_params
from cqd_jax.tasks import TracedProblem
from cqd_jax.terminal.progress import progress
from cqd_jax.types import Params

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("nuclei", "skin", "plants")
METHODS = (
  {"use": "cycleqd", "batch_size": 4, "crossover": {"use": "linear", "std": 0.1}},
  {"use": "task_arithmetic", "name": "task arithmetic, tuned scale"},
  {"use": "cma_es", "name": "CMA-ES, per model"},
)
SPLITS = {"train": "train", "validation": "val", "test": "test"}

Split: TypeAlias = Mapping[str, Mapping[str, Any]]
"""By domain: "images", uint8 `[N, 64, 64, 3]`, and "masks", uint8 `[N, 64, 64]`."""


@dataclasses.dataclass(frozen=True)
class Recipe:
  """All that the weights depend on beside the data.

  Attributes:
    widths: channels of the U-Net at each resolution, from 32 x 32 down.
    batch: images in a step.
    base_steps: steps of the base, on all domains.
    expert_steps: steps of each expert, on its own domain.
    base_rate: peak of the base's learning rate; it warms up and decays along a cosine.
    expert_rate: of the experts'.
    seed: of the first weights and of the batches.
  """

  widths: tuple[int, ...] = (16, 32, 64)
  batch: int = 16
  base_steps: int = 80
  expert_steps: int = 300
  base_rate: float = 3e-3
  expert_rate: float = 1e-3
  seed: int = 0


class Block(nn.Module):
  """Two 3 x 3 convolutions, each normalized over groups of channels: `[N, H, W, C]` to `[N, H, W, width]`."""

  width: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """See the class."""
    for _ in range(2):
      features = nn.Conv(self.width, (3, 3), use_bias=False)(features)
      features = nn.relu(nn.GroupNorm(num_groups=4)(features))
    return features


class UNet(nn.Module):
  """A logit for each pixel of uint8 images `[N, H, W, 3]`: float32 `[N, H, W]`, positive in the foreground.

  Four neighboring pixels are one position with four times the channels, at the entrance and at the exit, which costs
  a CPU a fraction. Groups are normalized, not batches: there is no state beside the params that a merge would leave
  stale.

  Reference: Ronneberger et al. 2015, arXiv:1505.04597; smaller, and upsampled by repetition.
  """

  widths: Sequence[int]

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """See the class."""
    features, skipped = _fold(images.astype(jnp.float32) / 127.5 - 1), []
    for width in self.widths[:-1]:
      skipped.append(Block(width)(features))
      features = nn.max_pool(skipped[-1], (2, 2), (2, 2))
    features = Block(self.widths[-1])(features)
    for width, skip in zip(self.widths[-2::-1], skipped[::-1], strict=True):
      features = features.repeat(2, axis=1).repeat(2, axis=2)
      features = Block(width)(jnp.concatenate([skip, features], axis=-1))
    return _unfold(nn.Conv(4, (1, 1))(features))


def _fold(images: jax.Array) -> jax.Array:
  """`[N, H, W, C]` to `[N, H / 2, W / 2, 4 C]`."""
  n, height, width, channels = images.shape
  squares = images.reshape(n, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3)
  return squares.reshape(n, height // 2, width // 2, 4 * channels)


def _unfold(features: jax.Array) -> jax.Array:
  """`[N, H, W, 4]` to `[N, 2 H, 2 W]`."""
  n, height, width, _ = features.shape
  return features.reshape(n, height, width, 2, 2).swapaxes(2, 3).reshape(n, 2 * height, 2 * width)


def load_data(folder: Path) -> dict[str, Any]:
  """A `Split` for each of train, validation and test.

  Raises:
    FileNotFoundError: naming the files that are missing.
  """
  paths = {domain: folder / f"{domain}.npz" for domain in DOMAINS}
  if missing := [path.name for path in paths.values() if not path.is_file()]:
    raise FileNotFoundError(f"{folder}: {', '.join(missing)} not found; --data names the folder that has them")
  data: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
  for domain, path in paths.items():
    with np.load(path) as file:
      for split, name in SPLITS.items():
        data[split][domain] = {kind: file[f"{name}_{kind}"] for kind in ("images", "masks")}
  return data


def segmentation_loss(logits: jax.Array, masks: jax.Array) -> jax.Array:
  """Mean binary cross-entropy of the pixels plus mean Dice loss of the images; logits and masks `[N, H, W]`.

  Reference: Milletari et al. 2016, arXiv:1606.04797 (Dice loss; here with 1 added above and below the line).
  """
  gold, guess = masks.astype(jnp.float32), nn.sigmoid(logits)
  common, both = (gold * guess).sum((1, 2)), (gold + guess).sum((1, 2))
  return (optax.sigmoid_binary_cross_entropy(logits, gold).mean((1, 2)) + 1 - (2 * common + 1) / (both + 1)).mean()


def iou(logits: jax.Array, masks: jax.Array) -> jax.Array:
  """Intersection over union of the pixels with a positive logit and the mask: `[N, H, W]` twice to float32 `[N]`.

  Where both are empty it is 1.
  """
  guess, gold = logits > 0, masks > 0
  common, union = (guess & gold).sum((1, 2)), (guess | gold).sum((1, 2))
  return jnp.where(union > 0, common / jnp.maximum(union, 1), 1.0).astype(jnp.float32)


OPTIMIZER = optax.adamw(1.0, weight_decay=1e-2)  # the rate is an argument of the step, so that it compiles once

TrainStep: TypeAlias = Callable[[Params, Any, Any, Any, Any], tuple[Params, Any, jax.Array]]


@functools.cache
def make_train_step(model: UNet) -> TrainStep:
  """`(params, optimizer_state, images, masks, rate) -> (params, optimizer_state, loss before the step)`, compiled."""

  @jax.jit
  def train_step(
    params: Params, state: Any, images: jax.Array, masks: jax.Array, rate: jax.Array
  ) -> tuple[Params, Any, jax.Array]:
    value, gradient = jax.value_and_grad(
      lambda params: segmentation_loss(model.apply({"params": params}, images), masks)
    )(params)
    updates, state = OPTIMIZER.update(gradient, state, params)
    return optax.apply_updates(params, jax.tree.map(lambda leaf: rate * leaf, updates)), state, value

  return train_step


def train(
  name: str,
  step: TrainStep,
  params: Params,
  examples: Mapping[str, np.ndarray],
  *,
  steps: int,
  peak: float,
  recipe: Recipe,
  console: Console,
) -> Params:
  """Fits a model to images and their masks, in random batches that are each turned and mirrored at random."""
  state, source = OPTIMIZER.init(params), np.random.default_rng(recipe.seed)
  rate = jax.jit(optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps))
  with progress(console, f"training {name}", steps) as advance:
    for number in range(steps):
      rows = source.integers(len(examples["images"]), size=recipe.batch)
      turns, mirrored = source.integers(4), source.integers(2)
      images, masks = (
        np.rot90(examples[kind][rows], turns, (1, 2))[:, :, :: -1 if mirrored else 1] for kind in ("images", "masks")
      )
      params, state, loss = step(params, state, images, masks, rate(number + 1))
      advance(note=f"loss {float(loss):.3f}")
  return params


def load_or_train(
  model: UNet, data: Split, recipe: Recipe, cache: Path, console: Console
) -> tuple[Params, dict[str, Params]]:
  """The base and each domain's expert; each is kept in the cache as soon as it is trained.

  Raises:
    ValueError: if a cached file is damaged, naming it.
  """
  digest = hashlib.sha256(repr(recipe).encode())
  for domain in DOMAINS:
    for kind in ("images", "masks"):
      digest.update(data[domain][kind].tobytes())
  folder, step = cache / digest.hexdigest()[:16], make_train_step(model)

  def kept(
    name: str, start: Callable[[], Params], examples: Mapping[str, np.ndarray], steps: int, peak: float
  ) -> Params:
    path = folder / f"{name}.safetensors"
    if not path.is_file():
      fitted = train(name, step, start(), examples, steps=steps, peak=peak, recipe=recipe, console=console)
      save_params(path, fitted)
    try:
      return load_params(path)
    except ValueError as error:
      raise ValueError(f"{error}; delete it to have it made again") from error

  mixture = {kind: np.concatenate([data[domain][kind] for domain in DOMAINS]) for kind in ("images", "masks")}

  def fresh() -> Params:
    return jax.jit(model.init)(jax.random.key(recipe.seed), mixture["images"][:1])["params"]

  base = kept("base", fresh, mixture, recipe.base_steps, recipe.base_rate)
  return base, {
    domain: kept(domain, lambda: base, data[domain], recipe.expert_steps, recipe.expert_rate) for domain in DOMAINS
  }


def score(model: UNet, params: Params, data: Split) -> list[jax.Array]:
  """The IoU of each image, domain by domain: K arrays float32 `[N_k]`."""
  images, masks = (jnp.concatenate([data[domain][kind] for domain in DOMAINS]) for kind in ("images", "masks"))
  ends = np.cumsum([len(data[domain]["images"]) for domain in DOMAINS])
  return jnp.split(iou(model.apply({"params": params}, images), masks), ends[:-1])


def samples(model: UNet, params: Params, data: Split, count: int) -> Iterator[tuple[Any, ...]]:
  """Some images of each domain as one model segments them: task, prompt, gold, answer, score, pictures."""
  for domain in DOMAINS:
    images, masks = (np.asarray(data[domain][kind][:count]) for kind in ("images", "masks"))
    logits = model.apply({"params": params}, images)
    for image, mask, guess, value in zip(images, masks, np.asarray(logits) > 0, iou(logits, masks), strict=True):
      pictures = (("image", image), ("mask", mask * np.uint8(255)), ("prediction", guess * np.uint8(255)))
      yield domain, f"Where are the {domain}?", "", f"IoU {value:.2f}", float(value), pictures


def evolve(arguments: argparse.Namespace, console: Console) -> None:
  """Trains what is not in the cache, then searches among the merges."""
  recipe = Recipe(seed=arguments.seed)
  model, data = UNet(recipe.widths), load_data(arguments.data)
  base, experts = load_or_train(model, data.pop("train"), recipe, arguments.cache, console)
  run(
    problem=TracedProblem(
      functools.partial(score, model), data, task_names=DOMAINS, samples=functools.partial(samples, model)
    ),
    base=base,
    experts=list(experts.values()),
    methods=METHODS,
    budget=arguments.children,
    run_dir=arguments.run_dir,
    seed=arguments.seed,
    title="Mean IoU on the test images of each domain",
    console=console,
  )


def main() -> int:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "segmentation")
  parser.add_argument("--run-dir", type=Path, default=Path("runs/segmentation"))
  parser.add_argument("--cache", type=Path, default=Path("cache/segmentation"))
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--children", type=int, default=200, help="models that each search may score (default: 200)")
  arguments = parser.parse_args()
  return in_words(lambda: evolve(arguments, make_console()))


if __name__ == "__main__":
  sys.exit(main())
