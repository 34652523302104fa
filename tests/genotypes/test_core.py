import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import (
  MATRICES,
  dense_float64,
  low_rank_experts,
  pick,
  random_tree,
  relative_distance,
)

from cqd_jax.genotypes import CoreBasis, apply_coefficients, group_leaves
from cqd_jax.low_rank import LowRank, LowRankUpdate
from cqd_jax.operators import aggregate, expert_svd_mutation, factorize, gaussian_mutation, linear_merge, svd_mutation

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1.2e-2}
"""In Frobenius norms, of a task vector: some roundings of 2^-24, or of 2^-9."""

DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
RANKS = pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2), (4, 4, 4, 4), (1,), (3, 5)], ids=str)


def make_basis(ranks=(2, 1, 3), dtype=jnp.float32, seed=0):
  return CoreBasis.from_experts(random_tree(seed, dtype), low_rank_experts(seed + 1, ranks, dtype))


@DTYPES
@RANKS
def test_experts_given_as_factors_are_held_exactly(ranks, dtype):
  base, experts = random_tree(0, dtype), low_rank_experts(1, ranks, dtype)
  basis = CoreBasis.from_experts(base, experts)
  assert basis.num_experts == len(ranks)
  for index, expert in enumerate(experts):
    expected = dense_float64(expert)
    genotype = pick(basis.experts, index)
    assert relative_distance(basis.task_vector(genotype), expected) < TOLERANCE[dtype]
    params = jax.tree.map(lambda leaf, update: np.asarray(leaf, np.float64) + update, base, expected)
    model = basis.materialize(genotype)
    assert relative_distance(model, params) < TOLERANCE[dtype]
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(dtype)}
  assert {fit.path for fit in basis.fits()} == set(MATRICES)
  assert {(fit.rank, fit.energy, fit.relative_error) for fit in basis.fits()} == {(rank, 1.0, 0.0) for rank in ranks}


@RANKS
def test_bases_are_orthonormal_and_no_larger_than_needed(ranks):
  basis = make_basis(ranks)
  for name, tree in (("rows", basis.left), ("columns", basis.right)):
    for path, leaf in jax.tree.leaves_with_path(tree):
      *stack, size, rank = leaf.shape
      assert rank == min(size, sum(ranks)), (name, path)
      gram = np.einsum("...mi,...mj->...ij", *(np.asarray(leaf, np.float64),) * 2)
      np.testing.assert_allclose(gram, np.broadcast_to(np.eye(rank), (*stack, rank, rank)), atol=1e-6)


@DTYPES
@RANKS
def test_operators_commute_with_writing_out(ranks, dtype):
  """What is done to cores and then written out is what is done to what is written out."""
  basis = make_basis(ranks, dtype)
  key = jax.random.key(3)
  cores = basis.experts
  dense = jax.vmap(basis.task_vector)(cores)
  last = len(ranks) - 1

  def compare(operate, tolerance=TOLERANCE[dtype]):
    ours = basis.task_vector(operate(cores))
    assert relative_distance(ours, operate(dense)) < tolerance

  for granularity in ("model", "layer", "kernel"):
    merge = functools.partial(linear_merge, std=0.5, granularity=granularity)
    compare(lambda tree, merge=merge: merge(key, pick(tree, 0), pick(tree, last)))
  compare(lambda tree: aggregate(tree, jnp.linspace(0.1, 0.9, len(ranks))))
  # Singular vectors turn by the rounding over the gap between neighboring values.
  compare(lambda tree: svd_mutation(key, pick(tree, 0), max_scale=2.0), 10 * TOLERANCE[dtype])

  def add_part(tree):
    return expert_svd_mutation(key, pick(tree, 0), factorize(pick(tree, last)), rate=0.7)

  compare(add_part, 10 * TOLERANCE[dtype])
  truncated = expert_svd_mutation(key, pick(cores, 0), factorize(pick(cores, last), rank=max(ranks)), rate=0.7)
  assert relative_distance(truncated, add_part(cores)) < 1e-5


