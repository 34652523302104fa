"""The one loop, whatever it searches with: recorded, cut off and gone on with to the bit, and alone with its method."""

import time

import flax.struct
import jax.numpy as jnp
import numpy as np
import pytest
from loop_cases import METHODS, Plain, PowerCut, equal, method_of, run_context, search, told, traced
from rich.console import Console

from cqd_jax.run.context import Method
from cqd_jax.run.loop import Loop
from cqd_jax.search import Info, Population
from cqd_jax.terminal.interrupt import Interrupt, Stopped
from cqd_jax.types import ArrayField

pytestmark = pytest.mark.usefixtures("qdax_ranks")


def state_of(searched):
  population = searched.population()
  return {"genotypes": population.genotypes, "values": population.values, "identities": population.identities}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """Of each method population, history and number of individuals asked, when nothing happens."""
  found = {}
  for name, plug in METHODS.items():
    path = tmp_path_factory.mktemp(name) / "run"
    problem = Plain()
    (searched,) = search(path, problem, plug)
    asked = sum(size for _, size in problem.asked)
    found[name] = state_of(searched), told(path, searched.method.name), asked
  return found


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("cut_at", [1, 2, 4])
def test_who_loses_power_goes_on_to_the_bit(undisturbed, tmp_path, name, cut_at):
  """In a new session with the same folder; checkpoints are at even batches, so some of it is made again."""
  path, problem = tmp_path / "run", Plain(cut_at=cut_at)
  with pytest.raises(PowerCut):
    search(path, problem, METHODS[name])
  after = Plain()
  (searched,) = search(path, after, METHODS[name])
  equal(state_of(searched), undisturbed[name][0])
  equal(told(path, searched.method.name), undisturbed[name][1])
  asked = [sum(size for _, size in own) for own in (problem.asked[: cut_at - 1], after.asked)]
  assert sum(asked) == undisturbed[name][2]  # nobody twice


@pytest.mark.parametrize("name", ["cycleqd", "cma_es"])
def test_inside_a_scan_it_is_the_same_search(undisturbed, tmp_path, name):
  (searched,) = search(tmp_path / "run", traced(), METHODS[name])
  equal(state_of(searched), undisturbed[name][0])
  equal(told(tmp_path / "run", searched.method.name), undisturbed[name][1])


def test_who_is_stopped_inside_a_scan_goes_on_to_the_bit(undisturbed, tmp_path):
  interrupt = Interrupt()
  interrupt.requested = True
  path = tmp_path / "run"
  with pytest.raises(Stopped):
    search(path, traced(), METHODS["cycleqd"], interrupt=interrupt)
  (searched,) = search(path, traced(), METHODS["cycleqd"])
  equal(state_of(searched), undisturbed["cycleqd"][0])


@pytest.mark.parametrize("name", METHODS)
def test_no_more_are_scored_than_the_budget_says(undisturbed, name):
  children = 5 if name == "task_arithmetic" else 18  # 18 is no multiple of 4
  assert len(undisturbed[name][1]["born"]) == 2 + children
  assert np.isfinite(undisturbed[name][0]["values"]).all()


def test_a_method_beside_it_changes_nothing(undisturbed, tmp_path):
  path = tmp_path / "run"
  searches = search(path, Plain(), *METHODS.values())
  for (name, expected), searched in zip(undisturbed.items(), searches, strict=True):
    equal(state_of(searched), expected[0])
    equal(told(path, searched.method.name), expected[1])
    assert name in METHODS


class CountdownState(flax.struct.PyTreeNode):
  left: ArrayField
  best: ArrayField


class Countdown:
  """A search in NumPy, which JAX does not trace: no parents, no archive, no notes."""

  batch_size, traceable, budget, variation = 2, False, 6, "halved"

  def __init__(self, context):
    self.space = context.root

  def init(self, key, initial, scored):
    return CountdownState(np.float32(1), np.asarray(scored.values[:1]))

  def ask(self, state, key):
    shrunk = {
      "Dense_0": {name: np.asarray(leaf)[:2] * state.left for name, leaf in self.space.initial["Dense_0"].items()}
    }
    return shrunk, Info()

  def tell(self, state, genotypes, scored, info):
    return CountdownState(state.left / 2, np.asarray(scored.values[:1])), {}

  def population(self, state):
    genotypes, _ = self.ask(state, None)
    one = {"Dense_0": {name: jnp.asarray(leaf[:1]) for name, leaf in genotypes["Dense_0"].items()}}
    return Population(one, state.best, np.array([2]), state.best.mean(axis=-1))


def test_a_search_that_is_not_traced_is_recorded_and_resumed(tmp_path):
  method = Method("countdown", Countdown)
  with run_context(tmp_path / "run", Plain()) as context:
    first = Loop(context, method).run()
  with run_context(tmp_path / "run", Plain()) as context:
    again = Loop(context, method).restore()
  equal(state_of(first), state_of(again))
  history = told(tmp_path / "run", "countdown")
  assert history["born"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
  assert (history["parents"] == -1).all()
  assert not history["taken"].any()
  assert history["mutation"].tolist() == ["", ""] + ["halved"] * 6


def test_what_an_iteration_costs_beside_the_scoring(tmp_path, capsys):
  """A figure, no bound."""
  plug = {**METHODS["cycleqd"], "batch_size": 4}
  began = time.perf_counter()
  with run_context(tmp_path / "run", Plain(), budget=200, checkpoint_every=25) as context:
    Loop(context, method_of(plug)).run()
    clock = context.clock
  iterations = 50
  with capsys.disabled():
    Console().print(
      f"\nloop: {1e3 * (clock.iterate_s - clock.score_s) / iterations:.1f} ms per iteration beside the scoring, "
      f"{1e3 * clock.record_s / iterations:.1f} ms of them recording; {time.perf_counter() - began:.1f} s in all",
      highlight=False,
    )
  assert clock.candidates == 2 + 200
