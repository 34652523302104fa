"""A run of a script, on the toy problem."""

import jax
from loop_cases import BASE, CHANGES, traced
from rich.console import Console

from cqd_jax.run import run

QUIET = Console(quiet=True)
EXPERTS = [jax.tree.map(lambda base, change, k=k: base + change[k], BASE, CHANGES) for k in (0, 1)]


def call(run_dir, problem=None, **changes):
  arguments = {
    "base": BASE,
    "experts": EXPERTS,
    "methods": ["cycleqd", {"use": "random_search", "name": "random"}],
    "budget": 10,
    "seed": 0,
    "console": QUIET,
    "swarm_sizes": (2,),
  }
  return run(problem=problem or traced(), run_dir=run_dir, **{**arguments, **changes})