def test_a_chain_of_variations_stays_in_the_space_and_does_not_drift():
  basis = make_basis((2, 3, 2))
  dense_experts = jax.vmap(basis.task_vector)(basis.experts)

  @jax.jit
  def step(key, individual, experts, svds):
    keys = jax.random.split(key, 3)
    other = jax.random.randint(keys[0], (), 0, 3)
    merged = linear_merge(keys[1], individual, pick(experts, other), std=0.3)
    return expert_svd_mutation(keys[2], merged, pick(svds, other), rate=0.3)

  core, dense = pick(basis.experts, 0), pick(dense_experts, 0)
  svds = [jax.vmap(factorize)(experts) for experts in (basis.experts, dense_experts)]
  for number in range(100):
    key = jax.random.key(number)
    core, dense = step(key, core, basis.experts, svds[0]), step(key, dense, dense_experts, svds[1])
  assert relative_distance(basis.task_vector(core), dense) < 1e-5
  # The dense chain never left the space either: nothing of it is lost when it is projected.
  assert relative_distance(basis.task_vector(basis.encode(dense)), dense) < 1e-5

  for number in range(100):
    core = svd_mutation(jax.random.key(number), core, max_scale=2.0)
  back = basis.encode(basis.task_vector(core))
  assert relative_distance(back, core) < 1e-5


@DTYPES
def test_encode_undoes_task_vector_and_projects_what_lies_outside(dtype):
  basis = make_basis(dtype=dtype)
  genotype = linear_merge(jax.random.key(0), pick(basis.experts, 0), pick(basis.experts, 2), std=0.4)
  assert relative_distance(basis.encode(basis.task_vector(genotype)), genotype) < TOLERANCE[dtype]
  outside = random_tree(9, dtype)
  encoded = basis.encode(outside)
  for path, own in jax.tree.leaves_with_path(encoded["layers"]):
    if path[0].key in ("up", "down") and path[1].key == "kernel":
      left, right, dense = (
        np.asarray(tree["layers"][path[0].key]["kernel"], np.float64) for tree in (basis.left, basis.right, outside)
      )
      expected = np.einsum("lma,lmn,lnb->lab", left, dense, right)
      np.testing.assert_allclose(own, expected, atol=TOLERANCE[dtype] * np.abs(dense).max() * 4)
  assert relative_distance(encoded["norm"], outside["norm"]) == 0


@pytest.mark.parametrize("method", ["exact", "randomized", "auto"])
def test_dense_experts_are_truncated_by_rank(method):
  base, experts = random_tree(0), random_tree(1, lead=(3,))
  basis = CoreBasis.from_experts(base, experts, rank=2, method=method)
  for fit in basis.fits():
    name = fit.path.split("/")
    dense = np.asarray(functools.reduce(lambda tree, part: tree[part], name, experts), np.float64)[fit.expert]
    values = np.linalg.svd(dense, compute_uv=False)
    lost = np.sqrt(1 - (values[..., :2] ** 2).sum(-1) / (values**2).sum(-1)).max()
    assert fit.rank == 2
    # The randomized way has more samples than these small matrices have columns, so it is exact.
    np.testing.assert_allclose(fit.relative_error, lost, rtol=1e-5)
    np.testing.assert_allclose(fit.energy, 1 - lost**2, rtol=1e-5)


def test_dense_experts_of_full_rank_are_held_exactly():
  base, experts = random_tree(0), random_tree(1, lead=(3,))
  basis = CoreBasis.from_experts(base, experts)
  for index in range(3):
    assert relative_distance(basis.task_vector(pick(basis.experts, index)), pick(experts, index)) < 2e-6
  assert max(fit.relative_error for fit in basis.fits()) < 1e-6


def test_stacked_and_listed_experts_are_the_same():
  base, experts = random_tree(0), random_tree(1, lead=(3,))
  stacked = CoreBasis.from_experts(base, experts, rank=2)
  listed = CoreBasis.from_experts(base, [pick(experts, index) for index in range(3)], rank=2)
  jax.tree.map(np.testing.assert_array_equal, stacked, listed)


