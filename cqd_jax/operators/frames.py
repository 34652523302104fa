"""In which frame an operator means what it says, so that one that does not fit a space is refused before a run begins.

The same individual is written differently in different spaces: as a dense task vector, as its cores, as merge
coefficients. From one to the next linear combinations survive everywhere, inner products where the bases are
orthonormal, and single entries nowhere. So each operator needs one of three things of its space, and a space that
offers one of them offers those before it too:

- "linear": sums and multiples of individuals. Every space has them.
- "inner_product": also lengths, angles and singular values. Dense task vectors and cores have them.
- "elementwise": also the sizes and signs of single weights. Only dense task vectors have them; on cores such an
  operator runs, but it is another method.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar, get_args

Frame: TypeAlias = Literal["linear", "inner_product", "elementwise"]
"""What an operator needs of its space, and what a space offers; from least to most."""

FRAMES: tuple[Frame, ...] = get_args(Frame)

Operator = TypeVar("Operator", bound=Callable[..., Any])

_GENOTYPES: dict[Frame, str] = {"linear": "any genotype", "inner_product": "dense or core", "elementwise": "dense"}


def needs_frame(frame: Frame) -> Callable[[Operator], Operator]:
  """Marks an operator with the frame that it needs, as its attribute `frame`.

  ```python
  @needs_frame("elementwise")
  def clip(key, task_vector, *, limit): ...
  ```

  Raises:
    ValueError: if `frame` is none of `FRAMES`.
  """
  if frame not in FRAMES:
    raise ValueError(f"frame: expected one of {', '.join(FRAMES)}, got {frame!r}")

  def mark(operator: Operator) -> Operator:
    marked: Any = operator
    marked.frame = frame
    return operator

  return mark


def frame_of(operator: Callable[..., Any]) -> Frame | None:
  """The frame that an operator needs, seen through `functools.partial` and `jax.jit`; None where it does not say.

  Raises:
    ValueError: if the operator has an attribute `frame` that is none of `FRAMES`.
  """
  function = _without_settings(operator)
  frame: Frame | None = getattr(function, "frame", None)
  if frame is not None and frame not in FRAMES:
    raise ValueError(f"{_name(function)}.frame: expected one of {', '.join(FRAMES)}, got {frame!r}")
  return frame


def check_frame(operator: Callable[..., Any], space_name: str, space_frame: Frame, kind: str) -> None:
  """Raises unless a space offers what an operator needs. An operator that does not say what it needs passes.

  Args:
    operator: a function, or a `functools.partial` of one.
    space_name: what the genotype is called in the settings, as "core".
    space_frame: what it offers.
    kind: what the operator is there for, as "crossover" or "mutation".

  Raises:
    ValueError: naming the operator, the space, and the genotypes that would do.
  """
  frame = frame_of(operator)
  if frame is None or FRAMES.index(frame) <= FRAMES.index(space_frame):
    return
  name = _name(_without_settings(operator))
  raise ValueError(
    f"{kind} {name}: {frame}, so on a genotype that is {space_name} ({space_frame}) it would be another method; "
    f"use evolution.genotype {_GENOTYPES[frame]}"
  )


def _without_settings(operator: Callable[..., Any]) -> Callable[..., Any]:
  while isinstance(operator, functools.partial):
    operator = operator.func
  return operator


def _name(function: Callable[..., Any]) -> str:
  return getattr(function, "__name__", type(function).__name__)
