"""Parents out of QDax's repertoires that are no MAP-Elites archives: fronts in cells, populations without cells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.containers.mome_repertoire import MOMERepertoire
from qdax.core.containers.nsga2_repertoire import NSGA2Repertoire

from cqd_jax.search import CycleQDEmitter

pytestmark = [
  pytest.mark.usefixtures("qdax_ranks"),
  pytest.mark.filterwarnings("ignore:This type of repertoire does not store the extra scores"),
]

D = 4
CENTROIDS = jnp.linspace(0.0, 1.0, 5)[:, None]
EMITTER = CycleQDEmitter(batch_size=64, crossover=lambda key, first, second: jnp.stack([first, second]))


def parents_in(repertoire):
  state = EMITTER.init(jax.random.key(0), repertoire, None, jnp.zeros(0), jnp.zeros(0), {})
  children, _ = EMITTER.emit(repertoire, state, jax.random.key(1))
  return {tuple(row) for row in np.asarray(children).reshape(-1, D).round(4).tolist()}


def test_a_parent_is_any_member_of_a_cells_front():
  genotypes = jax.random.normal(jax.random.key(2), (40, D))
  angles = jnp.linspace(0.0, jnp.pi / 2, 40)
  fitnesses = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)  # none dominates another
  descriptors = jax.random.uniform(jax.random.key(3), (40, 1))
  repertoire = MOMERepertoire.init(genotypes, fitnesses, descriptors, CENTROIDS, 8, {})
  occupied = np.asarray((repertoire.fitnesses != -jnp.inf).all(axis=-1))
  assert (occupied.sum(axis=1) > 1).any()
  members = {tuple(row) for row in np.asarray(repertoire.genotypes)[occupied].round(4).tolist()}
  parents = parents_in(repertoire)
  assert parents <= members
  assert len(parents) > occupied.any(axis=1).sum()  # more than one of a cell


def test_a_population_without_descriptors():
  genotypes = jax.random.normal(jax.random.key(2), (10, D))
  repertoire = NSGA2Repertoire.init(genotypes, jax.random.uniform(jax.random.key(3), (10, 2)), population_size=12)
  parents = parents_in(repertoire)
  assert parents <= {tuple(row) for row in np.asarray(genotypes).round(4).tolist()}
  assert len(parents) > 5


def test_what_cannot_be_served_is_refused_by_name():
  repertoire = NSGA2Repertoire.init(jnp.zeros((3, D)), jnp.zeros((3, 2)), population_size=3)
  with pytest.raises(ValueError, match=r"repertoire: expected .* \[N, objectives\].*, got NSGA2Repertoire with \[3\]"):
    parents_in(repertoire.replace(fitnesses=jnp.zeros(3)))
