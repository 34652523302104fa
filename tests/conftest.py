"""Strictness for the whole suite: warnings are errors, ranks never promote, shapes are checked as code runs."""

import functools
import gc
import importlib.util
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
# What is compiled faster is compiled again in less time than the cache takes to keep it.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# The suite compiles thousands of small programs and runs each a few times: most of its time goes into compiling them,
# which the older emitters do in half the time.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if QUICK not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

# So are the programs of the commands that tests start.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# What is this small is computed before other threads wake up: they only spin. PyTorch's and NumPy's are meant.
for library in ("OMP", "OPENBLAS", "MKL"):
  os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import compiled_once  # noqa: E402
import eager_moves  # noqa: E402
import jax  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# JAX makes a context of MLIR for each program, which takes longer than to compile most of those here. One serves all.
if hasattr(mlir, "make_ir_context"):
  mlir.make_ir_context = functools.cache(mlir.make_ir_context)

eager_moves.install()
compiled_once.install()

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)
# Without the grammars of the skills and MBPP's tests: their functions are called a hundred thousand times, and none
# takes an array.
UNCHECKED = [("tasks", "skills"), ("tasks", "mbpp")]
PACKAGE = Path(importlib.util.find_spec("cqd_jax").origin).parent
checked = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in PACKAGE.rglob("*.py")]
checked = [".".join(parts) for parts in checked if parts[1:3] not in UNCHECKED and parts[-1] != "__init__"]
hook = install_import_hook(checked, "beartype.beartype")


LONGEST_FIRST = ("run", "genotypes", "experiments", "benchmarks", "docs", "hub")
"""Folders whose files take minutes: begun first, they do not end long after all others."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
  """Orders files; those of one file stay together, since they share what takes long to make (--dist loadfile)."""
  places = {name: place for place, name in enumerate(LONGEST_FIRST)}
  items.sort(key=lambda item: places.get(item.path.parent.name, len(places)))
  # Programs are thousands of objects each: collected less often, and what was imported never looked at again.
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)
  if "CQD_LONG" not in os.environ:
    for item in items:
      if item.get_closest_marker("long"):
        item.add_marker(pytest.mark.skip(reason="takes minutes: CQD_LONG=1 make soak"))


def pytest_sessionfinish(session):
  """The process that began ends with what is shared."""
  if not hasattr(session.config, "workerinput"):
    shutil.rmtree(SHARED, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _trained_at_full_speed():
  """Training runs one program hundreds of times, so that is optimized."""
  from cqd_jax.tasks.skills.training import Trainer

  fit = Trainer.fit

  def fit_optimized(*arguments, **settings):
    jax.config.update("jax_disable_most_optimizations", False)
    try:
      return fit(*arguments, **settings)
    finally:
      jax.config.update("jax_disable_most_optimizations", True)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Trainer, "fit", fit_optimized)
    yield


@pytest.fixture(scope="session")
def shared_data(pytestconfig):
  """Finds a file of the published data, which is beside the repository where it is at all."""

  def find(name: str) -> Path:
    path = pytestconfig.rootpath.parent / "shared" / "data" / name
    if not path.exists():
      pytest.skip(f"the published data is not here: {path}")
    return path

  return find


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
