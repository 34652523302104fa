"""Strictness for the whole suite: warnings are errors, ranks never promote, shapes are checked as code runs."""

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
hook = install_import_hook("cqd_jax", "beartype.beartype")


@pytest.fixture
def qdax_ranks():
  """QDax promotes ranks in its own code; tests that run it allow that."""
  with jax.numpy_rank_promotion("allow"):
    yield
