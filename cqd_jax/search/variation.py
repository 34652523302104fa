"""How children are made: the usual crossover and mutation of a space, the checks of others, and both in words."""

import functools
from typing import Any, NamedTuple

from cqd_jax.genotypes.space import Space
from cqd_jax.operators.crossover import line_crossover, linear_crossover
from cqd_jax.operators.frames import check_frame
from cqd_jax.operators.mutation import expert_svd_mutation, no_mutation, svd_mutation
from cqd_jax.search.emitters import Crossover, Mutation
from cqd_jax.types import Genotype


class Variation(NamedTuple):
  """How two parents become a child.

  Attributes:
    crossover: operator on two individuals; returns a `Child`, or only the child's genotype.
    mutation: operator on one individual; None for none.
    task_context: what the mutation gets of a task as its third argument, leaves `[K, ...]`; None: it gets none.
    words: what happens to a child beside the merge of its parents, as "expert_svd 0.3".
  """

  crossover: Crossover
  mutation: Mutation | None
  task_context: Genotype | None
  words: str


def variation_of(space: Space, num_tasks: int, crossover: Crossover | None, mutation: Mutation | None) -> Variation:
  """The variation of a method on individuals of a space.

  Args:
    space: of the genotypes.
    num_tasks: K.
    crossover: None: linear, or line where individuals are coefficients.
    mutation: None: expert_svd, or svd where there is not one expert a task, or none where individuals are coefficients.

  Raises:
    ValueError: naming the setting: an operator that is not valid in the space.
  """
  if crossover is None:
    crossover = line_crossover if space.name == "coefficients" else functools.partial(linear_crossover, std=0.03)
  if mutation is None:
    mutation = _usual_mutation(space, num_tasks)
  check_frame(crossover, space.name, space.frame, "crossover")
  check_frame(mutation, space.name, space.frame, "mutation")
  return Variation(
    crossover,
    mutation=None if mutation is no_mutation else mutation,
    task_context=_expert_factors(space, num_tasks) if unbound(mutation) is expert_svd_mutation else None,
    words=in_words(crossover, mutation),
  )


def unbound(function: Any) -> Any:
  """The function behind `functools.partial`."""
  while isinstance(function, functools.partial):
    function = function.func
  return function


def _expert_factors(space: Space, num_tasks: int) -> Any:
  """One entry per task for mutations along an expert's directions."""
  if space.expert_svd is None:
    raise ValueError(f"mutation: expert_svd has no meaning for individuals that are {space.name}")
  if space.num_experts != num_tasks:
    raise ValueError(
      f"mutation: expert_svd adds part of the expert of the active task, which takes as many experts as tasks; "
      f"got {space.num_experts} and {num_tasks}"
    )
  return space.expert_svd()


def _usual_mutation(space: Space, num_tasks: int) -> Mutation:
  if space.name == "coefficients" or space.expert_svd is None:
    return no_mutation
  if space.num_experts != num_tasks:
    return functools.partial(svd_mutation, max_scale=2.0)
  return functools.partial(expert_svd_mutation, rate=0.3)


def in_words(crossover: Any, mutation: Any) -> str:
  """What happens to a child beside the merge of its parents, as "expert_svd 0.3", for histories and reports."""
  if unbound(crossover) is line_crossover:
    settings = {"iso_sigma": 0.15, "line_sigma": 0.3, **getattr(crossover, "keywords", {})}
    own = f"iso {settings['iso_sigma']:g}, line {settings['line_sigma']:g}"
  else:
    own = "" if unbound(crossover) is linear_crossover else _name_with_settings(crossover, "_crossover")
  change = "" if mutation is no_mutation else _name_with_settings(mutation, "_mutation")
  return ", ".join(filter(None, [own, change]))


def _name_with_settings(function: Any, ending: str) -> str:
  name = getattr(unbound(function), "__name__", type(function).__name__).removesuffix(ending)
  values = getattr(function, "keywords", {}).values()
  return " ".join([name, *(f"{value:g}" if isinstance(value, float | int) else str(value) for value in values)])
