"""The searches over weights without archives in the loop: cut off and gone on with, and inside a scan, to the bit."""

import jax
import numpy as np
import pytest
from loop_cases import Plain, PowerCut, equal, search, told, traced

pytestmark = pytest.mark.usefixtures("qdax_ranks")

METHODS = {
  "model_swarms": {"use": "model_swarms", "batch_size": 4, "restart_after": 1},
  "genome": {"use": "genome", "batch_size": 4, "population_size": 4},
  "dns": {"use": "dns", "batch_size": 4, "population_size": 4, "mutation": {"use": "gaussian", "std": 0.1}},
}


def state_of(searched):
  population = searched.population()
  return {"genotypes": population.genotypes, "values": population.values, "identities": population.identities}


SOAKED = [pytest.param(name, marks=pytest.mark.soak) for name in ("genome", "dns")]


@pytest.mark.parametrize("name", ["model_swarms", *SOAKED])
def test_who_loses_power_comes_to_what_a_scan_comes_to(tmp_path, name):
  with pytest.raises(PowerCut):
    search(tmp_path / "plain", Plain(cut_at=4), METHODS[name], budget=14)
  (searched,) = search(tmp_path / "plain", Plain(), METHODS[name], budget=14)
  (scanned,) = search(tmp_path / "traced", traced(), METHODS[name], budget=14)
  equal(state_of(searched), state_of(scanned))
  histories = [told(tmp_path / folder, searched.method.name) for folder in ("plain", "traced")]
  equal(*histories)
  assert len(histories[0]["born"]) == 2 + 14  # 14 is no multiple of 4: of the last batch a half counts as failed
  population = searched.population()
  assert len(population.identities) == 4
  assert max(population.identities) < 2 + 14
  np.testing.assert_array_equal(population.scores, histories[0]["scores"][population.identities].astype(np.float32))
  values = searched.space.as_scored(population.genotypes)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(values))
