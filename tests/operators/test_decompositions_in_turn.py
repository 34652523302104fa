"""Many batched decompositions in one program: each waits for the one before it, or XLA's threads could all wait."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.operators import factorise, svd_mutation


def trees(num=6, batch=4):
  keys = jax.random.split(jax.random.key(0), num)
  return {f"w{i}": jax.random.normal(key, (batch, 6 + i, 5)) for i, key in enumerate(keys)}


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
  "operator",
  [
    lambda tree: jax.vmap(factorise)(tree),
    lambda tree: jax.vmap(functools.partial(svd_mutation, max_scale=2.0))(jax.random.split(jax.random.key(1), 4), tree),
  ],
)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the names are those of LAPACK's calls on a CPU")
def test_each_decomposition_depends_on_the_one_before(operator):
  """Follows operands in the compiled text from each call to another, as the run time does that starts them."""
  text = jax.jit(operator).lower(trees()).compile().as_text()
  defined = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$", text, re.MULTILINE))
  calls = [name for name, body in defined.items() if "custom-call" in body and "gesdd" in body]
  assert len(calls) == 6

  def reaches(name):
    found, waiting = set(), [name]
    while waiting:
      for operand in re.findall(r"%([\w.-]+)", defined[waiting.pop()]):
        if operand in defined and operand not in found:
          found.add(operand)
          waiting.append(operand)
    return found

  before = [len(reaches(name) & set(calls)) for name in calls]
  assert sorted(before) == [0, 1, 2, 3, 4, 5]


def test_the_order_changes_no_number():
  tree = trees()
  together = jax.vmap(factorise)(tree)
  for name, leaf in tree.items():
    u, s, vt = together[name]
    np.testing.assert_allclose(jnp.matmul(u * s[:, None, :], vt), leaf, atol=1e-5)
  poisoned = {**tree, "w0": tree["w0"].at[0, 0, 0].set(jnp.nan)}
  for name, factors in jax.vmap(factorise)(poisoned).items():
    assert bool(jnp.isfinite(factors.s).all()) == (name != "w0")
