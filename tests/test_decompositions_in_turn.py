"""Many batched decompositions in one program: each waits for the one before it, or XLA's threads could all wait."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.genotypes.core import _bases
from cqd_jax.genotypes.factors import randomized_svd
from cqd_jax.low_rank import LowRank
from cqd_jax.operators import factorize, svd_mutation


def trees(num=6, batch=4):
  keys = jax.random.split(jax.random.key(0), num)
  return {f"w{i}": jax.random.normal(key, (batch, 6 + i, 5)) for i, key in enumerate(keys)}


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
  ("operator", "number"),
  [
    (lambda tree: jax.vmap(factorize)(tree), 6),
    (
      lambda tree: jax.vmap(functools.partial(svd_mutation, max_scale=2.0))(
        jax.random.split(jax.random.key(1), 4), tree
      ),
      6,
    ),
    # a decomposition, and its orthonormal factor, of columns and of rows
    (lambda tree: _bases((LowRank(tree["w0"], tree["w1"].mT),), jnp.float32), 4),
    # three times, then the small SVD twice (once for the sketch)
    (lambda tree: randomized_svd(jax.random.key(0), tree["w5"], rank=2), 11),
  ],
  ids=["factorize", "svd_mutation", "bases", "randomized"],
)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the names are those of LAPACK's calls on a CPU")
def test_each_decomposition_depends_on_the_one_before(operator, number):
  """Follows operands in the compiled text from each call to another, as the run time does that starts them."""
  text = jax.jit(operator).lower(trees()).compile().as_text()
  defined = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$", text, re.MULTILINE))
  calls = [name for name, body in defined.items() if "custom-call" in body and re.search("gesdd|geqrf|orgqr", body)]
  assert len(calls) == number

  def reaches(name):
    found, waiting = set(), [name]
    while waiting:
      for operand in re.findall(r"%([\w.-]+)", defined[waiting.pop()]):
        if operand in defined and operand not in found:
          found.add(operand)
          waiting.append(operand)
    return found

  before = [len(reaches(name) & set(calls)) for name in calls]
  assert sorted(before) == list(range(number))


def test_the_order_changes_no_number():
  tree = trees()
  together = jax.vmap(factorize)(tree)
  for name, leaf in tree.items():
    u, s, vt = together[name]
    np.testing.assert_allclose(jnp.matmul(u * s[:, None, :], vt), leaf, atol=1e-5)
  poisoned = {**tree, "w0": tree["w0"].at[0, 0, 0].set(jnp.nan)}
  for name, factors in jax.vmap(factorize)(poisoned).items():
    assert bool(jnp.isfinite(factors.s).all()) == (name != "w0")
