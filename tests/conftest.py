"""Strictness for the whole suite: warnings are errors, ranks never promote, shapes are checked as code runs."""

import gc

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
# The suite compiles thousands of small programs and runs each a few times: most of its time went into optimizing them.
jax.config.update("jax_disable_most_optimizations", True)
hook = install_import_hook("cqd_jax", "beartype.beartype")


@pytest.fixture
def qdax_ranks():
  """QDax promotes ranks in its own code; tests that run it allow that."""
  with jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture
def optimized():
  """Compiles as users do, for tests that look at a program's memory."""
  jax.clear_caches()
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def collected():
  """What a test has abandoned complains while that test runs, and not whenever it happens to be collected."""
  yield
  gc.collect()
