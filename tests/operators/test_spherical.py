import functools
import operator

import jax
import jax.numpy as jnp
import merge_oracles as oracle
import numpy as np
import pytest

from cqd_jax.genotypes import CoreBasis
from cqd_jax.low_rank import LowRank
from cqd_jax.operators import frame_of, slerp
from cqd_jax.operators.spherical import cosine_similarity, slerp_weights

DTYPES = [jnp.float32, jnp.bfloat16]


def arc(a, b, t):
  """SLERP of two float64 vectors, by rotation in their plane: from a's direction towards b's, scaled on the way."""
  along = a / np.linalg.norm(a)
  across = b - (b @ along) * along
  across /= np.linalg.norm(across)
  angle = np.arctan2(b @ across, b @ along)
  # Each end is its length times a unit vector; the arc through unit vectors is a rotation by t times the angle.
  share = np.sin(t * angle) / np.sin(angle)
  turned = np.cos(t * angle) * along + np.sin(t * angle) * across
  return np.linalg.norm(a) * turned + (np.linalg.norm(b) - np.linalg.norm(a)) * share * b / np.linalg.norm(b)


def leaves_like(tree, flat):
  """A flat vector in the shapes of a tree."""
  leaves, structure = jax.tree.flatten(tree)
  parts = np.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])
  return jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0, 1.4, -0.7])
def test_slerp_is_a_rotation_in_the_plane_of_its_ends(make_tree, flat64, check_close, dtype, t):
  first, second = make_tree(0, dtype), make_tree(1, dtype)
  expected = leaves_like(first, arc(flat64(first), 0.5 * flat64(second), t))
  half = jax.tree.map(lambda leaf: leaf / 2, second)  # exact; and now the lengths differ
  check_close(jax.jit(slerp)(first, half, t), expected, dtype, scale=10.0)


@pytest.mark.parametrize("angle", [0.01, 0.3, 1.5, 2.8, 3.1])
def test_the_length_of_ends_of_equal_length_is_kept(angle):
  ends = {"w": jnp.array([3.0, 0.0, 0.0])}, {"w": 3 * jnp.array([np.cos(angle), 0.0, np.sin(angle)], jnp.float32)}
  for t in np.linspace(0, 1, 7):
    middle = np.asarray(slerp(*ends, t)["w"], np.float64)
    np.testing.assert_allclose(middle, [3 * np.cos(t * angle), 0, 3 * np.sin(t * angle)], atol=2e-4 * max(angle, 1))


def test_both_ends_are_met_to_the_bit(make_tree):
  first, second = make_tree(2), make_tree(3)
  jax.tree.map(np.testing.assert_array_equal, slerp(first, second, 0.0), first)
  jax.tree.map(np.testing.assert_array_equal, slerp(first, second, 1.0), second)


def test_the_way_back_is_the_same(make_tree, to_float64, check_close):
  first, second = make_tree(4), make_tree(5)
  check_close(slerp(first, second, 0.3), to_float64(slerp(second, first, 0.7)), scale=10.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_ends_give_themselves(make_tree, to_float64, check_close, dtype):
  tree = make_tree(6, dtype)
  check_close(slerp(tree, tree, 0.37), to_float64(tree), dtype, scale=10.0)


def test_opposite_ends_are_joined_by_the_line(make_tree, to_float64, check_close):
  tree = make_tree(7)
  against = jax.tree.map(lambda leaf: -2 * leaf, tree)
  check_close(slerp(tree, against, 0.25), jax.tree.map(lambda leaf: 0.25 * leaf, to_float64(tree)), scale=10.0)


@pytest.mark.parametrize("length", [0.0, 1e-25])
def test_a_vector_without_direction_is_joined_by_the_line(make_tree, to_float64, check_close, length):
  tree = make_tree(8)
  nothing = jax.tree.map(lambda leaf: jnp.full_like(leaf, length), tree)
  check_close(slerp(nothing, tree, 0.25), jax.tree.map(lambda leaf: leaf / 4, to_float64(tree)), scale=10.0)
  check_close(slerp(tree, nothing, 0.25), jax.tree.map(lambda leaf: leaf * 3 / 4, to_float64(tree)), scale=10.0)
  for leaf in jax.tree.leaves(slerp(jax.tree.map(jnp.zeros_like, tree), jax.tree.map(jnp.zeros_like, tree), 0.25)):
    np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("other", ["random", "zero", "the same"])
def test_what_is_not_finite_makes_every_entry_nan(make_tree, bad, other):
  tree = make_tree(9)
  broken = {**tree, "head": {"kernel": tree["head"]["kernel"].at[1, 2].set(bad)}}
  second = {"random": make_tree(10), "zero": jax.tree.map(jnp.zeros_like, tree), "the same": broken}[other]
  for ends in ((broken, second), (second, broken)):
    for leaf in jax.tree.leaves(slerp(*ends, 0.5)):
      assert np.isnan(leaf).all()


@pytest.mark.parametrize("cosine", [0.999998, 0.9999995, -0.9994, 0.0])
@pytest.mark.parametrize("t", [0.2, 0.5])
def test_the_weights_are_those_of_the_arc_on_both_sides_of_a_switch(cosine, t):
  cosine = np.float32(cosine)
  angle = np.arccos(np.float64(cosine))
  expected = [np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)]
  # Near -1 a rounding of the angle is multiplied by cot(angle), about 30.
  np.testing.assert_allclose(np.array(slerp_weights(cosine, t)), expected, rtol=1e-4 if cosine < -0.9 else 1e-6)


