"""Decoding a population: buckets of prompts, candidates side by side, and candidates that share one base model.

The miniature counts down from a prompt's last token to 0, its end token, so every answer's length is chosen here; its
weights are as dense as any. The model whose base is shared is larger, and says as many tokens as it may.

Where do the ways cross? A step of one dense candidate reads all its weights for B rows. P candidates of a shared base
read them once for P x B rows, but pay for the bases of core space: (m + n) a / (m n) more arithmetic. So sharing wins
as long as B rows leave the arithmetic idle while weights are read, the more so the more candidates there are; once B
rows alone keep it busy, it can only lose what the bases cost. Side by side without sharing, each has weights of its own
to be read: nothing is won but launches. One at a time, weights have to be written out first.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case
from cqd_jax.genotypes import CoreBasis
from cqd_jax.low_rank import LowRank
from cqd_jax.models import DecoderConfig, PromptBucket, bucket_prompts, decode_population, init_params
from cqd_jax.tasks.skills.training import MINIATURE
from cqd_jax.trees import is_matrix, map_with_path, num_parameters
from cqd_jax.types import Params

MAX_NEW_TOKENS = 34

SHARED = DecoderConfig(4096, 512, 1536, 6, 8, 2, 64)
"""22 million parameters, in proportions of Llama 3."""

EXPERTS, RANK, PROMPT_TOKENS, ANSWER_TOKENS = 3, 16, 24, 32


def cases(quick: bool) -> list[Case]:
  """Numbers of buckets against one padded batch, groups against one candidate a call, a shared base against none."""
  prompts, num_tokens = _prompts(24 if quick else 300)
  size = 2 if quick else 4
  flops = 2.0 * size * num_tokens * _weights_a_token(MINIATURE)

  def case(num_buckets: int, group_size: int, peer: Callable[[Params], Any], peer_name: str) -> Case:
    return Case(
      name="decode_population",
      labels={"prompts": len(prompts), "buckets": num_buckets, "group": group_size},
      function=_decoder(bucket_prompts(prompts, num_buckets=num_buckets), group_size),
      arguments=lambda: (_population(size),),
      flops=flops,
      items=size,
      item="candidates",
      peer=peer,
      peer_name=peer_name,
    )

  padded = _decoder(bucket_prompts(prompts, num_buckets=1), 1)
  buckets = 2 if quick else 6
  one_by_one = _one_by_one(_decoder(bucket_prompts(prompts, num_buckets=buckets), 1))
  return [
    *(case(number, 1, padded, "one padded batch") for number in ((2,) if quick else (2, 4, 6))),
    *(case(buckets, group, one_by_one, "one candidate a call") for group in ((1, 2) if quick else (1, 2, 4))),
    *shared_cases(quick),
  ]


def shared_cases(quick: bool) -> list[Case]:
  """P candidates in core space on B prompts, against writing out one after the other."""
  if quick:
    return [_shared_case(MINIATURE, 2, 2, way) for way in WAYS]
  points = [(1, 8), (4, 8), (16, 8), (16, 1), (16, 32)]
  shared = [_shared_case(SHARED, candidates, prompts, "shared base") for candidates, prompts in points]
  others = [way for way in WAYS if way != "shared base"]
  return shared + [_shared_case(SHARED, 16, prompts, way) for prompts in (1, 8) for way in others]


WAYS = ("shared base", "dense, side by side", "dense, in turn")


def _shared_case(config: DecoderConfig, candidates: int, prompts: int, way: str) -> Case:
  ids = np.random.default_rng(1).integers(0, config.vocab_size, (prompts, PROMPT_TOKENS)).tolist()
  decode = functools.partial(
    decode_population,
    config=config,
    buckets=bucket_prompts(ids, num_buckets=1),
    max_new_tokens=ANSWER_TOKENS,
    end_ids=(),
  )

  def arguments() -> tuple[Any, ...]:
    basis = _basis(config)
    weights = jax.random.dirichlet(jax.random.key(2), jnp.ones(EXPERTS), (candidates,))
    genotypes = jax.tree.map(lambda leaf: jnp.einsum("pk,k...->p...", weights, leaf), basis.experts)
    if way == "shared base":
      return (basis, genotypes)
    return (basis, genotypes, jax.jit(jax.vmap(basis.materialize))(genotypes))

  def function(basis: CoreBasis, genotypes: Params, dense: Params | None = None) -> Any:
    if dense is None:
      return decode(basis.apply(genotypes), group_size=candidates)
    return decode(dense, group_size=candidates if way == "dense, side by side" else 1)

  write_out = jax.jit(lambda basis, genotype: jax.tree.map(lambda leaf: leaf[None], basis.materialize(genotype)))

  def peer(basis: CoreBasis, genotypes: Params, dense: Params | None = None) -> Any:
    del dense
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], genotypes) for i in range(candidates)]
    return [jax.block_until_ready(decode(write_out(basis, genotype))) for genotype in each]

  tokens = PROMPT_TOKENS + ANSWER_TOKENS - 1
  return Case(
    name=way,
    labels={"parameters": _num_parameters(config), "rank": RANK, "P": candidates, "B": prompts},
    function=function,
    arguments=arguments,
    flops=2.0 * candidates * prompts * tokens * _weights_a_token(config),
    items=candidates,
    item="candidates",
    peer=peer,
    peer_name="written out one at a time",
  )


def _basis(config: DecoderConfig) -> CoreBasis:
  """A random base and experts of low rank."""
  source = np.random.default_rng(0)

  def update(path: tuple[str, ...], leaf: jax.Array) -> LowRank | None:
    if not is_matrix(path, leaf):
      return None
    *stack, rows, columns = leaf.shape
    b, a = (source.normal(size=(*stack, *shape)) for shape in ((rows, RANK), (RANK, columns)))
    return LowRank(jnp.asarray(0.05 * b / math.sqrt(rows), leaf.dtype), jnp.asarray(0.3 * a, leaf.dtype))

  base = init_params(jax.random.key(0), config)
  return CoreBasis.from_experts(base, [map_with_path(update, base) for _ in range(EXPERTS)])


def _one_by_one(decode: Callable[[Params], Any]) -> Callable[[Params], list[Any]]:
  """The same answers by a call a candidate, each waited for as one whose answers are then graded."""

  def run(population: Params) -> list[Any]:
    size = jax.tree.leaves(population)[0].shape[0]
    candidates = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], population) for i in range(size)]
    return [jax.block_until_ready(decode(candidate)) for candidate in candidates]

  return run


def _decoder(buckets: list[PromptBucket], group_size: int) -> functools.partial[tuple[jax.Array, jax.Array]]:
  return functools.partial(
    decode_population,
    config=MINIATURE,
    buckets=buckets,
    max_new_tokens=MAX_NEW_TOKENS,
    end_ids=(0,),
    group_size=group_size,
  )


def _population(size: int) -> Params:
  """Equal candidates that count down: layers that add nothing, and a head that is a shifted identity."""
  params = init_params(jax.random.key(0), MINIATURE)
  for part in (params["layers"]["attention"]["output"], params["layers"]["mlp"]["down"]):
    part["kernel"] = jnp.zeros_like(part["kernel"])
  params["embed"]["embedding"] = jnp.eye(MINIATURE.vocab_size)
  params["head"]["kernel"] = jnp.eye(MINIATURE.vocab_size, k=-1)
  return jax.tree.map(lambda leaf: jnp.stack([leaf] * size), params)


def _prompts(count: int) -> tuple[list[list[int]], int]:
  """Prompts of the skills' lengths, longer ones with longer answers; and how many tokens have to be run."""
  source = np.random.default_rng(0)
  lengths = np.clip(source.normal(21, 7, count).round(), 8, 42).astype(int)
  answers = np.clip(source.normal(17, 6, count).round() + (lengths - 21) // 3, 4, MAX_NEW_TOKENS - 1).astype(int)
  prompts = [
    [*source.integers(40, 128, length - 1).tolist(), int(answer)]
    for length, answer in zip(lengths, answers, strict=True)
  ]
  return prompts, int(lengths.sum() + answers.sum() - count)


def _num_parameters(config: DecoderConfig) -> int:
  return num_parameters(jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0)))


def _weights_a_token(config: DecoderConfig) -> int:
  """Multiply-adds that a token needs, attention to other tokens left out."""
  shapes = jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0))
  leaves = jax.tree.leaves_with_path(shapes)
  return sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key == "kernel")