def test_energy_decides_the_rank_of_the_layer_that_needs_most():
  source = np.random.default_rng(0)
  spectra = np.array([[4.0, 1.0, 0.1, 0.01], [4.0, 3.0, 2.0, 0.1]])
  u, v = (np.linalg.qr(source.normal(size=(2, size, 4)))[0] for size in (8, 6))
  task_vector = {"layers": {"up": {"kernel": jnp.asarray(u * spectra[:, None] @ v.transpose(0, 2, 1), jnp.float32)}}}
  base = jax.tree.map(jnp.zeros_like, task_vector)
  for energy, rank in ((0.5, 1), (0.85, 2), (0.9, 3), (0.999, 3), (1.0, 4)):
    kept = min((spectra[:, :rank] ** 2).sum(1) / (spectra**2).sum(1))
    for method in ("exact", "randomized"):
      (fit,) = CoreBasis.from_experts(base, [task_vector], energy=energy, method=method).fits()
      assert fit.rank == rank
      np.testing.assert_allclose(fit.energy, kept, atol=1e-6)
      assert fit.energy >= energy - 1e-5


def test_ranks_by_path():
  base, experts = random_tree(0), random_tree(1, lead=(2,))
  basis = CoreBasis.from_experts(base, experts, rank={"layers/up/kernel": 1, "*": 3})
  assert {(fit.path, fit.rank) for fit in basis.fits()} == {
    (path, 1 if path == "layers/up/kernel" else 3) for path in MATRICES
  }
  assert basis.experts["layers"]["up"]["kernel"].shape == (2, 3, 2, 2)


def test_what_an_expert_left_alone_costs_one_column():
  base = random_tree(0)
  experts = [jax.tree.map(lambda _: None, base) for _ in range(2)]
  experts[1]["blocks_1"]["kernel"] = LowRank(jnp.ones((7, 1)), jnp.ones((1, 5)))
  basis = CoreBasis.from_experts(base, experts)
  model = basis.materialize(pick(basis.experts, 0))
  jax.tree.map(np.testing.assert_array_equal, model, base)
  changed = basis.materialize(pick(basis.experts, 1))
  np.testing.assert_allclose(changed["blocks_1"]["kernel"], base["blocks_1"]["kernel"] + 1, atol=1e-6)
  assert {(fit.path, fit.expert): fit.rank for fit in basis.fits()}[("blocks_1/kernel", 1)] == 1
  assert sum(fit.rank for fit in basis.fits()) == 1


@pytest.mark.parametrize("case", ["zero", "equal", "deficient", "one"])
def test_degenerate_experts(case):
  base, experts = random_tree(0), random_tree(1, lead=(3,))
  if case == "zero":
    experts = jax.tree.map(lambda leaf: leaf.at[1].set(0.0), experts)
  elif case == "equal":
    experts = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), experts)
  elif case == "deficient":  # columns that repeat: rank 1 in all experts, asked for rank 3
    experts = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[..., :1], leaf.shape), experts)
  else:
    experts = jax.tree.map(lambda leaf: leaf[:1], experts)
  for options in ({"rank": 3}, {"energy": 0.99}, {"rank": 3, "method": "randomized"}, {}):
    basis = CoreBasis.from_experts(base, experts, **options)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(basis))
    child = svd_mutation(jax.random.key(0), pick(basis.experts, 0), max_scale=2.0)
    context = factorize(pick(basis.experts, -1))
    child = expert_svd_mutation(jax.random.key(1), child, context, rate=0.5)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(basis.materialize(child)))
    if case == "deficient" or not options:
      for index in range(basis.num_experts):
        held, given = basis.task_vector(pick(basis.experts, index)), pick(experts, index)
        assert relative_distance(held, given) < 1e-5
  if case == "zero":
    zero = [fit for fit in basis.fits() if fit.expert == 1]
    assert {(fit.energy, fit.relative_error) for fit in zero} == {(1.0, 0.0)}


def test_tiny_task_vectors_are_measured_as_well():
  base, experts = random_tree(0), random_tree(1, lead=(2,))
  tiny = jax.tree.map(lambda leaf: leaf * 1e-25, experts)
  usual, small = (CoreBasis.from_experts(base, each, rank=2).fits() for each in (experts, tiny))
  for one, other in zip(usual, small, strict=True):
    np.testing.assert_allclose(one.relative_error, other.relative_error, rtol=1e-4)


def test_gaussian_noise_on_cores_is_noise_of_the_same_size_within_the_space():
  basis = make_basis()
  zero = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), basis.experts)
  noise = gaussian_mutation(jax.random.key(0), zero, std=0.01)
  written = basis.task_vector(noise)
  for own, dense in zip(jax.tree.leaves(noise), jax.tree.leaves(written), strict=True):
    np.testing.assert_allclose(np.linalg.norm(own), np.linalg.norm(dense), rtol=1e-5)