@pytest.mark.parametrize("second", ["other", "itself", "opposite", "zero"])
def test_gradients_are_finite(make_tree, second):
  first = make_tree(11)
  scale = {"itself": 1.0, "opposite": -1.0, "zero": 0.0}
  other = make_tree(12) if second == "other" else jax.tree.map(lambda leaf: scale[second] * leaf, first)

  def objective(a, b, t):
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(slerp(a, b, t)))

  grads = jax.jit(jax.grad(objective, argnums=(0, 1, 2)))(first, other, 0.3)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_a_population_has_an_angle_each(make_tree):
  first, second, t = make_tree(13, lead=(3,)), make_tree(14, lead=(3,)), jnp.array([0.1, 0.5, 0.9])
  middles = jax.jit(jax.vmap(slerp))(first, second, t)
  for i in range(3):
    pick = functools.partial(jax.tree.map, operator.itemgetter(i))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, pick(middles), slerp(pick(first), pick(second), float(t[i])))


def test_the_cosine_takes_the_whole_individual(make_tree, flat64):
  first, second = make_tree(15), jax.tree.map(lambda leaf: 1e-15 * leaf, make_tree(16))
  a, b = flat64(first), flat64(second)
  np.testing.assert_allclose(cosine_similarity(first, second), a @ b / np.sqrt(a @ a * (b @ b)), rtol=1e-4)


def test_slerp_of_cores_is_the_core_of_slerp():
  source = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(source.normal(size=shape), jnp.float32)

  base = {"layers": {"up": {"kernel": draw(2, 8, 6), "bias": draw(2, 6)}}, "head": {"kernel": draw(6, 9)}}
  experts = [
    {
      "layers": {"up": {"kernel": LowRank(draw(2, 8, 2), draw(2, 2, 6)), "bias": draw(2, 6)}},
      "head": {"kernel": LowRank(draw(6, 1), draw(1, 9))},
    }
    for _ in range(2)
  ]
  basis = CoreBasis.from_experts(base, experts)
  cores = [jax.tree.map(operator.itemgetter(k), basis.experts) for k in range(2)]
  dense = [basis.task_vector(core) for core in cores]
  np.testing.assert_allclose(cosine_similarity(*cores), cosine_similarity(*dense), atol=1e-6)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, basis.task_vector(slerp(*cores, 0.3)), slerp(*dense, 0.3))
  jax.tree.map(close, slerp(*cores, 0.3), basis.encode(slerp(*dense, 0.3)))
  assert frame_of(slerp) == "inner_product"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"first": {"w": jnp.arange(3)}}, r"first\['w'\]: expected floats"),
    ({"second": {"w": jnp.ones(4)}}, r"second\['w'\]"),
    ({"second": {"v": jnp.ones(3)}}, "second: misses"),
    ({"t": float("nan")}, "t: expected a finite number"),
    ({"t": np.ones(2)}, "t: expected a scalar"),
  ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    slerp(**({"first": {"w": jnp.ones(3)}, "second": {"w": jnp.ones(3)}, "t": 0.5} | changes))


def test_mergekit_has_an_angle_for_each_tensor_and_a_line_between_near_ones(make_tree, to_float64):
  first, second = make_tree(20), make_tree(21)
  near = jax.tree.map(lambda one, other: one + 1e-2 * other, first, second)
  merge = jax.jit(functools.partial(slerp, t=0.3, granularity="kernel", convention="mergekit"))

  def on_arc(pair):
    return oracle.on_arc(*pair, 0.3, zero_cosine=0.0, straight=1 - 5e-4)

  for other in (second, near, jax.tree.map(jnp.zeros_like, second)):
    pairs = jax.tree.map(lambda *leaves: np.stack(leaves), to_float64(first), to_float64(other))
    expected = oracle.over_tensors(on_arc, pairs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6), merge(first, other), expected)
