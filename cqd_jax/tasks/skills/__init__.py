"""Three miniature skills, each learnt by a very small model: coding, database, os."""

from collections.abc import Mapping
from typing import Any

from cqd_jax.tasks.skills.coding import coding
from cqd_jax.tasks.skills.database import database
from cqd_jax.tasks.skills.grammar import SIZES, Skill
from cqd_jax.tasks.skills.shell import shell
from cqd_jax.tasks.task import Split

__all__ = ["SIZES", "Skill", "coding", "database", "shell", "skills"]


def skills(*, sizes: Mapping[Split, int] = SIZES, seed: int = 0) -> tuple[Skill[Any], ...]:
  """The suite of the three, K = 3: coding, database, os; `sizes` examples per split each, drawn by `seed`."""
  return coding(sizes=sizes, seed=seed), database(sizes=sizes, seed=seed), shell(sizes=sizes, seed=seed)