@pytest.mark.parametrize("granularity", ["model", "layer", "kernel"])
def test_coefficients_are_applied_through_the_bases(granularity):
  basis = make_basis((2, 1, 3))
  groups = group_leaves(basis.base, granularity)
  coefficients = jax.random.normal(jax.random.key(5), (3, groups.size))
  ours = basis.task_vector(apply_coefficients(coefficients, basis.experts, groups))
  dense = apply_coefficients(coefficients, jax.vmap(basis.task_vector)(basis.experts), groups)
  assert relative_distance(ours, dense) < 2e-6

  def norm(coefficients):
    model = basis.materialize(apply_coefficients(coefficients, basis.experts, groups))
    return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(model))

  gradient = jax.grad(norm)(coefficients)
  step = jnp.zeros_like(coefficients).at[1, 0].set(1e-2)
  slope = (norm(coefficients + step) - norm(coefficients - step)) / 2e-2
  np.testing.assert_allclose(gradient[1, 0], slope, rtol=2e-3)


def test_apply_shares_the_base_and_is_the_materialized_model():
  basis = make_basis()
  individual = pick(basis.experts, 1)
  model, applied = basis.materialize(individual), basis.apply(individual)
  kernel = applied["layers"]["up"]["kernel"]
  assert isinstance(kernel, LowRankUpdate)
  assert kernel.kernel is basis.base["layers"]["up"]["kernel"]
  np.testing.assert_allclose(applied["layers"]["up"]["bias"], model["layers"]["up"]["bias"], rtol=1e-6)
  population = basis.apply(basis.experts)
  assert population["layers"]["up"]["kernel"].kernel is basis.base["layers"]["up"]["kernel"]
  assert population["layers"]["up"]["kernel"].core.shape[0] == 3
  np.testing.assert_array_equal(population["norm"]["scale"][1], applied["norm"]["scale"])


def test_materialize_leaves_gives_one_leaf_after_the_other():
  basis = make_basis()
  individual = pick(basis.experts, 0)
  listed = dict(basis.materialize_leaves(individual))
  assert listed.keys() == {("embed", "embedding"), ("layers", "up", "kernel"), ("layers", "up", "bias"),
                           ("layers", "down", "kernel"), ("blocks_1", "kernel"), ("norm", "scale")}  # fmt: skip
  np.testing.assert_array_equal(listed[("norm", "scale")], basis.materialize(individual)["norm"]["scale"])


def test_genotypes_can_be_bfloat16():
  basis = CoreBasis.from_experts(random_tree(0), random_tree(1, lead=(2,)), rank=2, dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(basis.experts)} == {jnp.dtype(jnp.bfloat16)}
  assert jax.tree.leaves(basis.task_vector(pick(basis.experts, 0)))[0].dtype == jnp.float32


NAN = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan), random_tree(1, lead=(2,)))


