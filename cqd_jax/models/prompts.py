"""Ragged prompts as a few buckets of static shape: the same for a whole population, or each candidate's own."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

Prompts: TypeAlias = Sequence[Sequence[int] | np.ndarray]
"""Token ids of each prompt."""


class PromptBucket(NamedTuple):
  """Prompts of about one length, padded to one static shape; a pytree of int32 arrays.

  Attributes:
    rows: `[b]` the prompts' places in the original order.
    token_ids: `[b, T]` tokens, then padding; `[P, b, T]` where each of P candidates has prompts of its own.
    lengths: `[b]`, or `[P, b]`, number of tokens, from 1 to T.
  """

  rows: Any
  token_ids: Any
  lengths: Any


def bucket_prompts(prompts: Prompts, *, num_buckets: int, pad_id: int = 0, multiple_of: int = 4) -> list[PromptBucket]:
  """Sorts prompts by length and parts them into buckets of equal size, each padded to its own longest prompt.

  Short prompts then do not pay for long ones, neither in the prefill nor in the cache that each step reads. Each
  bucket is compiled for itself.

  Args:
    prompts: B non-empty lists of token ids.
    num_buckets: how many buckets at most; there are no empty ones.
    pad_id: fills the rows; its value does not matter.
    multiple_of: padded lengths are rounded up to a multiple of this, so that fewer shapes are compiled.

  Returns:
    Buckets of NumPy arrays, short prompts first.

  Raises:
    ValueError: if there is no prompt, a prompt is empty, or `num_buckets` or `multiple_of` is below 1.
  """
  lengths = _lengths(prompts, "prompts")
  buckets = _bucket([prompts], lengths[None], num_buckets, pad_id, multiple_of)
  return [PromptBucket(rows, token_ids[0], lengths[0]) for rows, token_ids, lengths in buckets]


def bucket_population_prompts(
  prompts: Sequence[Prompts], *, num_buckets: int, pad_id: int = 0, multiple_of: int = 4
) -> list[PromptBucket]:
  """What `bucket_prompts` does, where each of P candidates has B prompts of its own.

  Args:
    prompts: of each candidate B non-empty lists of token ids; whoever has fewer is given some to fill up. A row counts
      as long as the longest of its P prompts, so rows that are of like length for all candidates cost least.
    num_buckets: how many buckets at most; there are no empty ones.
    pad_id: fills the rows; its value does not matter.
    multiple_of: padded lengths are rounded up to a multiple of this, so that fewer shapes are compiled.

  Returns:
    Buckets of NumPy arrays with a population axis, short rows first.

  Raises:
    ValueError: if there is no candidate or no prompt, candidates have different numbers of prompts, a prompt is empty,
      or `num_buckets` or `multiple_of` is below 1.
  """
  if not prompts:
    raise ValueError("prompts: expected those of at least one candidate")
  for candidate, own in enumerate(prompts):
    if len(own) != len(prompts[0]):
      raise ValueError(
        f"prompts[{candidate}]: expected {len(prompts[0])} prompts, as many as of candidate 0, got {len(own)}"
      )
  lengths = np.stack([_lengths(own, f"prompts[{candidate}]") for candidate, own in enumerate(prompts)])
  return _bucket(prompts, lengths, num_buckets, pad_id, multiple_of)


def check_buckets(buckets: Sequence[PromptBucket], num_candidates: int | None = None) -> None:
  """Raises a `ValueError` unless buckets hold every row once, in shapes that agree, with lengths that are possible.

  Values are checked where they are known; traced ones are not.

  Args:
    buckets: the prompts.
    num_candidates: P, of which each may have prompts of its own; None: there is no population axis.
  """
  if not buckets:
    raise ValueError("buckets: expected at least one")
  for index, (rows, token_ids, lengths) in enumerate(buckets):
    several = num_candidates is not None
    where = f" of buckets[{index}]" if several else ""
    if (
      token_ids.shape[:-2] not in ((), (num_candidates,))
      or token_ids.ndim < 2
      or lengths.shape != token_ids.shape[:-1]
      or rows.shape != token_ids.shape[-2:-1]
    ):
      own = f" (or, its own for each of {num_candidates} candidates, a leading axis in both)" if several else ""
      raise ValueError(
        f"prompts{where}: expected tokens [B, T] and lengths [B]{own}, got {token_ids.shape} and {lengths.shape}"
        + (f" for {rows.shape} rows" if several else "")
      )
    longest = token_ids.shape[-1]
    if not isinstance(lengths, jax.core.Tracer) and not ((lengths >= 1) & (lengths <= longest)).all():
      raise ValueError(f"prompt_lengths{where}: expected lengths in [1, {longest}], got {np.asarray(lengths)}")
  if not any(isinstance(bucket.rows, jax.core.Tracer) for bucket in buckets):
    rows = np.sort(np.concatenate([bucket.rows for bucket in buckets]))
    if not np.array_equal(rows, np.arange(len(rows))):
      raise ValueError(f"buckets: expected rows that are together 0 to {len(rows) - 1}, each once")


def _lengths(prompts: Prompts, name: str) -> np.ndarray:
  """The numbers of tokens `[B]`."""
  if not len(prompts):
    raise ValueError(f"{name}: expected at least one")
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  if not lengths.all():
    raise ValueError(f"{name}[{lengths.argmin()}]: expected at least one token, got an empty prompt")
  return lengths


def _bucket(
  prompts: Sequence[Prompts], lengths: np.ndarray, num_buckets: int, pad_id: int, multiple_of: int
) -> list[PromptBucket]:
  """Buckets with a population axis, of P candidates' prompts and their lengths `[P, B]`."""
  for name, value in (("num_buckets", num_buckets), ("multiple_of", multiple_of)):
    if value < 1:
      raise ValueError(f"{name}: expected at least 1, got {value}")
  longest = lengths.max(axis=0)
  buckets = []
  for rows in np.array_split(np.argsort(longest, kind="stable"), min(num_buckets, len(longest))):
    width = -(-int(longest[rows].max()) // multiple_of) * multiple_of
    token_ids = np.full((len(prompts), len(rows), width), pad_id, np.int32)
    for own, its_rows in zip(prompts, token_ids, strict=True):
      for place, row in enumerate(rows.tolist()):
        its_rows[place, : len(own[row])] = own[row]
    buckets.append(PromptBucket(rows.astype(np.int32), token_ids, lengths[:, rows]))
  return buckets
