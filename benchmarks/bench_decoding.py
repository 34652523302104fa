"""Decoding a population of miniatures: buckets of prompts, and candidates side by side.

The model counts down from a prompt's last token to 0, its end token, so every answer's length is chosen here; its
weights are as dense as any.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case
from cqd_jax.models import DecoderConfig, PromptBucket, bucket_prompts, decode_population, init_params
from cqd_jax.tasks.skills.training import MINIATURE
from cqd_jax.types import Params

MAX_NEW_TOKENS = 34


def cases(quick: bool) -> list[Case]:
  """Numbers of buckets against one padded batch, then sizes of groups against one candidate a call."""
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
  ]


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


def _weights_a_token(config: DecoderConfig) -> int:
  """Multiply-adds that a token needs, attention to other tokens left out."""
  shapes = jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0))
  leaves = jax.tree.leaves_with_path(shapes)
  return sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key == "kernel")
