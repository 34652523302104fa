"""The experiment with each kind of genotype, really run at a very small size."""

import json
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from experiment_cases import load_model, needs_sandbox, tiny_evolution, tiny_settings
from rich.console import Console

from cqd_jax.cli.main import main
from cqd_jax.config.plugs import Plug, PlugError, resolve
from cqd_jax.config.settings import ConfigError, EvolutionSettings, MeshSettings, check_settings
from cqd_jax.report.figures import all_figures
from cqd_jax.run.commands import aggregate, evaluate
from cqd_jax.run.experiment import run_experiment
from cqd_jax.run.files import open_run
from cqd_jax.run.plan import dry_run
from cqd_jax.run.read_run import read_record

# Experts this small may all fail one task; the grid says so.
pytestmark = pytest.mark.filterwarnings("ignore:task .* all experts score 0")
CONSOLE = Console(quiet=True)
# Virtual devices share the threads of one pool: where products wait for others' threads, collectives can take them all.
TWO_DEVICES = "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"
KINDS = {
  "dense": {},
  "core": {"genotype": Plug("core", {"rank": 0})},
  "truncated": {"genotype": Plug("core", {"rank": 3}), "mutation": Plug("svd", {"max_scale": 2.0})},
  "coefficients": {"genotype": Plug("coefficients", {"rank": 0, "starts": [0.5]})},
}


class Runs(dict):
  """A run of each kind, of the same experts; made when it is asked for."""

  def __init__(self, folder):
    super().__init__()
    self._folder = folder

  def __missing__(self, name):
    settings = tiny_settings(self._folder, name=name, evolution=tiny_evolution(**KINDS[name]), methods=())
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", message="task .* all experts score 0")
      self[name] = run_experiment(settings, CONSOLE).run_dir
    return self[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return Runs(tmp_path_factory.mktemp("genotypes"))


def people(run_dir):
  return read_record(open_run(run_dir)).individuals


@needs_sandbox
@pytest.mark.soak
def test_core_space_that_loses_nothing_evolves_as_dense_weights_do(runs):
  dense, core = people(runs["dense"]), people(runs["core"])
  np.testing.assert_array_equal(core.parents, dense.parents)
  np.testing.assert_array_equal(core.taken, dense.taken)
  np.testing.assert_array_equal(core.scores, dense.scores)
  assert core.mutation == dense.mutation
  assert core.notes == dense.notes
  rows, expected = (json.loads((runs[name] / "scores.json").read_text())["test"] for name in ("core", "dense"))
  assert rows == expected
  for model in ("best", "aggregate"):
    params, reference = (load_model(runs[name] / "models" / model)[0] for name in ("core", "dense"))
    for path in (("layers", "mlp", "up", "kernel"), ("embed", "embedding"), ("final_norm", "scale")):
      ours, theirs = params, reference
      for part in path:
        ours, theirs = ours[part], theirs[part]
      np.testing.assert_allclose(ours, theirs, atol=1e-5)


@needs_sandbox
@pytest.mark.soak
def test_a_mesh_of_devices_evolves_as_one_device_does(runs, tmp_path):
  """The command itself, on 2 virtual devices, each with half of the weights of the base that all candidates share."""
  begun = open_run(runs["core"]).settings
  environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {TWO_DEVICES}"}
  options = ["--mesh.model", "2", "--engine.candidates-per-batch", "3", "--evolution.genotype.share-base", "true"]
  options += ["--run-dir", str(tmp_path / "run")]
  command = [sys.executable, "-m", "cqd_jax.cli", "evolve", str(begun), *options]
  done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
  assert done.returncode == 0, done.stderr
  one, many = people(runs["core"]), people(tmp_path / "run")
  np.testing.assert_array_equal(many.parents, one.parents)
  np.testing.assert_array_equal(many.scores, one.scores)
  rows = [json.loads((folder / "scores.json").read_text())["test"] for folder in (runs["core"], tmp_path / "run")]
  assert rows[0] == rows[1]


@needs_sandbox
@pytest.mark.soak
def test_a_checkpoint_of_cores_is_smaller_than_one_of_weights(runs):
  def size(kind):
    return sum(path.stat().st_size for path in (runs[kind] / "checkpoints").rglob("*") if path.is_file())

  assert size("truncated") < size("dense") / 10


@needs_sandbox
@pytest.mark.soak
def test_truncated_experts_are_evolved_and_exported(runs):
  table = (runs["truncated"] / "basis.md").read_text().splitlines()
  assert len(table) == 2 + 3 * 9  # seven matrices a layer, embedding and head
  assert table[2].startswith("| embed/embedding | coding | 3 | 0.")
  record = read_record(open_run(runs["truncated"]))
  assert record.facts["genotype"] == "core, rank 3"
  assert np.isfinite(record.individuals.scores).all()
  scores = evaluate(runs["truncated"], "best", "test", CONSOLE)
  rows = json.loads((runs["truncated"] / "scores.json").read_text())["test"]
  assert scores == next(row["scores"] for row in rows if row["name"] == "CycleQD, best elite")


@needs_sandbox
@pytest.mark.soak
def test_coefficients_begin_with_the_experts_and_their_sums(runs, tmp_path):
  record = read_record(open_run(runs["coefficients"]))
  individuals = record.individuals
  assert record.num_experts == 3
  assert (individuals.born == 0).sum() == 4
  assert individuals.mutation[3] == "0.5 x the experts' sum"
  np.testing.assert_array_equal(individuals.scores[:3], people(runs["dense"]).scores[:3])
  assert individuals.weights(4) is None
  assert individuals.mutation[4] == "iso 0.15, line 0.3"
  assert len(individuals) == 4 + 6
  assert all_figures(record)
  assert "0.5 x the experts" in (runs["coefficients"] / "report.html").read_text()
  folder = aggregate(runs["coefficients"], tmp_path / "merged", CONSOLE)
  merged, written = (load_model(each)[0] for each in (folder, runs["coefficients"] / "models" / "aggregate"))
  np.testing.assert_array_equal(merged["head"]["kernel"], written["head"]["kernel"])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"mesh": MeshSettings(model=2)}, r"mesh.model: expected 1, got 2: weights are divided only where the base"),
    ({"mesh": MeshSettings(population=0)}, r"mesh.population: expected at least 1, got 0"),
  ],
)
def test_settings_of_meshes_are_checked(tmp_path, changes, message):
  settings = tiny_settings(tmp_path, **{"evolution": EvolutionSettings(), **changes})
  with pytest.raises(ConfigError, match=message):
    check_settings(settings, 3)


