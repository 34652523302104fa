"""From shapes only: the device memory of evolving a swarm, as core-space or as dense genotypes."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from cqd_jax.genotypes import CoreBasis
from cqd_jax.low_rank import LowRank
from cqd_jax.models import DecoderConfig, init_params, unstack_layers
from cqd_jax.trees import is_matrix, map_with_path, num_parameters
from cqd_jax.types import Params

USABLE = 0.9
"""The share of a device's memory that is counted on."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be held at the same time.

  Attributes:
    name: of the model.
    config: the decoder.
    rank: of each expert's task vector of each matrix; 0: dense task vectors.
    experts: K.
    elites: individuals in the archives.
    population: P, children of a batch.
    prompts: B, prompts decoded side by side for each child.
    prompt_tokens: of a prompt, at most.
    answer_tokens: of an answer, at most.
    dtype: of weights and caches.
    embeddings: whether the experts changed embedding and head too.
    share_base: whether the children are decoded with the base's weights, or each with its own written out.
    group: children decoded side by side; None: all of a batch.
    elite_bytes: of one individual; None: as follows from the rank.
    written_out: models written out at the same time, where the base is not shared; None: a batch.
    unstacked: whether the base's layers are arrays of their own, so that decoding makes no copy of them.
  """

  name: str
  config: DecoderConfig
  rank: int
  experts: int
  elites: int
  population: int
  prompts: int
  prompt_tokens: int
  answer_tokens: int
  dtype: str
  embeddings: bool
  share_base: bool = True
  group: int | None = None
  elite_bytes: int | None = None
  written_out: int | None = None
  unstacked: bool = True


def shapes(plan: Plan) -> CoreBasis:
  """The basis with shapes in the place of arrays; nothing is allocated."""

  def make(key: jax.Array) -> Params:
    params = init_params(key, plan.config, jnp.dtype(plan.dtype))
    return unstack_layers(params) if plan.unstacked else params

  base = jax.eval_shape(make, jax.random.key(0))

  def update(path: tuple[str, ...], leaf: Any) -> LowRank | None:
    if not is_matrix(path, leaf) or (path[0] != "layers" and not plan.embeddings):
      return None
    *stack, rows, columns = leaf.shape
    rank = min(max(plan.rank, 1), rows, columns)
    b, a = (jax.ShapeDtypeStruct((*stack, *shape), leaf.dtype) for shape in ((rows, rank), (rank, columns)))
    return LowRank(b, a)  # type: ignore[arg-type]

  expert = map_with_path(update, base)
  # None is no leaf, so the trees of experts pass through `eval_shape` as they are.
  return jax.eval_shape(CoreBasis.from_experts, base, [expert] * plan.experts)


def num_bytes(plan: Plan) -> dict[str, int]:
  """Bytes of each part, by name."""
  basis, config = shapes(plan), plan.config
  base, dense = _num_bytes(basis.base), plan.rank == 0
  in_cores = base if dense else _num_bytes(basis.experts) // plan.experts
  elite = in_cores if plan.elite_bytes is None else plan.elite_bytes
  written_out = plan.population if plan.written_out is None else plan.written_out
  size = jnp.dtype(plan.dtype).itemsize
  a_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size
  tokens = plan.prompt_tokens + plan.answer_tokens
  scores = 2 * 4 * config.num_heads * plan.prompt_tokens**2  # before and after the softmax, float32
  activations = size * plan.prompt_tokens * (3 * config.intermediate_size + 2 * config.hidden_size)
  group = plan.population if plan.group is None else plan.group
  rows = group * plan.prompts
  copied = 0 if plan.unstacked else _num_bytes(basis.base["layers"])
  parts = {
    "base model": base,
    "bases": 0 if dense else _num_bytes((basis.left, basis.right)),
    "experts": plan.experts * in_cores,
    "archives": plan.elites * elite,
    "children": plan.population * elite,
    "models written out": 0 if plan.share_base else written_out * base,
    "layers taken apart": copied * (1 if plan.share_base else group),
    "KV caches": rows * a_token * tokens,
    "prefill": rows * (a_token * plan.prompt_tokens + max(scores, activations)),
    "logits": 4 * rows * config.vocab_size,
  }
  return {name: size for name, size in parts.items() if size}


def table(plan: Plan, device_gb: float) -> Table:
  """The parts, their sum, and the devices that hold it."""
  parts, basis = num_bytes(plan), shapes(plan)
  elite = parts["archives"] // plan.elites
  total = sum(parts.values())
  result = Table(
    title=f"{plan.name}, {plan.experts} experts{f' of rank {plan.rank}' if plan.rank else ''}, {plan.dtype}: "
    f"{num_parameters(basis.base):,} parameters"
  )
  result.add_column("part")
  result.add_column("bytes", justify="right")
  result.add_column("what it is")
  notes = {
    "base model": "read once per step for all children" if plan.share_base else "",
    "bases": f"orthonormal, {100 * parts.get('bases', 0) / parts['base model']:.1f}% of the base model",
    "experts": f"{plan.experts} genotypes",
    "archives": f"{plan.elites:,} elites of {human(elite)}"
    + (f" in float32, {_in_cores(basis):,} numbers in cores" if plan.rank and plan.elite_bytes is None else ""),
    "children": f"P = {plan.population}",
    "models written out": "to be decoded: a batch of children, of a search, or the experts",
    "layers taken apart": "the copy of the stacked layers that decoding makes",
    "KV caches": f"{plan.group or plan.population} children x {plan.prompts} prompts, "
    f"{plan.prompt_tokens + plan.answer_tokens:,} tokens",
    "prefill": "the prompts' cache, and one layer's attention scores or feed-forward",
    "logits": "of one token a row, float32",
  }
  for name, size in parts.items():
    result.add_row(name, human(size), notes[name])
  result.add_section()
  devices = math.ceil(total / (USABLE * device_gb * 1e9))
  result.add_row("in all", human(total), f"{devices} device{'s' * (devices != 1)} of {device_gb:g} GB")
  dense = plan.elites * parts["base model"]
  if plan.rank:
    result.add_row("the same archives of dense models", human(dense), f"{dense / parts['archives']:,.0f} times as much")
  return result


def _in_cores(basis: CoreBasis) -> int:
  """How many numbers the cores of one individual have."""
  cores = map_with_path(lambda path, leaf, own: own if is_matrix(path, leaf) else None, basis.base, basis.experts)
  return num_parameters(cores) // basis.num_experts


def _num_bytes(tree: Params) -> int:
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def human(size: float | int) -> str:
  """Bytes with three figures."""
  for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
    if size >= scale:
      return f"{size / scale:.3g} {unit}"
  return f"{size / 1e3:.3g} kB"