@pytest.mark.parametrize(
  ("experts", "options", "message"),
  [
    ([], {}, "task_vectors: expected at least one expert"),
    (random_tree(1, lead=(0,)), {}, "task_vectors: expected at least one expert"),
    ({"other": jnp.ones((2, 3))}, {}, "task_vectors: expected the structure of the base"),
    ([random_tree(1), {"other": jnp.ones(3)}], {}, r"task_vectors\[1\]: expected the structure of the base"),
    (random_tree(1, lead=(2, 2)), {}, r"task_vectors\[0\] at .*: expected shape"),
    ([random_tree(1) | {"norm": {"scale": LowRank(jnp.ones((6, 1)), jnp.ones((1, 6)))}}], {}, "of a matrix of shape"),
    ([random_tree(1) | {"blocks_1": {"kernel": LowRank(jnp.ones((7, 2)), jnp.ones((1, 5)))}}], {}, "blocks_1/kernel"),
    ([random_tree(1) | {"blocks_1": {"kernel": jnp.ones((7, 5), jnp.int32)}}], {}, "expected floats, got int32"),
    (NAN, {}, "holds NaN or infinite values"),
    (random_tree(1, lead=(2,)), {"rank": 0}, "rank: expected at least 1, got 0"),
    (random_tree(1, lead=(2,)), {"rank": True}, "rank: expected an integer, got True"),
    (random_tree(1, lead=(2,)), {"rank": {}}, "rank: expected a rank by path, got none"),
    (random_tree(1, lead=(2,)), {"rank": 2, "key": jnp.zeros(2)}, "key: expected a key"),
    (
      jax.tree.map(lambda leaf: leaf * 1e6, random_tree(1, lead=(2,))),
      {"dtype": jnp.float16},
      "too large for the dtype",
    ),
    (
      [
        random_tree(1)
        | {
          "layers": {
            **random_tree(1)["layers"],
            "up": {"kernel": None, "bias": LowRank(jnp.ones((3, 1)), jnp.ones((1, 9)))},
          }
        }
      ],
      {},
      "layers/up/bias: expected factors of a matrix",
    ),
    (random_tree(1, lead=(2,)), {"rank": {"norm/scale": 2, "*": 1}}, "'norm/scale' is no matrix"),
    (random_tree(1, lead=(2,)), {"rank": {"blocks_1/kernel": 2}}, "rank: misses 'embed/embedding'"),
    (random_tree(1, lead=(2,)), {"rank": 2, "energy": 0.5}, "energy: expected None beside a rank"),
    (random_tree(1, lead=(2,)), {"energy": 1.5}, "energy: expected a share"),
    (random_tree(1, lead=(2,)), {"energy": float("nan")}, "energy: expected a share"),
    (random_tree(1, lead=(2,)), {"method": "svd"}, "method: expected one of auto, exact, randomized, got 'svd'"),
    (random_tree(1, lead=(2,)), {"dtype": jnp.int8}, "dtype: expected a float"),
  ],
)
def test_bad_input_is_named(experts, options, message):
  with pytest.raises(ValueError, match=message):
    CoreBasis.from_experts(random_tree(0), experts, **options)


def test_a_leaf_of_another_shape_is_named():
  basis = make_basis()
  dense = basis.task_vector(pick(basis.experts, 0))
  for method in (basis.task_vector, basis.materialize, basis.apply):
    with pytest.raises(ValueError, match=r"genotype at blocks_1/kernel: expected shape \(6, 5\), got \(7, 5\)"):
      method(dense)
  with pytest.raises(ValueError, match=r"task_vector at blocks_1/kernel: expected shape \(7, 5\), got \(6, 5\)$"):
    basis.encode(pick(basis.experts, 0))


def test_a_base_that_is_a_list_takes_stacked_experts_and_listed_ones():
  base, experts = [random_tree(0)], [random_tree(1, lead=(2,))]
  stacked = CoreBasis.from_experts(base, experts, rank=2)
  listed = CoreBasis.from_experts(base, [pick(experts, index) for index in range(2)], rank=2)
  jax.tree.map(np.testing.assert_array_equal, stacked, listed)


def test_surplus_rank_is_no_noise_in_the_basis():
  """Beyond the experts' own rank nothing is found, or the cores would be written in directions that are rounding."""
  base = random_tree(0)
  experts = [jax.tree.map(jnp.asarray, dense_float64(each)) for each in low_rank_experts(1, (1, 1))]
  experts = jax.tree.map(lambda *leaves: jnp.stack(leaves).astype(jnp.float32), *experts)
  noisy = jax.tree.map(lambda leaf: leaf * (1 + 2**-23), experts)
  usual, other = (CoreBasis.from_experts(base, each, rank=4) for each in (experts, noisy))
  for index in range(2):
    through_other = other.task_vector(pick(usual.experts, index))
    assert relative_distance(through_other, pick(experts, index)) < 1e-5


def test_float64_stays_float64():
  with jax.enable_x64(True):
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) / 3, random_tree(0))
    basis = CoreBasis.from_experts(base, low_rank_experts(1, (2, 1)))
    zero = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), basis.experts)
    jax.tree.map(np.testing.assert_array_equal, basis.materialize(zero), base)
    np.testing.assert_array_equal(basis.apply(zero)["norm"]["scale"], base["norm"]["scale"])


def test_a_genotype_of_another_structure_is_refused():
  basis = make_basis()
  for method in (basis.task_vector, basis.materialize, basis.apply, basis.encode):
    with pytest.raises(ValueError, match="expected the structure of the base's params"):
      method({"other": jnp.ones(3)})
