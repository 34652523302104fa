"""The package under another Python, without anything that only the suite needs: imports, a traced search, a run."""

import importlib
import pkgutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

import cqd_jax
from cqd_jax.run import run
from cqd_jax.tasks import TracedProblem

modules = [module.name for module in pkgutil.walk_packages(cqd_jax.__path__, "cqd_jax.")]
for name in modules:
  if "harness_" not in name and not name.endswith("__main__"):
    importlib.import_module(name)

goals = jax.random.normal(jax.random.key(0), (2, 4, 4))


def score(params, data):
  """Likeness to two goals."""
  return jnp.exp(-jnp.square(params["w"][None] - goals).mean((1, 2)))[:, None] + 0 * data


with tempfile.TemporaryDirectory() as folder:
  result = run(
    problem=TracedProblem(score, {"validation": jnp.zeros((2, 1)), "test": jnp.zeros((2, 1))}, task_names=("a", "b")),
    base={"w": jnp.zeros((4, 4))},
    experts=[{"w": 0.9 * goal} for goal in goals],
    methods=["cycleqd", "cma_es"],
    budget=16,
    run_dir=Path(folder) / "run",
  )
  assert (result.run_dir / "report.html").is_file()
print(
  f"smoke test: {len(modules)} modules, {len(result.rows)} rows, Python {sys.version.split()[0]}, jax {jax.__version__}"
)