@pytest.mark.parametrize(
  ("plug", "message"),
  [
    (Plug("core", {"rank": "many"}), r"genotype.rank: .*integer.*got 'many'"),
    (Plug("dense", {"share_base": True}), r"genotype: dense has no setting 'share_base'"),
    (Plug("coefficients", {"starts": [0.5, math.nan]}), r"genotype.starts: expected finite"),
    (Plug("sparse"), r"genotype: no genotype 'sparse'; there are dense, core, coefficients"),
  ],
)
def test_settings_of_genotypes_are_checked(plug, message):
  with pytest.raises(PlugError, match=message):
    resolve("genotype", plug, "genotype")


@needs_sandbox
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"genotype": Plug("core", {"rank": -1})}, "CycleQD: rank: expected at least 0, got -1"),
    (
      {"genotype": Plug("core"), "crossover": Plug("ties")},
      "CycleQD: crossover ties_crossover: elementwise, so on a genotype that is core",
    ),
    (
      {"genotype": Plug("coefficients"), "mutation": Plug("svd", {"max_scale": 2.0})},
      "mutation svd_mutation: inner_product, so on a genotype",
    ),
    ({"cells": Plug("from_experts", {"shape": 10_000})}, "CycleQD: cells: .*use Centroids.cvt"),
  ],
)
def test_what_cannot_work_is_refused_before_there_is_a_run_directory(tmp_path, changes, message):
  settings = tiny_settings(tmp_path, evolution=tiny_evolution(**changes))
  with pytest.raises(ConfigError, match=message):
    run_experiment(settings, CONSOLE)
  with pytest.raises(ConfigError, match=message):
    dry_run(settings, CONSOLE)
  assert not (tmp_path / "runs").exists()


@needs_sandbox
def test_a_mesh_whose_devices_would_repeat_work_is_refused(runs, tmp_path):
  environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {TWO_DEVICES}"}
  options = ["--mesh.population", "2", "--run-dir", str(tmp_path / "run")]
  command = [sys.executable, "-m", "cqd_jax.cli", "evolve", str(open_run(runs["dense"]).settings), *options]
  for more in ([], ["--dry-run"]):
    done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 2
    assert "candidates_per_batch: expected a multiple of mesh.population=2, got 1" in done.stderr
  assert not (tmp_path / "run").exists()


@needs_sandbox
def test_more_devices_than_there_are_is_an_error_in_words(runs, tmp_path, capsys):
  begun = open_run(runs["dense"]).settings
  options = ["--mesh.population", "3", "--run-dir", str(tmp_path / "run")]
  assert main(["evolve", str(begun), *options]) == 2
  assert "mesh: expected at most 1 devices, which is what there is, got 3 x 1" in capsys.readouterr().err
