"""Making children in core space against making them of dense weights: operator by operator, and by ask and tell."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from benchmarks.harness import Case
from cqd_jax.archive import CyclingRepertoire, Grid
from cqd_jax.genotypes import CoreBasis
from cqd_jax.low_rank import LowRank
from cqd_jax.operators import expert_svd_mutation, factorize, linear_merge, svd_mutation
from cqd_jax.search import CycleQD, CycleQDEmitter
from cqd_jax.types import Genotype, Params

Carry: TypeAlias = tuple[CyclingRepertoire, Any, jax.Array]

EXPERTS = 3
SETTLED = (8, 1024, 16, 32)
"""Kernels, their side, rank, children: the point around which one thing is varied at a time."""


def cases(quick: bool) -> list[Case]:
  """Each operator over sizes, ranks and populations; then ask and tell."""
  if quick:
    points, svd_points = [(2, 64, 4, 4)], [(2, 64, 4, 4)]
  else:
    kernels, side, rank, children = SETTLED
    others = [(kernels, side, rank, each) for each in (1, 256)] + [(kernels, side, each, children) for each in (4, 64)]
    sizes = [(kernels, 256, rank, children), (2, 4096, rank, children)]
    points, svd_points = [SETTLED, *others, *sizes], [SETTLED, *others, sizes[0]]
  result = []
  for point in points:
    result += [crossover_case(*point), expert_svd_case(*point)]
  # Dense decompositions of 4096 x 4096 would take minutes each.
  result += [svd_case(*point) for point in svd_points]
  return [*result, *iteration_cases(*points[0])]


def crossover_case(kernels: int, side: int, rank: int, children: int) -> Case:
  """Two parents a child, merged; the dense children go into their first parents' buffers, at copy bandwidth."""
  merge = functools.partial(linear_merge, std=0.01)
  return _case(
    "linear_merge",
    (kernels, side, rank, children),
    jax.vmap(merge),
    lambda basis, count: (_keys(count), _population(basis, count, 1), _population(basis, count, 2)),
    dense=(2, lambda: (_keys(2), _dense(kernels, side, 2, 1), _dense(kernels, side, 2, 2))),
    recycle=1,
  )


def expert_svd_case(kernels: int, side: int, rank: int, children: int) -> Case:
  """The reference code's mutation: the dense one multiplies factors of the experts' own rank."""
  mutate = functools.partial(expert_svd_mutation, rate=0.1)

  def dense() -> tuple[Any, ...]:
    basis = make_basis(kernels, side, rank)
    return _keys(2), _dense(kernels, side, 2, 1), written_out(basis, _pick(basis.experts, 0), rank)

  return _case(
    "expert_svd_mutation",
    (kernels, side, rank, children),
    jax.vmap(mutate, in_axes=(0, 0, None)),
    lambda basis, count: (
      _keys(count),
      _population(basis, count, 1),
      factorize(_pick(basis.experts, 0), rank=rank),
    ),
    dense=(2, dense),
    recycle=1,
  )


def svd_case(kernels: int, side: int, rank: int, children: int) -> Case:
  """The paper's mutation: a decomposition a kernel and child."""
  mutate = functools.partial(svd_mutation, max_scale=2.0)
  return _case(
    "svd_mutation",
    (kernels, side, rank, children),
    jax.vmap(mutate),
    lambda basis, count: (_keys(count), _population(basis, count, 1)),
    dense=(1, lambda: (_keys(1), _dense(kernels, side, 1, 1))),
    recycle=1,
  )


def iteration_cases(kernels: int, side: int, rank: int, children: int) -> list[Case]:
  """Ask and tell of one iteration: select, merge, mutate, insert; dense ones into a pool of a few individuals."""
  return [_iteration_case(name, kernels, side, rank, children) for name in ("expert_svd", "svd")]


def _iteration_case(mutation: str, kernels: int, side: int, rank: int, children: int) -> Case:
  dense_children = 2 if mutation == "expert_svd" else 1
  made: list[Any] = []

  def dense_carry() -> Carry:
    basis = make_basis(kernels, side, rank)
    experts = jax.vmap(basis.task_vector)(basis.experts)
    factors = jax.vmap(lambda expert: written_out(basis, expert, rank))(basis.experts)
    return _begin(mutation, experts, factors, dense_children, capacity=8)

  def core_carry() -> Carry:
    basis = make_basis(kernels, side, rank)
    factors = jax.vmap(functools.partial(factorize, rank=rank))(basis.experts)
    return _begin(mutation, basis.experts, factors, children, capacity=None)

  def peer(*_: Any) -> Carry:
    if not made:
      iterate = functools.partial(_iterate, mutation, dense_children)
      made.extend((jax.jit(iterate, donate_argnums=0), dense_carry()))
    made[1] = made[0](made[1])
    return made[1]

  return Case(
    name=f"ask and tell, {mutation}",
    labels=_labels(kernels, side, rank, children),
    function=functools.partial(_iterate, mutation, children),
    arguments=lambda: (core_carry(),),
    items=children,
    item="children",
    recycle=0,
    peer=peer,
    peer_name="dense, by the child",
    peer_items=dense_children,
  )


