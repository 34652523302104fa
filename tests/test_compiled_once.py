"""The suite's memory of compiled programs takes equal programs for equal, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_once import CompiledOnce
from jax._src import compiler


@pytest.fixture
def counted(monkeypatch):
  """What compiles, with how often it really did in `calls`."""
  calls = []
  really = compiler.compile_or_get_cached.compile_program

  def compile_program(*arguments, **named):
    calls.append(arguments[1])
    return really(*arguments, **named)

  once = CompiledOnce(compile_program)
  once.calls = calls
  monkeypatch.setattr(compiler, "compile_or_get_cached", once)
  return once


def scaled(factor):
  return jax.jit(lambda x: jnp.tanh(x) * factor)


def test_equal_programs_are_compiled_once(counted):
  x = jax.device_put(np.arange(7, dtype=np.float32))
  first, second = scaled(3.0)(x), scaled(3.0)(x)
  np.testing.assert_array_equal(first, second)
  assert (len(counted.calls), counted.hits) == (1, 1)


@pytest.mark.parametrize(
  "other", [lambda x: scaled(4.0)(x), lambda x: scaled(3.0)(x[:6]), lambda x: scaled(3.0)(x.astype(jnp.bfloat16))]
)
def test_others_are_not_taken_for_them(counted, other):
  x = jax.device_put(np.arange(7, dtype=np.float32))
  given = [x, x[:6], x.astype(jnp.bfloat16)]
  np.testing.assert_allclose(scaled(3.0)(given[0]), 3 * np.tanh(np.arange(7)), rtol=1e-6)
  compiled = len(counted.calls)
  other(x)
  assert len(counted.calls) > compiled
  assert counted.hits == 0


def test_other_options_are_another_program(counted):
  x = jax.device_put(np.arange(7, dtype=np.float32))
  scaled(3.0)(x)
  jax.config.update("jax_disable_most_optimizations", False)
  try:
    scaled(3.0)(x)
  finally:
    jax.config.update("jax_disable_most_optimizations", True)
  assert (len(counted.calls), counted.hits) == (2, 0)


def test_buffers_that_are_given_up_stay_given_up(counted):
  for _ in range(2):
    x = jax.device_put(np.zeros(9, np.float32))
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert x.is_deleted()
  assert counted.hits == 1


def test_what_calls_the_host_calls_its_own(counted):
  said = []
  for name in ("first", "second"):
    jax.jit(lambda x, name=name: jax.debug.callback(lambda _: said.append(name), x))(1.0)
  jax.effects_barrier()
  assert said == ["first", "second"]
