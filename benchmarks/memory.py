"""`python -m benchmarks memory`: from shapes alone, what evolving a swarm in core space needs of device memory."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from cqd_jax.genotypes import CoreBasis
from cqd_jax.low_rank import LowRank
from cqd_jax.models import DecoderConfig, init_params, unstack_layers
from cqd_jax.tasks.skills.training import MINIATURE
from cqd_jax.trees import is_matrix, map_with_path, num_parameters
from cqd_jax.types import Params

MODELS = {
  "miniature": MINIATURE,
  "llama3.2-1b": DecoderConfig(128_256, 2048, 8192, 16, 32, 8, 64, tie_embeddings=True),
  "llama3-8b": DecoderConfig(128_256, 4096, 14_336, 32, 32, 8, 128),
  "llama3-70b": DecoderConfig(128_256, 8192, 28_672, 80, 64, 8, 128),
  "mistral-7b": DecoderConfig(32_768, 4096, 14_336, 32, 32, 8, 128),
  "qwen2.5-7b": DecoderConfig(152_064, 3584, 18_944, 28, 28, 4, 128, qkv_bias=True),
  "qwen3-8b": DecoderConfig(151_936, 4096, 12_288, 36, 32, 8, 128, qk_norm=True),
}
"""Shapes of published models."""

WIDTH = 120
"""Columns of the table where it does not go to a terminal."""

USABLE = 0.9
"""The share of a device's memory that is counted on."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be held at the same time.

  Attributes:
    model: a name of `MODELS`.
    rank: of each expert's task vector of each matrix.
    experts: K.
    elites: individuals in the archives.
    population: P, children decoded side by side.
    prompts: B, prompts decoded side by side for each child.
    prompt_tokens: of a prompt, at most.
    answer_tokens: of an answer, at most.
    dtype: of weights and caches.
    embeddings: whether the experts changed embedding and head too.
  """

  model: str
  rank: int
  experts: int
  elites: int
  population: int
  prompts: int
  prompt_tokens: int
  answer_tokens: int
  dtype: str
  embeddings: bool


def shapes(plan: Plan) -> CoreBasis:
  """The basis with shapes in the place of arrays; nothing is allocated. The base's layers are a list, so that decoding
  needs no copy of them (`unstack_layers`)."""

  def make(key: jax.Array) -> Params:
    return unstack_layers(init_params(key, MODELS[plan.model], jnp.dtype(plan.dtype)))

  base = jax.eval_shape(make, jax.random.key(0))

  def update(path: tuple[str, ...], leaf: Any) -> LowRank | None:
    if not is_matrix(path, leaf) or (path[0] != "layers" and not plan.embeddings):
      return None
    *stack, rows, columns = leaf.shape
    rank = min(plan.rank, rows, columns)
    b, a = (jax.ShapeDtypeStruct((*stack, *shape), leaf.dtype) for shape in ((rows, rank), (rank, columns)))
    return LowRank(b, a)  # type: ignore[arg-type]

  expert = map_with_path(update, base)
  # None is no leaf, so the trees of experts pass through `eval_shape` as they are.
  return jax.eval_shape(CoreBasis.from_experts, base, [expert] * plan.experts)


def num_bytes(plan: Plan) -> dict[str, int]:
  """Bytes of each part, by name."""
  basis, config = shapes(plan), MODELS[plan.model]
  elite = _num_bytes(basis.experts) // plan.experts
  size = jnp.dtype(plan.dtype).itemsize
  a_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size
  tokens = plan.prompt_tokens + plan.answer_tokens
  scores = 2 * 4 * config.num_heads * plan.prompt_tokens**2  # before and after the softmax, float32
  activations = size * plan.prompt_tokens * (3 * config.intermediate_size + 2 * config.hidden_size)
  rows = plan.population * plan.prompts
  return {
    "base model": _num_bytes(basis.base),
    "bases": _num_bytes((basis.left, basis.right)),
    "experts in them": _num_bytes(basis.experts),
    "archives": plan.elites * elite,
    "children": plan.population * elite,
    "KV caches": rows * a_token * tokens,
    "prefill": rows * (a_token * plan.prompt_tokens + max(scores, activations)),
    "logits": 4 * rows * config.vocab_size,
  }


def table(plan: Plan, device_gb: float) -> Table:
  """The parts, their sum, and the devices that hold it."""
  parts, basis = num_bytes(plan), shapes(plan)
  elite = parts["archives"] // plan.elites
  total = sum(parts.values())
  result = Table(
    title=f"{plan.model}, {plan.experts} experts of rank {plan.rank}, {plan.dtype}: "
    f"{num_parameters(basis.base):,} parameters"
  )
  result.add_column("part")
  result.add_column("bytes", justify="right")
  result.add_column("what it is")
  notes = {
    "base model": "read once a step for all children",
    "bases": f"orthonormal, {100 * parts['bases'] / parts['base model']:.1f}% of the base model",
    "experts in them": f"{plan.experts} genotypes",
    "archives": f"{plan.elites:,} elites of {_human(elite)} in float32, {_in_cores(basis):,} numbers in cores",
    "children": f"P = {plan.population}",
    "KV caches": f"P x B = {plan.population} x {plan.prompts}, {plan.prompt_tokens + plan.answer_tokens:,} tokens",
    "prefill": "the prompts' cache, and one layer's attention scores or feed-forward",
    "logits": "of one token a row, float32",
  }
  for name, size in parts.items():
    result.add_row(name, _human(size), notes[name])
  result.add_section()
  devices = math.ceil(total / (USABLE * device_gb * 1e9))
  result.add_row("in all", _human(total), f"{devices} device{'s' * (devices != 1)} of {device_gb:g} GB")
  dense = plan.elites * parts["base model"]
  result.add_row("the same archives of dense models", _human(dense), f"{dense / parts['archives']:,.0f} times as much")
  return result


def main(arguments: Sequence[str]) -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks memory",
    description="From shapes alone: the memory of evolving a swarm in core space, and the devices that it needs.",
    epilog="example: python -m benchmarks memory --model llama3-8b --rank 16 --elites 675",
  )
  parser.add_argument("--model", choices=MODELS, default="llama3-8b")
  options: dict[str, tuple[int, str]] = {
    "rank": (16, "of each expert's task vector"),
    "elites": (675, "individuals in the archives (default: %(default)s, 3 archives of 15 x 15 cells)"),
    "experts": (3, "K"),
    "population": (16, "children decoded side by side"),
    "prompts": (8, "prompts decoded side by side for each child"),
    "prompt-tokens": (512, "of a prompt, at most"),
    "answer-tokens": (512, "of an answer, at most"),
  }
  for name, (default, text) in options.items():
    parser.add_argument(f"--{name}", type=_positive, default=default, help=text)
  parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of weights and caches")
  parser.add_argument("--embeddings", action="store_true", help="the experts changed embedding and head too")
  parser.add_argument("--device-gb", type=float, default=80.0, help="memory of a device, of which 90%% are counted on")
  given = vars(parser.parse_args(arguments))
  device_gb = given.pop("device_gb")
  if not device_gb > 0:
    parser.error("--device-gb: expected more than 0")
  console = Console()
  (console if console.is_terminal else Console(width=WIDTH)).print(table(Plan(**given), device_gb))


def _in_cores(basis: CoreBasis) -> int:
  """How many numbers the cores of one individual have."""
  cores = map_with_path(lambda path, leaf, own: own if is_matrix(path, leaf) else None, basis.base, basis.experts)
  return num_parameters(cores) // basis.num_experts


def _num_bytes(tree: Params) -> int:
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _human(size: float) -> str:
  for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
    if size >= scale:
      return f"{size / scale:.3g} {unit}"
  return f"{size / 1e3:.3g} kB"


def _positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
  return value
