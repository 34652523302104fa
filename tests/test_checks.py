"""Each check passes what is right and names what is not."""

import jax
import jax.numpy as jnp
import pytest

from cqd_jax import checks


def test_one_key_is_expected_typed_or_raw():
  checks.check_key(jax.random.key(0))
  checks.check_key(jax.random.PRNGKey(0))
  with pytest.raises(ValueError, match=r"key: expected one key, got an array of keys of shape \(3,\)"):
    checks.check_key(jax.random.split(jax.random.key(0), 3))
  for wrong in (jnp.zeros(2), jax.random.split(jax.random.PRNGKey(0), 3)):
    with pytest.raises(ValueError, match=r"key: expected a key from jax.random.key, got (float32\[2\]|uint32\[3, 2\])"):
      checks.check_key(wrong)


@pytest.mark.parametrize(
  ("tree", "message"),
  [
    ({}, "tree: expected a pytree of arrays, got one without leaves"),
    ({"a": jnp.zeros(2, jnp.int32)}, r"tree\['a'\]: expected floats, got int32\[2\]"),
    ({"a": "text"}, r"tree\['a'\]: expected floats, got str"),
  ],
)
def test_leaves_are_floats(tree, message):
  checks.check_float_leaves({"a": jnp.zeros(2, jnp.bfloat16)}, "tree")
  with pytest.raises(ValueError, match=message):
    checks.check_float_leaves(tree, "tree")


@pytest.mark.parametrize(
  ("second", "message"),
  [
    ({"a": jnp.zeros(2)}, r"second: misses \['b'\], which first has"),
    ({"a": jnp.zeros(2), "b": jnp.zeros(3), "c": jnp.zeros(1)}, r"second: has \['c'\], which first has not"),
    ({"a": jnp.zeros(2), "b": jnp.zeros(4)}, r"second\['b'\]: expected float32\[3\] as in first, got float32\[4\]"),
    ({"a": jnp.zeros(2), "b": jnp.zeros(3, jnp.bfloat16)}, r"second\['b'\]: expected float32\[3\].*got bfloat16\[3\]"),
  ],
)
def test_trees_are_the_same(second, message):
  first = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
  checks.check_same_tree(first, {"b": jnp.ones(3), "a": jnp.ones(2)}, "first", "second")
  with pytest.raises(ValueError, match=message):
    checks.check_same_tree(first, second, "first", "second")


def test_populations_share_their_leading_axis():
  assert checks.check_population({"a": jnp.zeros((4, 2)), "b": jnp.zeros(4)}, "genotypes") == 4
  with pytest.raises(ValueError, match=r"genotypes\['b'\]: expected 4 individuals"):
    checks.check_population({"a": jnp.zeros((4, 2)), "b": jnp.zeros(5)}, "genotypes")
  with pytest.raises(ValueError, match=r"genotypes\['b'\]: expected a leading population axis, got a scalar"):
    checks.check_population({"a": jnp.zeros(4), "b": jnp.zeros(())}, "genotypes")
  with pytest.raises(ValueError, match="without leaves"):
    checks.check_population({}, "genotypes")
