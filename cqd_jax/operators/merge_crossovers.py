"""Crossovers that are merges: any merge of T task vectors, of two parents with random weights.

Their settings are those of the merge, and `std`, the spread of the weights.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cqd_jax.checks import check_key
from cqd_jax.operators import consensus, fitted, masks, sparse_merges, spectral, spherical, toward
from cqd_jax.operators.arithmetic import check_parents, check_setting
from cqd_jax.operators.crossover import Child
from cqd_jax.operators.frames import Frame, needs_frame
from cqd_jax.operators.linear import draw_weights
from cqd_jax.trees import widen
from cqd_jax.types import Genotype, Params, PRNGKey

Crossover = Callable[..., Child]

STD = "standard deviation of the two weights, drawn from N(1, std^2) and normalized; at least 0; may be traced."


def crossover_of(merge: Callable[..., Params], *, weighs: float = 1.0) -> Crossover:
  """The crossover that merges both parents' task vectors.

  Args:
    merge: `merge(task_vectors, weights, *, settings)` with a frame (`needs_frame`), or with a key in front.
    weighs: what the two weights sum to.

  Returns:
    `crossover(key, first, second, *, std, settings)`. The weights are drawn as by `linear_merge`, from N(1, std^2), and
    normalized; the note has them, float32 `[2, 1]`. It has the frame and the settings of the merge.
  """
  parameters = inspect.signature(merge).parameters
  random = "key" in parameters
  settings = [each for each in parameters.values() if each.kind is inspect.Parameter.KEYWORD_ONLY]

  def crossover(key: PRNGKey, first: Genotype, second: Genotype, *, std: ArrayLike = 0.1, **given: Any) -> Child:
    check_key(key)
    first, second = check_parents(first, second)
    check_setting("std", std, low=0.0)
    weights_key, merge_key = jax.random.split(key)
    weights = weighs * draw_weights(weights_key, std=std)
    pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    keys = (merge_key,) if random else ()
    return Child(merge(*keys, pair, weights[:, 0], **given), {"weights": weights})

  frame: Frame = typing.cast(Any, merge).frame
  return _described(needs_frame(frame)(crossover), merge, settings)


def _described(crossover: Crossover, merge: Callable[..., Params], settings: list[inspect.Parameter]) -> Crossover:
  """The crossover with the name, the settings and the description that come from the merge."""
  name = f"{merge.__name__}_crossover"
  hints = typing.get_type_hints(inspect.unwrap(merge))
  doc = (inspect.getdoc(merge) or "").replace("Args:\n", f"Args:\n  std: {STD}\n", 1)
  signature = inspect.signature(crossover)
  own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
  for function in {crossover, inspect.unwrap(crossover)}:
    described: Any = function
    described.__name__ = described.__qualname__ = name
    described.__doc__ = f"`{merge.__name__}` of both parents with random weights. {doc}"
    described.__signature__ = signature.replace(parameters=[*own, *settings])
    described.__annotations__ = {
      **typing.get_type_hints(inspect.unwrap(crossover)),
      **{each.name: hints[each.name] for each in settings},
    }
  return crossover


@needs_frame("elementwise")
def nearswap_crossover(key: PRNGKey, first: Genotype, second: Genotype, *, t: ArrayLike = 1e-3) -> Child:
  """The first parent, moved toward the second by at most t in each entry (`nearswap`).

  Args:
    key: typed PRNG key; nothing is drawn.
    first: float leaves `[...]` of one parent's task vector; no population axis.
    second: the other parent's; same structure, shapes and dtypes.
    t: the largest step; may be traced.

  Returns:
    The child, computed in float32 and rounded to the dtypes of `first` once; the note is empty.

  Raises:
    ValueError: if the trees differ, hold anything but floats, or `t` is no finite scalar.
  """
  check_key(key)
  first, second = check_parents(first, second)
  wide, other = jax.tree.map(widen, (first, second))
  step = toward.nearswap(jax.tree.map(jnp.subtract, other, wide), t=t)
  return Child(jax.tree.map(lambda one, by, like: (one + by).astype(like.dtype), wide, step, first), {})


nuslerp_crossover = crossover_of(spherical.nuslerp)
multislerp_crossover = crossover_of(spherical.multislerp)
karcher_crossover = crossover_of(spherical.karcher)
model_stock_crossover = crossover_of(fitted.model_stock)
wudi_crossover = crossover_of(fitted.wudi)
breadcrumbs_crossover = crossover_of(sparse_merges.breadcrumbs)
breadcrumbs_ties_crossover = crossover_of(sparse_merges.breadcrumbs_ties)
dare_ties_crossover = crossover_of(sparse_merges.dare_ties)
della_crossover = crossover_of(sparse_merges.della)
della_linear_crossover = crossover_of(sparse_merges.della_linear)
sce_crossover = crossover_of(consensus.sce)
magmax_crossover = crossover_of(consensus.magmax, weighs=2.0)  # an entry is taken whole
ram_crossover = crossover_of(consensus.ram)
ramplus_tl_crossover = crossover_of(consensus.ramplus_tl)
consensus_merge_crossover = crossover_of(masks.consensus_merge)
tsv_crossover = crossover_of(spectral.tsv)
iso_c_crossover = crossover_of(spectral.iso_c)
iso_cts_crossover = crossover_of(spectral.iso_cts)
knots_ties_crossover = crossover_of(spectral.knots_ties)
knots_dare_ties_crossover = crossover_of(spectral.knots_dare_ties)
