"""A script's own models in the durable loop: what it leaves, how it goes on, and what it refuses by name."""

import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from loop_cases import BASE, Plain, PowerCut
from script_cases import EXPERTS, QUIET, call

from cqd_jax.config.settings import OutputSettings
from cqd_jax.run import Method
from cqd_jax.run.commands import plot, report
from cqd_jax.run.experiment import resume_experiment
from cqd_jax.search import Info
from cqd_jax.store.params import load_params
from cqd_jax.tasks import TracedProblem
from cqd_jax.tasks.problem import Sample

pytestmark = pytest.mark.usefixtures("qdax_ranks")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  run_dir = tmp_path_factory.mktemp("script") / "run"
  with jax.numpy_rank_promotion("allow"):
    return call(run_dir, Plain(samples=(Sample("left", "?", "", "!", 0.5, (("a", np.zeros((2, 2), np.uint8)),)),)))


def test_it_leaves_table_report_picture_history_and_models(finished):
  names = [row.name for row in finished.rows]
  assert names == [
    "base",
    "expert left",
    "expert right",
    "the experts together",
    "uniform average",
    "random",
    "CycleQD, best elite",
    "CycleQD, aggregate",
  ]
  run_dir = finished.run_dir
  assert "expert left" in (run_dir / "table.md").read_text()
  assert "data:image/png;base64," in (run_dir / "report.html").read_text()
  assert matplotlib.image.imread(run_dir / "archives.png").shape[1] > 500
  best = load_params(run_dir / "models" / "best" / "params.safetensors")
  about = json.loads((run_dir / "models" / "best" / "model.json").read_text())
  assert jax.tree.structure(best) == jax.tree.structure(BASE)
  assert about["kind"] == "elite"
  assert report(run_dir, run_dir / "again.html", QUIET).is_file()
  assert plot(run_dir, None, ["svg"], QUIET)


def test_a_finished_one_is_shown_again(finished):
  again = call(finished.run_dir, Plain(cut_at=1))
  assert again.rows == finished.rows
  with pytest.raises(ValueError, match="is a run of a script; go on with it by the command that began it"):
    resume_experiment(finished.run_dir, QUIET)


def test_one_that_lost_power_goes_on(finished, tmp_path):
  with pytest.raises(PowerCut):
    call(tmp_path / "run", Plain(cut_at=3))
  assert call(tmp_path / "run", Plain()).rows == finished.rows


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"budget": 12}, "began with other budget"),
    ({"seed": 1}, "began with other seed"),
    ({"methods": ["cycleqd"]}, "began with other methods"),
    ({"experts": EXPERTS[::-1]}, "began with other models"),
    ({"problem": Plain(version="2")}, r"grader changed since the run began \(validation split"),
  ],
)
def test_another_run_in_its_place_is_refused_by_name(tmp_path, changes, message):
  with pytest.raises(PowerCut):
    call(tmp_path / "run", Plain(cut_at=2))
  with pytest.raises(ValueError, match=message):
    call(tmp_path / "run", **{"problem": Plain(), **changes})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": ["cycelqd"]}, r"methods\[0\]: no methods 'cycelqd'; there are .*; did you mean 'cycleqd'"),
    ({"methods": []}, "methods: expected at least one"),
    ({"methods": ["cycleqd", "cycleqd"]}, "methods: two are named 'CycleQD'"),
    ({"methods": [3]}, r"methods\[0\]: expected a name"),
    ({"experts": []}, "experts: expected at least one model"),
    ({"experts": [EXPERTS[0], {"w": jnp.ones(3)}]}, r"experts\[1\]: "),
    ({"expert_names": ["a", "a"]}, "expert_names: expected 2 names that differ"),
    ({"budget": 0}, "budget: expected at least 1, got 0"),
    ({"swarm_sizes": (0,)}, "swarm_sizes: expected at least 1 member"),
  ],
)
def test_what_cannot_be_is_named_and_leaves_nothing(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    call(tmp_path / "run", **changes)
  assert not (tmp_path / "run").exists()


def test_a_search_without_archives_may_come_first_and_experts_be_three(tmp_path):
  experts = [*EXPERTS, jax.tree.map(lambda one, other: (one + other) / 2, *EXPERTS)]
  result = call(tmp_path / "run", experts=experts, methods=["cma_es"], output=OutputSettings(tensorboard=False))
  assert [row.name for row in result.rows][1:4] == ["expert 1", "expert 2", "expert 3"]
  assert result.rows[-1].name == "CMA-ES"
  assert (tmp_path / "run" / "report.html").is_file()
  assert not (tmp_path / "run" / "archives.png").exists()
  assert (tmp_path / "run" / "models" / "best" / "params.safetensors").is_file()


def test_an_algorithm_of_ones_own_is_a_method(tmp_path):
  class Nothing:
    """Tries the base again and again."""

    batch_size, budget = 1, 2

    def __init__(self, space):
      self.space = space

    def init(self, key, initial, scored):
      return jnp.asarray(scored.values[0])

    def ask(self, state, key):
      return jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:1]), self.space.initial), Info()

    def tell(self, state, genotypes, scored, info):
      return scored.values[0], {}

    def population(self, state):
      from cqd_jax.search import Population

      zero = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:1]), self.space.initial)
      return Population(zero, np.asarray(state)[None], np.array([2]), np.asarray(state).mean(-1)[None])

  result = call(tmp_path / "run", methods=["cycleqd", Method("nothing", lambda context: Nothing(context.root))])
  rows = {row.name: row for row in result.rows}
  assert rows["nothing"].scores == rows["base"].scores
  assert rows["nothing"].evaluations == 2


def test_params_may_be_one_bare_array(tmp_path):
  data = {split: np.zeros(1, np.float32) for split in ("validation", "test")}
  problem = TracedProblem(lambda params, data: jnp.exp(-jnp.abs(params))[:, None], data, task_names=("one", "other"))
  experts = [np.array(each, np.float32) for each in ([0.1, 1], [1, 0.1])]
  run_dir = tmp_path / "run"
  call(run_dir, problem, base=np.ones(2, np.float32), experts=experts, methods=["random_search"], budget=8)
  best = load_params(run_dir / "models" / "best" / "params.safetensors")["params"]
  assert best.shape == (2,)
