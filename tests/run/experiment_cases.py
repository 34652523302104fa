"""The experiment at a very small size, for tests that really run it."""

import importlib.util
import json

import pytest

from cqd_jax.config.settings import (
  BaselineSettings,
  EvolutionSettings,
  ExperimentSettings,
  TaskSettings,
  TrainingSettings,
)
from cqd_jax.hub.load import load_pretrained
from cqd_jax.sandbox.sandbox import probe

needs_sandbox = pytest.mark.skipif(probe() is not None, reason=f"nothing isolates answers here: {probe()}")


def tiny_settings(folder, **changes):
  settings = {
    "runs_dir": folder / "runs",
    "cache_dir": folder / "cache",
    "workers": 1,
    "prompt_buckets": 1,
    "max_new_tokens": 20,
    "swarm_sizes": (2, 50),
    "tasks": TaskSettings(train=400, validation=6, test=8),
    "training": TrainingSettings(
      rows=8, base_schedule_steps=30, base_stop_at=2.0, expert_steps=40, expert_learning_rates=(3e-3,) * 3
    ),
    "evolution": EvolutionSettings(children=6, batch_size=3, cells=4),
    "baselines": BaselineSettings(scales=(0.5, 1.0), batch_size=4),
  }
  return ExperimentSettings(**{**settings, **changes})


def load_script(path):
  """A script of experiments/ as a module."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def load_model(folder):
  """The params of a model of a run, and what it is."""
  return load_pretrained(folder).params, json.loads((folder / "model.json").read_text())
