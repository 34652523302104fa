"""Crossovers: what they add to the plain operators, which have tests of their own, and what they promise together."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.emitters.mutation_operators import isoline_variation

from cqd_jax.operators import (
  Child,
  dare_crossover,
  frame_of,
  line_crossover,
  linear_crossover,
  linear_merge,
  slerp,
  slerp_crossover,
  split_slerp_crossover,
  ties,
  ties_crossover,
)

DTYPES = [jnp.float32, jnp.bfloat16]

CROSSOVERS = {
  "linear": (linear_crossover, "linear", {"weights": (2, 1)}),
  "line": (line_crossover, "linear", {}),
  "slerp": (slerp_crossover, "inner_product", {"t": (), "angle": ()}),
  "split_slerp": (split_slerp_crossover, "elementwise", {"t": (), "angle": (), "split": ()}),
  "ties": (ties_crossover, "elementwise", {"weights": (2, 1)}),
  "dare": (dare_crossover, "elementwise", {"weights": (2, 1)}),
}


@pytest.fixture(params=CROSSOVERS)
def case(request):
  return CROSSOVERS[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_child_is_like_its_parents_and_its_note_is_float32(make_tree, case, dtype):
  crossover, frame, shapes = case
  first, second = make_tree(0, dtype), make_tree(1, dtype)
  child = jax.jit(crossover)(jax.random.key(0), first, second)
  assert isinstance(child, Child)
  assert frame_of(crossover) == frame
  assert jax.tree.structure(child.genotype) == jax.tree.structure(first)
  for leaf, like in zip(jax.tree.leaves(child.genotype), jax.tree.leaves(first), strict=True):
    assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
  assert {name: value.shape for name, value in child.note.items()} == shapes
  assert all(value.dtype == jnp.float32 for value in child.note.values())


def test_a_population_gets_one_child_and_one_note_a_key(make_tree, case):
  crossover, _, shapes = case
  first, second, keys = make_tree(2, lead=(3,)), make_tree(3, lead=(3,)), jax.random.split(jax.random.key(1), 3)
  children = jax.jit(jax.vmap(crossover))(keys, first, second)
  alone = jax.jit(crossover)
  assert {name: value.shape for name, value in children.note.items()} == {name: (3, *shapes[name]) for name in shapes}
  for i in range(3):
    pick = functools.partial(jax.tree.map, operator.itemgetter(i))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, pick(children), alone(keys[i], pick(first), pick(second)))


def test_the_key_alone_decides(make_tree, case):
  crossover = jax.jit(case[0])
  first, second = make_tree(4), make_tree(5)
  one, same, other = (crossover(jax.random.key(seed), first, second).genotype for seed in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, same)
  assert not np.array_equal(one["head"]["kernel"], other["head"]["kernel"])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"key": jnp.zeros(2)}, "key: expected a key from jax.random.key"),
    ({"first": {"w": jnp.arange(3)}}, r"first\['w'\]: expected floats"),
    ({"second": {"w": jnp.ones(4)}}, r"second\['w'\]"),
    ({"second": {"w": jnp.ones(3), "b": jnp.ones(3)}}, "second: has"),
  ],
)
def test_parents_that_do_not_fit_are_refused(case, changes, message):
  arguments = {"key": jax.random.key(0), "first": {"w": jnp.ones(3)}, "second": {"w": jnp.ones(3)}}
  with pytest.raises(ValueError, match=message):
    case[0](**(arguments | changes))


@pytest.mark.parametrize(
  ("crossover", "settings", "message"),
  [
    (linear_crossover, {"std": -0.1}, "std: expected a finite number of at least 0"),
    (linear_crossover, {"granularity": "leaf"}, "granularity: expected one of"),
    (line_crossover, {"iso_sigma": -0.1}, "iso_sigma: expected a finite number of at least 0"),
    (slerp_crossover, {"mean": np.ones(2)}, "mean: expected a scalar"),
    (slerp_crossover, {"std": -0.1}, "std: expected a finite number of at least 0"),
    (ties_crossover, {"std": -0.1}, "std: expected a finite number of at least 0"),
    (ties_crossover, {"density": 0.0}, r"density: expected a share in \(0, 1\], got 0.0"),
    (dare_crossover, {"std": -0.1}, "std: expected a finite number of at least 0"),
    (dare_crossover, {"drop_rate": 1.0}, r"drop_rate: expected a probability in \[0, 1\), got 1.0"),
    (line_crossover, {"line_sigma": float("nan")}, "line_sigma: expected a finite number of at least 0"),
  ],
)
def test_settings_out_of_range_are_refused(make_tree, crossover, settings, message):
  with pytest.raises(ValueError, match=message):
    crossover(jax.random.key(0), make_tree(0), make_tree(1), **settings)


def test_the_linear_crossover_is_the_linear_merge(make_tree):
  first, second = make_tree(6), make_tree(7)
  settings = {"std": 0.4, "mean": 0.8, "granularity": "layer", "normalize": False}
  child = linear_crossover(jax.random.key(2), first, second, **settings)
  genotype, weights = linear_merge(jax.random.key(2), first, second, with_weights=True, **settings)
  jax.tree.map(np.testing.assert_array_equal, child, Child(genotype, {"weights": weights}))


def test_the_line_crossover_is_qdaxs_variation_of_one_pair_to_the_bit(make_tree):
  first, second = make_tree(8), make_tree(9)
  settings = {"iso_sigma": 0.15, "line_sigma": 0.3}

  def qdaxs(key, first, second):
    pair = jax.tree.map(lambda leaf: leaf[None], (first, second))
    return jax.tree.map(lambda leaf: leaf[0], isoline_variation(*pair, key, **settings))

  ours = functools.partial(line_crossover, **settings)
  for transform in (lambda function: function, jax.jit):
    child = transform(ours)(jax.random.key(3), first, second)
    jax.tree.map(np.testing.assert_array_equal, child.genotype, transform(qdaxs)(jax.random.key(3), first, second))


def test_the_line_crossover_steps_along_the_line(make_tree, flat64):
  first, second = make_tree(10, jnp.bfloat16), make_tree(11, jnp.bfloat16)
  child = line_crossover(jax.random.key(4), first, second, iso_sigma=0.0, line_sigma=2.0).genotype
  a, b, c = map(flat64, (first, second, child))
  step = (c - a) @ (b - a) / ((b - a) @ (b - a))
  assert step != 0
  np.testing.assert_allclose(c, a + step * (b - a), rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_spherical_crossover_is_slerp_at_the_t_of_its_note(make_tree, flat64, dtype):
  first, second = make_tree(12, dtype), make_tree(13, dtype)
  child = slerp_crossover(jax.random.key(5), first, second)
  jax.tree.map(np.testing.assert_array_equal, child.genotype, slerp(first, second, child.note["t"]))
  a, b = flat64(first), flat64(second)
  np.testing.assert_allclose(child.note["angle"], np.arccos(a @ b / np.sqrt(a @ a * (b @ b))), rtol=1e-5)


def test_t_is_normal_and_without_spread_its_mean():
  # 4000 keys: standard errors are 0.2 / 63 = 0.0032 of the mean and 0.0022 of the standard deviation; the bounds are 6
  # of them, so that a change of the generator breaks one once in 10^8 times.
  parents = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
  crossover = functools.partial(slerp_crossover, mean=0.3)
  keys = jax.random.split(jax.random.key(6), 4000)
  t = np.asarray(jax.vmap(lambda key: crossover(key, *parents, std=0.2).note["t"])(keys))
  assert abs(t.mean() - 0.3) < 0.019
  assert abs(t.std() - 0.2) < 0.0134
  assert float(crossover(keys[0], *parents, std=0).note["t"]) == pytest.approx(0.3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_split_crossover_is_slerp_at_t_before_the_place_and_at_1_minus_t_behind_it(make_tree, flat64, dtype):
  first, second = make_tree(19, dtype), make_tree(20, dtype)
  crossover, wide = jax.jit(split_slerp_crossover), jnp.finfo(dtype).eps
  for seed in range(5):
    child = crossover(jax.random.key(seed), first, second)
    t = child.note["t"]
    before, behind = flat64(slerp(first, second, t)), flat64(slerp(first, second, 1 - t))
    place = round(float(child.note["split"]) * before.size)
    expected = np.concatenate([before[:place], behind[place:]])
    np.testing.assert_allclose(flat64(child.genotype), expected, rtol=4 * wide, atol=4 * wide)
    a, b = flat64(first), flat64(second)
    np.testing.assert_allclose(child.note["angle"], np.arccos(a @ b / np.sqrt(a @ a * (b @ b))), rtol=1e-5)


def test_the_place_of_a_split_and_t_are_uniform():
  # 6000 keys on 12 places: a count has a standard deviation of 21.4, and the mean of t one of 0.0037; the bounds are 6
  # of them, so that a change of the generator breaks one once in 10^7 times.
  first, second = ({"a": jnp.full((2, 4), number), "b": jnp.full(4, number)} for number in (1.0, 2.0))
  keys = jax.random.split(jax.random.key(21), 6000)
  note = jax.jit(jax.vmap(lambda key: split_slerp_crossover(key, first, second).note))(keys)
  counts = np.bincount(np.rint(12 * np.asarray(note["split"])).astype(int), minlength=12)
  assert counts.shape == (12,)
  assert (np.abs(counts - 500) < 6 * 21.4).all()
  assert abs(np.asarray(note["t"]).mean() - 0.5) < 6 * 0.0037


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ties_crossover_is_ties_with_the_weights_of_its_note(make_tree, dtype):
  first, second = make_tree(14, dtype), make_tree(15, dtype)
  child = ties_crossover(jax.random.key(7), first, second, density=0.3)
  pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
  jax.tree.map(np.testing.assert_array_equal, child.genotype, ties(pair, child.note["weights"][:, 0], density=0.3))
  assert child.note["weights"].sum() == pytest.approx(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dare_of_nothing_is_the_linear_merge_with_the_weights_of_the_note(make_tree, to_float64, check_close, dtype):
  first, second = make_tree(16, dtype), make_tree(17, dtype)
  child = dare_crossover(jax.random.key(8), first, second, drop_rate=0.0)
  ours, theirs = np.asarray(child.note["weights"], np.float64)[:, 0]
  expected = jax.tree.map(lambda a, b: ours * a + theirs * b, to_float64(first), to_float64(second))
  check_close(child.genotype, expected, dtype, scale=10.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dare_drops_entries_of_each_parent_on_its_own(dtype):
  # 20000 entries in four equally likely classes: each count has a standard deviation of 61; the bound is 6 of them, so
  # that a change of the generator breaks it once in 10^8 times.
  first, second = {"w": jnp.full(20_000, 1, dtype)}, {"w": jnp.full(20_000, 16, dtype)}
  child = dare_crossover(jax.random.key(9), first, second)
  ours, theirs = np.asarray(child.note["weights"], np.float64)[:, 0]
  values = np.array([0.0, 2 * ours, 32 * theirs, 2 * ours + 32 * theirs])
  distances = np.abs(np.asarray(child.genotype["w"], np.float64)[:, None] - values)
  nearest = distances.argmin(axis=1)
  assert (distances.min(axis=1) <= 0.51 * float(jnp.finfo(dtype).eps) * values[nearest]).all()
  assert (np.abs(np.bincount(nearest, minlength=4) - 5000) < 6 * 61.3).all()


@pytest.mark.parametrize(
  "crossover",
  [linear_crossover, slerp_crossover, split_slerp_crossover, functools.partial(ties_crossover, density=1.0)],
  ids=["linear", "slerp", "split_slerp", "ties"],
)
def test_the_child_of_equal_parents_is_their_equal(make_tree, to_float64, check_close, crossover):
  tree = make_tree(18)
  for index in range(5):
    check_close(jax.jit(crossover)(jax.random.key(index), tree, tree).genotype, to_float64(tree), scale=10.0)
