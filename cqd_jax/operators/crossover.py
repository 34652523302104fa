"""Crossover by model merging: two parents become one child.

A crossover is `crossover(key, first, second, *, setting) -> Child`: the child, and a note of how it was made, for the
history. What is merged, and how, is in the modules of the plain operators.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from qdax.core.emitters.mutation_operators import isoline_variation

from cqd_jax.checks import check_key
from cqd_jax.operators.arithmetic import check_parents, check_setting
from cqd_jax.operators.consensus import ties
from cqd_jax.operators.frames import needs_frame
from cqd_jax.operators.linear import draw_weights, linear_merge
from cqd_jax.operators.sparsify import dare
from cqd_jax.operators.spherical import cosine_similarity, interpolate, slerp_weights
from cqd_jax.trees import widen
from cqd_jax.types import Genotype, PRNGKey


class Child(NamedTuple):
  """What a crossover makes.

  Attributes:
    genotype: of the child; structure, shapes and dtypes of its parents.
    note: what was drawn or found on the way, by name; empty where there is nothing to say.
  """

  genotype: Genotype
  note: Mapping[str, jax.Array]


@needs_frame("linear")
def linear_crossover(
  key: PRNGKey,
  first: Genotype,
  second: Genotype,
  *,
  std: ArrayLike = 0.03,
  mean: ArrayLike = 1.0,
  granularity: str = "model",
  normalize: bool = True,
) -> Child:
  """`linear_merge`, which describes the errors, as a crossover.

  Args:
    key: typed PRNG key; consumed.
    first: of one parent, leaves `[...]`.
    second: of the other.
    std: standard deviation of the two merge weights, at least 0; may be traced.
    mean: mean of the two merge weights; normalized, only std / mean matters.
    granularity: what shares one pair of weights: model (the paper), layer or kernel.
    normalize: whether the pair is divided by its sum (the paper).

  Returns:
    The child, and a note of the "weights" of both parents in each of G groups, float32 `[2, G]`.
  """
  genotype, weights = linear_merge(
    key, first, second, std=std, mean=mean, granularity=granularity, normalize=normalize, with_weights=True
  )
  return Child(genotype, {"weights": weights})


@needs_frame("linear")
def line_crossover(
  key: PRNGKey, first: Genotype, second: Genotype, *, iso_sigma: ArrayLike = 0.15, line_sigma: ArrayLike = 0.3
) -> Child:
  """Steps from the first parent along the line to the second, with independent noise beside it.

  The child is `first + iso_sigma n + line_sigma z (second - first)`, with n normal for each entry and z normal for the
  whole individual. The noise is added to what an individual is stored as.

  Args:
    key: typed PRNG key; consumed.
    first: float leaves `[...]` of one parent; no population axis.
    second: the other parent's; same structure, shapes and dtypes.
    iso_sigma: standard deviation of the noise, at least 0; may be traced.
    line_sigma: standard deviation of the step in units of the parents' distance, at least 0; may be traced.

  Returns:
    The child, computed in float32 and in the dtypes of `first`; the note is empty. Its draws are those of QDax's
    `isoline_variation` on a batch of one.

  Raises:
    ValueError: if the trees differ, hold anything but floats, or a setting is out of range.

  Reference: Vassiliades and Mouret 2018, arXiv:1804.03906.
  """
  check_key(key)
  first, second = check_parents(first, second)
  check_setting("iso_sigma", iso_sigma, low=0.0)
  check_setting("line_sigma", line_sigma, low=0.0)
  pair = jax.tree.map(lambda leaf: widen(leaf)[None], (first, second))
  children = isoline_variation(*pair, key, iso_sigma=iso_sigma, line_sigma=line_sigma)
  return Child(jax.tree.map(lambda leaf, like: leaf[0].astype(like.dtype), children, first), {})


@needs_frame("inner_product")
def slerp_crossover(
  key: PRNGKey, first: Genotype, second: Genotype, *, mean: ArrayLike = 0.5, std: ArrayLike = 0.1
) -> Child:
  """`slerp` at a random place: t is drawn from N(mean, std^2), one for the child.

  Args:
    key: typed PRNG key; consumed.
    first: float leaves `[...]` of one parent's task vector; no population axis.
    second: the other parent's; same structure, shapes and dtypes.
    mean: mean of t; may be traced.
    std: standard deviation of t, at least 0; may be traced.

  Returns:
    The child as `slerp` makes it, and a note of "t" and of the "angle" between the parents in radians, float32 `[]`
    both. The angle of nearly equal parents is exact to about 5e-4, and NaN where the child is.

  Raises:
    ValueError: if the trees differ, hold anything but floats, or a setting is out of range.
  """
  check_key(key)
  first, second = check_parents(first, second)
  check_setting("mean", mean)
  check_setting("std", std, low=0.0)
  t = jnp.asarray(mean + std * jax.random.normal(key, (), jnp.float32))
  cosine = cosine_similarity(first, second)
  genotype = interpolate(first, second, slerp_weights(cosine, t))
  return Child(genotype, {"t": t, "angle": jnp.arccos(cosine)})


@needs_frame("elementwise")
def split_slerp_crossover(key: PRNGKey, first: Genotype, second: Genotype) -> Child:
  """`slerp` at t before a random place among the weights, and at 1 - t behind it.

  t is uniform in [0, 1), and the place uniform among all weights, taken one after another, leaf by leaf in the order of
  the tree. So where t is near 0 the child has the first parent's beginning and the second one's end. Both parts have
  the weights of one arc, that between the parents taken whole.

  Args:
    key: typed PRNG key; consumed.
    first: float leaves `[...]` of one parent's task vector, each of fewer than 2^31 weights; no population axis.
    second: the other parent's; same structure, shapes and dtypes.

  Returns:
    The child, computed in float32 and in the dtypes of `first`, and a note of "t", of the "angle" between the parents
    in radians (as in `slerp_crossover`), and of the "split", the share of the weights before the place; float32 `[]`.
    Where there is no arc the line takes its place, as in `slerp`.

  Raises:
    ValueError: if the trees differ or hold anything but floats.

  Reference: Abrantes et al. 2025, arXiv:2508.16204, and the authors' code, where the angle is that of the whole.
  """
  check_key(key)
  first, second = check_parents(first, second)
  leaf_key, place_key, t_key = jax.random.split(key, 3)
  sizes = [leaf.size for leaf in jax.tree.leaves(first)]
  chosen = jax.random.categorical(leaf_key, jnp.log(jnp.array(sizes, jnp.float32)))
  place = jax.random.randint(place_key, (), 0, jnp.array(sizes, jnp.int32)[chosen])
  t = jax.random.uniform(t_key)
  cosine = cosine_similarity(first, second)
  ours, theirs = slerp_weights(cosine, t)  # those at 1 - t are these two exchanged

  def combine(index: int, one: jax.Array, other: jax.Array) -> jax.Array:
    end = jnp.where(index == chosen, place, jnp.where(index < chosen, one.size, 0))
    before = (jnp.arange(one.size) < end).reshape(one.shape)
    share, rest = jnp.where(before, ours, theirs), jnp.where(before, theirs, ours)
    return (share * widen(one) + rest * widen(other)).astype(one.dtype)

  leaves, structure = jax.tree.flatten(first)
  child = [combine(*each) for each in zip(range(len(leaves)), leaves, jax.tree.leaves(second), strict=True)]
  starts = jnp.array(np.cumsum([0, *sizes[:-1]]), jnp.float32)
  split = (starts[chosen] + place) / sum(sizes)
  return Child(jax.tree.unflatten(structure, child), {"t": t, "angle": jnp.arccos(cosine), "split": split})


@needs_frame("elementwise")
def ties_crossover(
  key: PRNGKey, first: Genotype, second: Genotype, *, density: float = 0.5, std: ArrayLike = 0.1
) -> Child:
  """`ties` of the parents, with random weights drawn as by `linear_merge`: from N(1, std^2), normalized.

  Args:
    key: typed PRNG key; consumed.
    first: float leaves `[...]` of one parent's task vector; no population axis.
    second: the other parent's; same structure, shapes and dtypes.
    density: the share of entries of each parent that is kept, kernel by kernel, in (0, 1]; static.
    std: standard deviation of the weights, at least 0; may be traced. With 0 they are halves.

  Returns:
    The child, and a note of the "weights" of both parents, float32 `[2, 1]`.

  Raises:
    ValueError: if the trees differ, hold anything but floats, or a setting is out of range.
  """
  check_key(key)
  first, second = check_parents(first, second)
  check_setting("std", std, low=0.0)
  weights = draw_weights(key, std=std)
  parents = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
  return Child(ties(parents, weights[:, 0], density=density), {"weights": weights})


@needs_frame("elementwise")
def dare_crossover(
  key: PRNGKey, first: Genotype, second: Genotype, *, drop_rate: float = 0.5, std: ArrayLike = 0.1
) -> Child:
  """`linear_merge` of the parents after `dare` of each: weights from N(1, std^2), normalized.

  Args:
    key: typed PRNG key; consumed.
    first: float leaves `[...]` of one parent's task vector; no population axis.
    second: the other parent's; same structure, shapes and dtypes.
    drop_rate: the probability of zeroing an entry of a parent, in [0, 1); static.
    std: standard deviation of the weights, at least 0; may be traced. With 0 they are halves.

  Returns:
    The child, rounded to the parents' dtypes once, and a note of the "weights" of both parents, float32 `[2, 1]`.

  Raises:
    ValueError: if the trees differ, hold anything but floats, or a setting is out of range.
  """
  check_key(key)
  first, second = check_parents(first, second)
  first_key, second_key, weights_key = jax.random.split(key, 3)
  ours, theirs = jax.tree.map(widen, (first, second))
  ours, theirs = dare(first_key, ours, drop_rate=drop_rate), dare(second_key, theirs, drop_rate=drop_rate)
  merged, weights = linear_merge(weights_key, ours, theirs, std=std, with_weights=True)
  return Child(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), merged, first), {"weights": weights})
