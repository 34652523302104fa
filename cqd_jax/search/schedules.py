"""Where parents come from at each turn: functions `(turn, batch_size, num_tasks) -> archives [P]` of traced turns.

`same_for_all` says that all children of a batch have parents of one archive, whose elites are then weighed once.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Int

Schedule: TypeAlias = Callable[[Array, int, int], Array]


def cycle(turn: Int[Array, ""], batch_size: int, num_tasks: int) -> Int[Array, "P"]:
  """All from archive t mod K: the paper."""
  return jnp.broadcast_to(turn % num_tasks, (batch_size,)).astype(jnp.int32)


def fixed(turn: Int[Array, ""], batch_size: int, num_tasks: int) -> Int[Array, "P"]:
  """All from archive 0: the paper's ablation without cycling."""
  del turn, num_tasks
  return jnp.zeros(batch_size, jnp.int32)


def round_robin(turn: Int[Array, ""], batch_size: int, num_tasks: int) -> Int[Array, "P"]:
  """Those of child p from archive (t + p) mod K, what the asynchronous workers of the reference code amount to."""
  return (turn + jnp.arange(batch_size, dtype=jnp.int32)) % num_tasks


cycle.same_for_all = fixed.same_for_all = True  # type: ignore[attr-defined]

SCHEDULES: dict[str, Schedule] = {"cycle": cycle, "round_robin": round_robin, "fixed": fixed}


def num_distinct(schedule: Schedule, batch_size: int, num_tasks: int) -> int | None:
  """From how many archives per batch draws: child p from the (p mod that many)-th; None: anyhow."""
  if getattr(schedule, "same_for_all", False):
    return 1
  return min(batch_size, num_tasks) if schedule is round_robin else None
