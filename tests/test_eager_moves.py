"""What NumPy moves for the suite is what JAX's own programs would have made of it."""

import eager_moves
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src import dispatch
from jax._src.lax import lax, slicing

DTYPES = ["bool", "int8", "int32", "uint32", "float16", ml_dtypes.bfloat16, "float32"]
X = np.arange(2 * 3 * 4).reshape(2, 3, 4) - 7

CASES = {
  "stage": (lambda x: lax.stage(np.asarray(x)), lax.stage_p),
  "broadcast": (lambda x: lax.broadcast_in_dim(x, (5, 2, 3, 4), (1, 2, 3)), lax.broadcast_in_dim_p),
  "broadcast ones": (lambda x: lax.broadcast_in_dim(x[:, :1], (2, 3, 6, 4), (0, 1, 3)), lax.broadcast_in_dim_p),
  "fill": (lambda x: lax.broadcast(x[0, 0, 0], (2, 3)), lax.broadcast_in_dim_p),
  "nothing": (lambda x: lax.broadcast(x, (0,)), lax.broadcast_in_dim_p),
  "squeeze": (lambda x: lax.squeeze(x[:1, :, :1], (0, 2)), lax.squeeze_p),
  "transpose": (lambda x: lax.transpose(x, (2, 0, 1)), lax.transpose_p),
  "reshape": (lambda x: lax.reshape(x, (4, 6)), lax.reshape_p),
  "slice": (lambda x: jax.lax.slice(x, (0, 1, 2), (1, 3, 4)), slicing.slice_p),
  "strides": (lambda x: jax.lax.slice(x, (0, 0, 1), (2, 3, 4), (1, 2, 3)), slicing.slice_p),
  "concatenate": (lambda x: lax.concatenate([x, x[:, 1:], x], 1), lax.concatenate_p),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_those_of_a_program(case, dtype, monkeypatch):
  move, primitive = CASES[case]
  given = jax.device_put(X.astype(dtype))
  ours = move(given)

  def compiled(*operands, **params):
    return dispatch.apply_primitive(primitive, *operands, **params)

  monkeypatch.setattr(primitive, "impl", compiled)
  theirs = move(given)
  assert (ours.aval, ours.sharding, ours.committed) == (theirs.aval, theirs.sharding, theirs.committed)
  np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("value", [1.5, 2, True, np.float32(2), np.float64(2), np.int64(3), np.arange(3)], ids=repr)
def test_values_of_the_host_keep_their_types(value):
  ours, theirs = lax.stage_p.impl(value), dispatch.apply_primitive(lax.stage_p, value)
  assert ours.aval == theirs.aval
  assert ours.weak_type == theirs.weak_type
  np.testing.assert_array_equal(ours, theirs)


def test_what_was_moved_is_a_copy():
  source = np.zeros((64, 64), np.float32)
  array = jnp.array(source)
  part, other = array[:32], array.T
  source[:] = 1
  assert not array.any()
  jax.jit(lambda x: x + 1, donate_argnums=0)(array)
  assert not part.any()
  assert not other.any()


def test_what_is_more_than_bytes_is_left_to_programs():
  for special in (jnp.asarray(1.0), jax.random.key(0), jax.device_put(X, jax.devices()[0]), np.float32(1)):
    assert not eager_moves.is_plain(special)
  assert lax.broadcast(jnp.asarray(1.0), (2,)).weak_type
  assert jax.random.split(jax.random.key(0), 4)[1].shape == ()
