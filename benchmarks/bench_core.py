"""Making children in core space against making them of dense weights, and a whole iteration of ask and tell."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import Case
from cqd_jax.archive import CyclingRepertoire, Grid
from cqd_jax.genotypes import CoreBasis
from cqd_jax.low_rank import LowRank
from cqd_jax.operators import expert_svd_mutation, factorise, linear_merge, svd_mutation
from cqd_jax.search import CycleQD, CycleQDEmitter
from cqd_jax.types import Genotype, Params

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
    factors = factorise(_pick(basis.experts, 0), rank=rank)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    svd = {
      "kernels": factors["kernels"]._replace(
        u=product(basis.left["kernels"], factors["kernels"].u),
        vt=product(factors["kernels"].vt, basis.right["kernels"].mT),
      )
    }
    return _keys(2), _dense(kernels, side, 2, 1), svd

  return _case(
    "expert_svd_mutation",
    (kernels, side, rank, children),
    jax.vmap(mutate, in_axes=(0, 0, None)),
    lambda basis, count: (
      _keys(count),
      _population(basis, count, 1),
      factorise(_pick(basis.experts, 0), rank=rank),
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
  """Ask and tell of one iteration in core space: select, merge, mutate, insert into three archives of 15 x 15."""
  basis = make_basis(kernels, side, rank)
  result = []
  for name, mutation, context in (
    ("expert_svd", functools.partial(expert_svd_mutation, rate=0.1), jax.vmap(factorise)(basis.experts)),
    ("svd", functools.partial(svd_mutation, max_scale=2.0), None),
  ):
    emitter = CycleQDEmitter(
      batch_size=children,
      crossover=functools.partial(linear_merge, std=0.01),
      mutation=mutation,
      task_context=context,
    )
    result.append(_iteration_case(name, CycleQD(None, emitter), basis, (kernels, side, rank, children)))
  return result


def _iteration_case(name: str, cycleqd: CycleQD, basis: CoreBasis, point: tuple[int, ...]) -> Case:
  children = point[-1]

  def iterate(carry: tuple[Any, Any, jax.Array]) -> tuple[Any, Any, jax.Array]:
    repertoire, state, key = carry
    key, ask_key, score_key = jax.random.split(key, 3)
    genotypes, info = cycleqd.ask(repertoire, state, ask_key)
    scores = jax.random.uniform(score_key, (children, EXPERTS))
    repertoire, state, _ = cycleqd.tell(genotypes, scores, repertoire, state, extra_info=info)
    return repertoire, state, key

  def arguments() -> tuple[Any, ...]:
    grid = Grid(lower=[0.0] * EXPERTS, upper=[1.0] * EXPERTS, shape=(15,) * EXPERTS)
    scores = jax.random.uniform(jax.random.key(3), (children, EXPERTS))
    repertoire = CyclingRepertoire.init(_population(basis, children, 1), scores, grid)
    state = cycleqd.init_ask_tell(basis.experts, jnp.eye(EXPERTS), grid, jax.random.key(0))[1]
    return ((repertoire, state, jax.random.key(1)),)

  return Case(
    name=f"ask and tell, {name}",
    labels=_labels(*point),
    function=iterate,
    arguments=arguments,
    items=children,
    item="children",
    recycle=0,
  )


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
