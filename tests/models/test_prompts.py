"""Prompts in buckets: each once, in short rows first, the same for all candidates or each candidate's own."""

import numpy as np
import pytest

from cqd_jax.models import bucket_population_prompts, bucket_prompts


def test_buckets_hold_every_prompt_once_and_are_sorted_by_length():
  lengths = np.random.default_rng(0).integers(1, 40, 50)
  prompts = [list(range(100 * row, 100 * row + length)) for row, length in enumerate(lengths)]
  buckets = bucket_prompts(prompts, num_buckets=4, pad_id=-1, multiple_of=8)
  assert [len(bucket.rows) for bucket in buckets] == [13, 13, 12, 12]
  widths = [bucket.token_ids.shape[1] for bucket in buckets]
  assert widths == sorted(widths)
  assert all(width % 8 == 0 for width in widths)
  seen = []
  for rows, token_ids, found in buckets:
    assert token_ids.shape[1] - found.max() < 8
    for row, tokens, length in zip(rows, token_ids, found, strict=True):
      assert tokens[:length].tolist() == prompts[row]
      assert (tokens[length:] == -1).all()
      seen.append(int(row))
  assert sorted(seen) == list(range(50))
  order = [len(prompts[row]) for row in seen]
  assert order == sorted(order)


def test_no_bucket_is_empty():
  buckets = bucket_prompts([[1, 2, 3], [4]], num_buckets=5, multiple_of=1)
  assert [bucket.token_ids.tolist() for bucket in buckets] == [[[4]], [[1, 2, 3]]]


@pytest.mark.parametrize(
  ("prompts", "settings", "named"),
  [
    ([], {}, "prompts"),
    ([[1], []], {}, r"prompts\[1\]"),
    ([[1]], {"num_buckets": 0}, "num_buckets"),
    ([[1]], {"multiple_of": 0}, "multiple_of"),
  ],
)
def test_buckets_refuse(prompts, settings, named):
  with pytest.raises(ValueError, match=named):
    bucket_prompts(prompts, **({"num_buckets": 1} | settings))


def test_a_populations_rows_are_sorted_by_their_longest_prompt():
  sizes = np.random.default_rng(1).integers(1, 40, (3, 20))
  prompts = [
    [list(range(1000 * p + 50 * row, 1000 * p + 50 * row + sizes[p, row])) for row in range(20)] for p in range(3)
  ]
  buckets = bucket_population_prompts(prompts, num_buckets=3, pad_id=-1, multiple_of=8)
  assert [bucket.token_ids.shape[:2] for bucket in buckets] == [(3, 7), (3, 7), (3, 6)]
  longest = sizes.max(axis=0)
  order = np.concatenate([bucket.rows for bucket in buckets])
  assert sorted(order.tolist()) == list(range(20))
  assert (np.diff(longest[order]) >= 0).all()
  for rows, token_ids, lengths in buckets:
    assert rows.dtype == token_ids.dtype == lengths.dtype == np.int32
    assert token_ids.shape[2] == -(-longest[rows].max() // 8) * 8
    for p, (place, row) in ((p, each) for p in range(3) for each in enumerate(rows)):
      length = lengths[p, place]
      assert token_ids[p, place, :length].tolist() == prompts[p][row]
      assert (token_ids[p, place, length:] == -1).all()


def test_equal_prompts_of_all_candidates_are_bucketed_as_those_of_one():
  prompts = [[1, 2, 3], [4], np.array([5, 6]), [7]]
  alone = bucket_prompts(prompts, num_buckets=2)
  for one, several in zip(alone, bucket_population_prompts([prompts] * 2, num_buckets=2), strict=True):
    np.testing.assert_array_equal(several.rows, one.rows)
    for candidate in range(2):
      np.testing.assert_array_equal(several.token_ids[candidate], one.token_ids)
      np.testing.assert_array_equal(several.lengths[candidate], one.lengths)


@pytest.mark.parametrize(
  ("prompts", "settings", "named"),
  [
    ([], {}, "prompts: expected those of at least one candidate"),
    ([[], []], {}, r"prompts\[0\]: expected at least one"),
    ([[[1]], [[1], [2]]], {}, r"prompts\[1\]: expected 1 prompts, as many as of candidate 0, got 2"),
    ([[[1], [1]], [[2], []]], {}, r"prompts\[1\]\[1\]: expected at least one token"),
    ([[[1]]], {"num_buckets": 0}, "num_buckets"),
    ([[[1]]], {"multiple_of": 0}, "multiple_of"),
  ],
)
def test_a_populations_buckets_refuse(prompts, settings, named):
  with pytest.raises(ValueError, match=named):
    bucket_population_prompts(prompts, **({"num_buckets": 1} | settings))
