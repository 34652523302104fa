"""The k-th largest by counting, against sorting: over sizes, dtypes, equal entries, and values of all orders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.operators import order_statistics
from cqd_jax.operators.order_statistics import count_of, cut_of, kth_largest, magnitude_ranks

NORMAL = np.random.default_rng(0).normal(size=20_011)
ENTRIES = {
  "normal": NORMAL.astype(np.float32),
  "bfloat16": NORMAL.astype(jnp.bfloat16),
  "few values": np.round(3 * NORMAL).astype(np.float32),
  "zeros": np.zeros(20_011, np.float32),
  "all orders": np.exp(20 * NORMAL).astype(np.float32),
  "half nan": np.where(np.arange(20_011) % 2, np.nan, NORMAL).astype(np.float32),
  "three": NORMAL[:3].astype(np.float32),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_it_is_what_sorting_gives(monkeypatch, name):
  monkeypatch.setattr(order_statistics, "SAMPLE", 2**8)  # so that 20 thousand are many
  entries = ENTRIES[name]
  falling = np.sort(np.asarray(magnitude_ranks(jnp.asarray(entries))))[::-1]
  for k in sorted({1, max(1, entries.size // 5), max(1, entries.size // 2), entries.size}):
    assert int(kth_largest([jnp.asarray(entries)], k)) == falling[k - 1]
    reached = falling >= int(cut_of([jnp.asarray(entries)], k))
    np.testing.assert_array_equal(reached, falling >= falling[k - 1])


def test_several_tensors_are_one_list_and_a_batch_is_many(monkeypatch):
  monkeypatch.setattr(order_statistics, "SAMPLE", 2**8)
  entries = jnp.asarray(NORMAL, jnp.float32)
  parts = [entries[:5000].reshape(50, 100), entries[5000:]]
  assert int(kth_largest(parts, 7777)) == int(kth_largest([entries], 7777))
  rows = entries[:20_000].reshape(2, 10_000)
  places = jnp.array([3, 9000])
  together = jax.vmap(lambda row, k: kth_largest([row], k))(rows, places)
  assert together.tolist() == [int(kth_largest([rows[i]], int(places[i]))) for i in range(2)]


def test_nothing_reaches_what_no_entry_is_asked_for():
  entries = jnp.array([1.0, -3.0, jnp.inf, jnp.nan])
  assert not (magnitude_ranks(entries) >= kth_largest([entries], 0)).any()
  assert not (magnitude_ranks(entries) >= cut_of([entries], 0)).any()


def test_shares_are_counted_down_as_floats_are_multiplied():
  assert [int(count_of(share, 100)) for share in (0.29, 0.5, 1.0, 0.0)] == [28, 50, 100, 0]
  assert int(jax.jit(lambda share: count_of(share, 10))(0.5)) == 5
