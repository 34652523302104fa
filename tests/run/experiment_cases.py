"""The experiment at a very small size, for tests that really run it."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from cqd_jax.config.plugs import Plug
from cqd_jax.config.settings import EvolutionSettings, ExperimentSettings, TaskSettings, TrainingSettings
from cqd_jax.hub.load import load_pretrained
from cqd_jax.sandbox.sandbox import probe

needs_sandbox = pytest.mark.skipif(probe() is not None, reason=f"nothing isolates answers here: {probe()}")

FOUR_CELLS = Plug("from_experts", {"shape": 4})


def task_arithmetic(*scales):
  return Plug("task_arithmetic", {"name": "task arithmetic, tuned scale", "scales": list(scales)})


def cma_es(granularity, **settings):
  genotype = {"use": "coefficients", "granularity": granularity}
  return Plug("cma_es", {"name": f"CMA-ES, per {granularity}", "genotype": genotype, **settings})


EVERY_METHOD = (
  task_arithmetic(0.5, 1.0),
  Plug("random_search", {"name": "random search, per model", "batch_size": 4}),
  cma_es("model", batch_size=4),
  cma_es("kernel", batch_size=4),
)


def tiny_evolution(**changes):
  return EvolutionSettings(**{"children": 6, "batch_size": 3, "cells": FOUR_CELLS, **changes})


def tiny_settings(folder, **changes):
  settings = {
    "runs_dir": folder / "runs",
    "cache_dir": Path(os.environ["CQD_TESTS_SHARED"]) / "experts",  # tests/conftest.py: trained once for all
    "workers": 1,
    "engine": Plug("local", {"prompt_buckets": 1}),
    "max_new_tokens": 20,
    "swarm_sizes": (2, 50),
    "tasks": TaskSettings(train=400, validation=6, test=8, labels=6),
    "training": TrainingSettings(
      rows=8, base_schedule_steps=30, base_stop_at=2.0, expert_steps=40, expert_learning_rates=(3e-3,) * 3
    ),
    "evolution": tiny_evolution(),
    "methods": EVERY_METHOD,
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