def _begin(mutation: str, experts: Genotype, factors: Genotype, children: int, capacity: int | None) -> Carry:
  """Repertoire, state of the emitter and key before the first iteration."""
  grid = Grid(lower=[0.0] * EXPERTS, upper=[1.0] * EXPERTS, shape=(15,) * EXPERTS)
  scores = 0.9 * jnp.eye(EXPERTS) + 0.05
  cycleqd = _cycleqd(mutation, factors if mutation == "expert_svd" else None, children)
  repertoire, state, _ = cycleqd.init_ask_tell(experts, scores, grid, jax.random.key(0), capacity=capacity)
  return repertoire, state, jax.random.key(1)


def _iterate(mutation: str, children: int, carry: Carry) -> Carry:
  """One iteration with random scores."""
  repertoire, state, key = carry
  cycleqd = _cycleqd(mutation, state.task_context, children)
  key, ask_key, score_key = jax.random.split(key, 3)
  genotypes, info = cycleqd.ask(repertoire, state, ask_key)
  scores = jax.random.uniform(score_key, (children, EXPERTS))
  repertoire, state, _ = cycleqd.tell(genotypes, scores, repertoire, state, extra_info=info)
  return repertoire, state, key


def _cycleqd(mutation: str, factors: Genotype | None, children: int) -> CycleQD:
  operators: dict[str, Callable[..., Params]] = {
    "expert_svd": functools.partial(expert_svd_mutation, rate=0.1),
    "svd": functools.partial(svd_mutation, max_scale=2.0),
  }
  emitter = CycleQDEmitter(
    batch_size=children,
    crossover=functools.partial(linear_merge, std=0.01),
    mutation=operators[mutation],
    task_context=factors,
  )
  return CycleQD(None, emitter)


def written_out(basis: CoreBasis, genotype: Genotype, rank: int) -> Genotype:
  """The dense factors of an expert, from those of its core."""
  svd = factorize(genotype, rank=rank)["kernels"]
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  u, vt = product(basis.left["kernels"], svd.u), product(svd.vt, basis.right["kernels"].mT)
  return {"kernels": svd._replace(u=u, vt=vt)}


def make_basis(kernels: int, side: int, rank: int) -> CoreBasis:
  """Three random experts of the given rank, on a base of zeros."""

  def expert(seed: int) -> Params:
    b, a = jax.random.normal(jax.random.key(seed), (2, kernels, side, rank))
    return {"kernels": LowRank(b, a.mT)}

  base = {"kernels": jnp.zeros((kernels, side, side))}
  return CoreBasis.from_experts(base, [expert(seed) for seed in range(EXPERTS)])


def _case(
  name: str,
  point: tuple[int, int, int, int],
  function: Callable[..., Genotype],
  arguments: Callable[[CoreBasis, int], tuple[Any, ...]],
  *,
  dense: tuple[int, Callable[[], tuple[Any, ...]]],
  recycle: int,
) -> Case:
  """`function` on cores, against itself on dense weights: compiled, its buffers reused, fewer children a call."""
  kernels, side, rank, children = point
  dense_children, dense_arguments = dense
  made: list[Any] = []

  def peer(*_: Any) -> Genotype:
    if not made:
      compiled = jax.jit(function, donate_argnums=(recycle,))
      made.extend((compiled, list(dense_arguments())))
    compiled, given = made
    given[recycle] = compiled(*given)
    return given[recycle]

  return Case(
    name=name,
    labels=_labels(*point),
    function=function,
    arguments=lambda: arguments(make_basis(kernels, side, rank), children),
    items=children,
    item="children",
    recycle=recycle,
    peer=peer,
    peer_name="dense, by the child",
    peer_items=dense_children,
  )


def _labels(kernels: int, side: int, rank: int, children: int) -> dict[str, str | int | float]:
  return {"kernels": f"{kernels} of {side}x{side}", "K": EXPERTS, "rank": rank, "P": children}


def _population(basis: CoreBasis, count: int, seed: int) -> Genotype:
  weights = jax.random.dirichlet(jax.random.key(seed), jnp.ones(EXPERTS), (count,))
  return jax.tree.map(lambda leaf: jnp.einsum("pk,k...->p...", weights, leaf), basis.experts)


def _dense(kernels: int, side: int, children: int, seed: int) -> Params:
  return {"kernels": jax.random.normal(jax.random.key(seed), (children, kernels, side, side))}


def _pick(population: Genotype, index: int) -> Genotype:
  return jax.tree.map(lambda leaf: leaf[index], population)


def _keys(count: int) -> jax.Array:
  return jax.random.split(jax.random.key(7), count)
