"""Insertion into the archives: K archives over one pool against K repertoires of QDax, on the same batches.

Both sides run inside one compiled loop with donated buffers, as in `lax.scan`, so it is the insertion that is timed and
not the dispatch. The peer holds K MapElitesRepertoires, one per task; "one archive" gives QDax the benefit of doing a
K-th of the work. An individual is a vector of 32 float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from qdax.core.containers.mapelites_repertoire import MapElitesRepertoire

from benchmarks.harness import Case
from cqd_jax.archive import CyclingRepertoire, Grid
from cqd_jax.archive.cells import other_tasks

GENES = 32


def cases(quick: bool) -> list[Case]:
  """Three archives of 15 x 15 cells and five of 15^4, for several batch sizes."""
  small, large = (15,) * 3, (15,) * (4 if quick else 5)
  batches = (8, 64) if quick else (8, 256, 4096)
  result = [insertion_case(small, batch, rounds=4 if quick else 20) for batch in batches]
  # QDax's search over all cells takes 16 GB at a batch of 4,096 in 15^4 cells: left out.
  result += [insertion_case(large, batch, rounds=2 if quick else 4) for batch in batches[:2]]
  return [*result, insertion_case(large, batches[0], rounds=2 if quick else 4, peer_archives=1)]


def insertion_case(shape: tuple[int, ...], batch: int, *, rounds: int, peer_archives: int | None = None) -> Case:
  """`rounds` insertions of `batch` individuals into K = len(shape) archives."""
  num_tasks = len(shape)
  grid = Grid([0.0] * num_tasks, [1.0] * num_tasks, shape)
  peers = peer_archives or num_tasks

  def arguments() -> tuple[Array, Array]:
    genotypes_key, scores_key = jax.random.split(jax.random.key(batch))
    return (
      jax.random.normal(genotypes_key, (rounds, batch, GENES)),
      jax.random.uniform(scores_key, (rounds, batch, num_tasks)),
    )

  return Case(
    name="insertion" if peers == num_tasks else "insertion, QDax: one archive",
    labels={"archives": num_tasks, "cells": max(grid.num_cells), "batch": batch, "insertions": rounds},
    function=_loop(_start_ours, _add_ours, grid, num_tasks),
    arguments=arguments,
    host=True,
    items=rounds * batch,
    item="individuals",
    peer=_loop(_start_peers, _add_to_peers, grid, peers),
    peer_name=f"QDax add, {peers} archives" if peers > 1 else "QDax add, 1 archive",
  )


def _loop(
  start: Callable[..., Any], add: Callable[..., Any], grid: Grid, num_archives: int
) -> Callable[[Array, Array], Any]:
  """A function that inserts all batches into a state which it keeps, and which is donated at every call."""
  state: list[Any] = []

  @functools.partial(jax.jit, donate_argnums=0)
  def insert_all(archives: Any, genotypes: Array, scores: Array) -> Any:
    def body(i: Array, carried: Any) -> Any:
      return add(carried, genotypes[i], scores[i])

    return jax.lax.fori_loop(0, genotypes.shape[0], body, archives)

  def run(genotypes: Array, scores: Array) -> Any:
    if not state:
      state.append(start(genotypes[0], scores[0], grid, num_archives))
    state[0] = insert_all(state[0], genotypes, scores)
    return state[0]

  return run


def _start_ours(genotypes: Array, scores: Array, grid: Grid, num_archives: int) -> CyclingRepertoire:
  del num_archives
  return CyclingRepertoire.init(genotypes, scores, grid)


def _add_ours(repertoire: CyclingRepertoire, genotypes: Array, scores: Array) -> CyclingRepertoire:
  return repertoire.add(genotypes, scores)


def _start_peers(genotypes: Array, scores: Array, grid: Grid, num_archives: int) -> list[MapElitesRepertoire]:
  others = other_tasks(grid.num_tasks)
  return [
    MapElitesRepertoire.init(
      genotypes=genotypes,
      fitnesses=scores[:, task],
      descriptors=scores[:, others[task]],
      centroids=jnp.asarray(grid.centroids(task)),
    )
    for task in range(num_archives)
  ]


def _add_to_peers(archives: list[MapElitesRepertoire], genotypes: Array, scores: Array) -> list[MapElitesRepertoire]:
  others = other_tasks(scores.shape[1])
  return [archive.add(genotypes, scores[:, others[task]], scores[:, task]) for task, archive in enumerate(archives)]
