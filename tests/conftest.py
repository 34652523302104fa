"""Strictness for the whole suite: warnings are errors, ranks never promote, shapes are checked as code runs."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# What the processes of the suite (workers, and the commands that tests start) have in common: compiled programs and
# trained miniatures. Set before JAX is imported; workers and commands inherit it.
if "CQD_TESTS_SHARED" not in os.environ:
  os.environ["CQD_TESTS_SHARED"] = tempfile.mkdtemp(prefix="cqd-tests-")
SHARED = Path(os.environ["CQD_TESTS_SHARED"])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(SHARED / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# The suite compiles thousands of small programs and runs each a few times: most of its time went into optimizing them.
jax.config.update("jax_disable_most_optimizations", True)
hook = install_import_hook("cqd_jax", "beartype.beartype")


def pytest_sessionfinish(session):
  """The process that began ends with what is shared."""
  if not hasattr(session.config, "workerinput"):
    shutil.rmtree(SHARED, ignore_errors=True)


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
