"""CycleQD in core space and on merge coefficients, driven by our emitter and by QDax's, all of it in `lax.scan`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.emitters.cma_improvement_emitter import CMAImprovementEmitter
from qdax.core.emitters.mutation_operators import isoline_variation
from qdax.core.emitters.standard_emitters import MixingEmitter

from cqd_jax.archive import Grid
from cqd_jax.genotypes import CoreBasis, apply_coefficients, group_leaves
from cqd_jax.low_rank import LowRank
from cqd_jax.operators import expert_svd_mutation, factorize, linear_merge
from cqd_jax.search import CycleQD, CycleQDEmitter, PerArchiveEmitter

pytestmark = pytest.mark.usefixtures("qdax_ranks")

GRID = Grid(lower=[0.0] * 3, upper=[1.0] * 3, shape=(6, 6, 6))


def make_basis():
  source = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(source.normal(size=shape), jnp.float32)

  base = {"layers": {"up": {"kernel": draw(2, 8, 6), "bias": draw(2, 6)}}}
  experts = [
    {"layers": {"up": {"kernel": LowRank(draw(2, 8, 2), draw(2, 2, 6)), "bias": draw(2, 6)}}} for _ in range(3)
  ]
  return CoreBasis.from_experts(base, experts)


BASIS = make_basis()
GROUPS = group_leaves(BASIS.base, "kernel")
MODELS = jax.vmap(BASIS.materialize)(BASIS.experts)


def from_coefficients(coefficients):
  return apply_coefficients(coefficients.reshape(3, GROUPS.size), BASIS.experts, GROUPS)


def likeness(to_core, genotypes, key):
  """How near each individual's model is to each of the three experts' models."""
  del key
  models = jax.vmap(lambda genotype: BASIS.materialize(to_core(genotype)))(genotypes)

  def distance(model, target):
    squares = jax.tree.map(lambda one, other: jnp.square(one - other).mean(), model, target)
    return sum(jax.tree.leaves(squares))

  distances = jax.vmap(lambda model: jax.vmap(lambda target: distance(model, target))(MODELS))(models)
  return jnp.exp(-distances / 4), {}


def ours():
  return CycleQDEmitter(
    batch_size=8,
    crossover=functools.partial(linear_merge, std=0.2),
    mutation=functools.partial(expert_svd_mutation, rate=0.3),
    task_context=jax.vmap(functools.partial(factorize, rank=2))(BASIS.experts),
  )


def lines():
  variation = functools.partial(isoline_variation, iso_sigma=0.05, line_sigma=0.3)
  return MixingEmitter(mutation_fn=None, variation_fn=variation, variation_percentage=1.0, batch_size=8)


def cma():
  return PerArchiveEmitter(
    CMAImprovementEmitter(
      batch_size=8, genotype_dim=3 * GROUPS.size, centroids=jnp.asarray(GRID.centroids(0)), sigma_g=0.2
    )
  )


ONE_HOT = jnp.repeat(jnp.eye(3)[:, :, None], GROUPS.size, axis=2)
CASES = {
  "cores, ours": (BASIS.experts, lambda genotype: genotype, ours),
  "cores, iso+line": (BASIS.experts, lambda genotype: genotype, lines),
  "coefficients, iso+line": (ONE_HOT, from_coefficients, lines),
  "coefficients, CMA-ME": (ONE_HOT.reshape(3, -1), from_coefficients, cma),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loop_fills_the_archives(name):
  initial, to_core, make_emitter = CASES[name]
  score = functools.partial(likeness, to_core)
  cycleqd = CycleQD(score, make_emitter())
  repertoire, state, before = cycleqd.init(initial, GRID, jax.random.key(0))
  carry = (repertoire, state, jax.random.key(1))
  (repertoire, _, _), metrics = jax.lax.scan(cycleqd.scan_update, carry, length=30)
  assert (np.asarray(metrics["coverage"][-1]) > np.asarray(before["coverage"])).all()
  alive = np.asarray(repertoire.alive)
  np.testing.assert_allclose(
    np.asarray(score(repertoire.genotypes, None)[0])[alive], np.asarray(repertoire.scores)[alive], atol=1e-5
  )


def test_gradients_reach_coefficients_through_a_core_space_model():
  def loss(coefficients):
    return -likeness(from_coefficients, coefficients[None], None)[0][0, 1]

  start = jnp.full((3, GROUPS.size), 0.4)
  step = jax.jit(jax.value_and_grad(loss))
  first, _ = step(start)
  for _ in range(200):
    value, gradient = step(start)
    start = start - 0.3 * gradient
  assert value < first - 0.2
  np.testing.assert_allclose(start, ONE_HOT[1], atol=0.2)
