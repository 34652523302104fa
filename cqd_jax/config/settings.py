"""Settings of an experiment: dataclasses, read from YAML, overridden by dotted names on the command line."""

import dataclasses
import difflib
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")


class ConfigError(ValueError):
  """A configuration that cannot be used; its text is for the user."""


@dataclass(frozen=True, config=STRICT)
class TaskSettings:
  """Which tasks there are, and how many questions of each."""

  names: tuple[str, ...] = ("coding", "database", "os")
  """The K tasks, an archive each: coding, database, os; or your own as package.module:function, a function that is
  called with `sizes` (questions a split) and `seed` and returns a task (see cqd_jax.tasks.task)."""
  train: int = 3000
  """Examples a task to train on."""
  validation: int = 100
  """Questions a task that evolution is scored on."""
  test: int = 300
  """Questions a task that only the final table is scored on."""


@dataclass(frozen=True, config=STRICT)
class TrainingSettings:
  """How the miniature base model and its experts are trained (AdamW, packed rows, loss on answers only)."""

  rows: int = 16
  """Packed rows a batch."""
  row_length: int = 96
  """Tokens a row."""
  base_learning_rate: float = 4e-3
  """Peak for the base, which learns the mixture of all tasks."""
  base_schedule_steps: int = 240
  """Length of the base's warm-up and cosine."""
  base_stop_at: float = 0.16
  """The base stops at the first check at which its mean validation score reaches this: it then knows the format, not
  the skills."""
  expert_steps: int = 80
  """Steps for each expert, on its own task."""
  expert_learning_rates: tuple[float, ...] = (5e-4, 1.2e-3, 4e-4)
  """Peak for each expert: coding, database, os."""


@dataclass(frozen=True, config=STRICT)
class EvolutionSettings:
  """CycleQD itself."""

  children: int = 200
  """Children scored in all, which is also what each baseline search may score."""
  batch_size: int = 4
  """Children an iteration."""
  schedule: Literal["cycle", "round_robin", "fixed"] = "cycle"
  """Where parents come from: the paper's cycle, round_robin as the reference's workers, or fixed."""
  flip_interval: int = 1
  """Iterations until the schedule moves on."""
  genotype: Literal["dense", "core", "coefficients"] = "dense"
  """What an individual is stored as: all weights of its task vector; small cores in bases that the experts share, where
  children are made a thousand times faster; or merge coefficients [experts, groups]."""
  rank: int = 16
  """core, coefficients: rank to which the experts' task vectors are truncated; 0: not."""
  share_base: bool = False
  """core, coefficients: decode with the base's weights shared by all candidates (see candidates_per_batch) instead of
  writing each candidate's out. Saves their memory; faster where reading weights is what takes the time."""
  cells: int = 15
  """Cells a dimension of each archive."""
  selection: Literal["elite", "reference_elite", "uniform"] = "elite"
  """How parents are sampled: the paper's elite sampling, the reference code's variant, or uniformly."""
  merge_mean: float = 1.0
  """Mean of the two merge weights; matters only if they are not normalized."""
  merge_std: float = 0.03
  """Standard deviation of the two merge weights."""
  merge_granularity: Literal["model", "layer", "kernel"] = "model"
  """What shares one pair of merge weights; the paper: the model."""
  merge_normalize: bool = True
  """Whether merge weights are divided by their sum (the paper)."""
  mutation: Literal["none", "gaussian", "svd", "expert_svd"] = "expert_svd"
  """svd: the paper's, factors on the child's singular values; expert_svd: the reference code's, adds part of the
  expert of the active task."""
  mutation_size: float = 0.3
  """gaussian: standard deviation; svd: upper end of the factors; expert_svd: rate."""
  coefficient_granularity: Literal["model", "layer", "kernel"] = "kernel"
  """coefficients: what shares one coefficient of each expert."""
  coefficient_starts: tuple[float, ...] = (0.4, 0.55, 0.7)
  """coefficients: beside the experts evolution begins with all coefficients equal to each of these."""
  iso_sigma: float = 0.15
  """coefficients: a child is a parent plus noise of this standard deviation on each coefficient..."""
  line_sigma: float = 0.3
  """... plus the step to the other parent, times a normal number of this standard deviation. merge_* and mutation* do
  not matter to coefficients."""

  @property
  def variation(self) -> str:
    """What happens to a child beside the merge of its parents, in words; "" for nothing."""
    if self.genotype == "coefficients":
      return f"iso {self.iso_sigma:g}, line {self.line_sigma:g}"
    return "" if self.mutation == "none" else f"{self.mutation} {self.mutation_size:g}"


@dataclass(frozen=True, config=STRICT)
class MeshSettings:
  """The devices that evolution runs on, population x model of them. Only rounding depends on it."""

  population: int = 1
  """Into how many parts the children of a batch are divided; divides evolution.batch_size."""
  model: int = 1
  """Into how many parts the base's weights are divided; more than 1 needs evolution.share_base."""


@dataclass(frozen=True, config=STRICT)
class BaselineSettings:
  """What evolution is compared with. Searches may score as many candidates as evolution."""

  scales: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
  """Scales of task arithmetic that are tried on validation; none: without task arithmetic."""
  random_search: bool = True
  """Random merge weights per model, uniform in [0, 1]."""
  cma_es_model: bool = True
  """CMA-ES over one weight an expert."""
  cma_es_kernel: bool = True
  """CMA-ES over one weight an expert and kernel."""
  batch_size: int = 8
  """Candidates a generation of CMA-ES."""
  start: float = 0.5
  """Where CMA-ES starts: every weight."""
  step_size: float = 0.15
  """Initial step size of CMA-ES."""
  nsga2_model: bool = False
  """NSGA-II over one weight an expert, each task an objective of its own."""
  nsga2_population: int = 24
  """Population of NSGA-II."""


@dataclass(frozen=True, config=STRICT)
class OutputSettings:
  """What a run leaves behind; may be changed between the sessions of a run."""

  checkpoint_every: int = 25
  """Iterations between checkpoints. Scores are kept after every iteration in any case: no batch is scored twice."""
  checkpoints_kept: int = 3
  """How many checkpoints are kept while the run goes on; a finished run keeps the last."""
  tensorboard: bool = True
  """Metrics of each iteration for TensorBoard, in RUN_DIR/tensorboard."""
  wandb_project: str = ""
  """Metrics of each iteration to this project of Weights & Biases (pip install 'cqd_jax[wandb]'); empty: not."""
  elites: Literal["all", "best", "none"] = "all"
  """Which elites become model folders: all, the best one of each archive, or none. The best of all and the aggregate
  always do."""
  samples: int = 8
  """Test questions a task whose answers are shown in the report."""


@dataclass(frozen=True, config=STRICT)
class ExperimentSettings:
  """One experiment; every field has a default, so a YAML file names only what differs."""

  name: str = "skills"
  """Names the run directory."""
  seed: int = 0
  """Of everything: data order, training, evolution, baselines."""
  runs_dir: Path = Path("runs")
  """Run directories go here: NAME-seed-SEED, with a number behind it where that is taken; nothing is overwritten."""
  run_dir: Path | None = None
  """The run directory, if its name is to be yours; refused where it exists."""
  base: Path | None = None
  """Folder of a base model in the format of Hugging Face (Llama, Mistral, Qwen2, Qwen3). Not given: a miniature base
  and its experts are trained."""
  experts: tuple[Path, ...] = ()
  """Folders of the base's experts, one a task, in the order of tasks.names: whole models or PEFT LoRA adapters."""
  cache_dir: Path = Path("cache")
  """Trained experts are kept here by their settings, and reused."""
  candidates_per_batch: int = 1
  """How many candidates are decoded together. One at a time is fastest on a CPU, for models that fit its cache; more
  pay on an accelerator, and with evolution.share_base."""
  prompt_buckets: int = 6
  """Into how many buckets of like length the questions are parted, so that short ones do not pay for long ones."""
  max_new_tokens: int = 30
  """Tokens an answer may have."""
  workers: int = 0
  """Sandbox workers; 0: one a core."""
  unsafe: bool = False
  """Execute answers WITHOUT isolation where bubblewrap does not work: only for models that you trust."""
  swarm_sizes: tuple[int, ...] = (3, 8)
  """For how many members to tell the share of test prompts that at least one of them solves."""
  tasks: TaskSettings = dataclasses.field(default_factory=TaskSettings)
  """Number of questions."""
  training: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)
  """Base and experts."""
  evolution: EvolutionSettings = dataclasses.field(default_factory=EvolutionSettings)
  """CycleQD."""
  mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)
  """Devices."""
  baselines: BaselineSettings = dataclasses.field(default_factory=BaselineSettings)
  """What it is compared with."""
  output: OutputSettings = dataclasses.field(default_factory=OutputSettings)
  """What a run leaves behind."""


RESUME_MAY_CHANGE = ("runs_dir", "cache_dir", "run_dir", "workers", "unsafe", "output")
"""Settings that do not change what is computed, so that a run may be resumed with others."""


def changed_settings(before: ExperimentSettings, now: ExperimentSettings) -> dict[str, tuple[Any, Any]]:
  """Settings that change what is computed and differ: dotted name -> (before, now)."""
  flat = [_flatten(settings_as_json(settings)) for settings in (before, now)]
  return {
    name: (flat[0][name], flat[1][name])
    for name in flat[0]
    if flat[0][name] != flat[1][name] and name.split(".")[0] not in RESUME_MAY_CHANGE
  }


AT_LEAST = {
  "candidates_per_batch": 1,
  "prompt_buckets": 1,
  "max_new_tokens": 1,
  "workers": 0,
  "tasks.train": 1,
  "tasks.validation": 1,
  "tasks.test": 1,
  "training.rows": 1,
  "training.row_length": 1,
  "training.base_schedule_steps": 2,
  "training.expert_steps": 2,
  "evolution.children": 1,
  "evolution.batch_size": 1,
  "evolution.flip_interval": 1,
  "evolution.cells": 1,
  "evolution.merge_std": 0,
  "evolution.mutation_size": 0,
  "evolution.rank": 0,
  "mesh.population": 1,
  "mesh.model": 1,
  "evolution.iso_sigma": 0,
  "evolution.line_sigma": 0,
  "baselines.batch_size": 4,  # CMA-ES
  "baselines.nsga2_population": 2,
  "output.checkpoint_every": 1,
  "output.checkpoints_kept": 1,
  "output.samples": 0,
}


def check_settings(settings: ExperimentSettings, num_tasks: int) -> None:
  """Checks what a type cannot tell, before anything is begun.

  Raises:
    ConfigError: naming the setting.
  """
  flat = _flatten(settings_as_json(settings))
  for name, least in AT_LEAST.items():
    if not flat[name] >= least:
      raise ConfigError(f"{name}: expected at least {least}, got {flat[name]}")
  for name, value in flat.items():
    for number in value if isinstance(value, list) else [value]:
      if isinstance(number, float) and not math.isfinite(number):
        raise ConfigError(f"{name}: expected finite numbers, got {value}")
  evolution = settings.evolution
  if evolution.share_base and evolution.genotype == "dense":
    raise ConfigError("evolution.share_base: dense genotypes share no base (evolution.genotype core or coefficients)")
  if evolution.children % evolution.batch_size:
    raise ConfigError(
      f"evolution.children: expected a multiple of evolution.batch_size={evolution.batch_size}, "
      f"got {evolution.children}"
    )
  if evolution.batch_size % settings.mesh.population:
    raise ConfigError(
      f"mesh.population: expected a divisor of evolution.batch_size={evolution.batch_size}, "
      f"got {settings.mesh.population}"
    )
  if settings.mesh.model > 1 and not evolution.share_base:
    raise ConfigError(
      f"mesh.model: expected 1, got {settings.mesh.model}: weights are divided only where the base is shared "
      "(evolution.share_base)"
    )
  if min(settings.swarm_sizes, default=1) < 1:
    raise ConfigError(f"swarm_sizes: expected at least 1 member each, got {settings.swarm_sizes}")
  if not 2 <= num_tasks <= 8:
    raise ConfigError(f"tasks.names: expected 2 to 8 tasks, an archive each, got {num_tasks}")
  if settings.base is None and settings.experts:
    raise ConfigError("base: expected the folder of the experts' base model, got none")
  if settings.base is not None and len(settings.experts) != num_tasks:
    raise ConfigError(f"experts: expected {num_tasks} folders, one a task, got {len(settings.experts)}")
  if settings.base is None and len(settings.training.expert_learning_rates) != num_tasks:
    raise ConfigError(
      f"training.expert_learning_rates: expected {num_tasks}, one a task, got {settings.training.expert_learning_rates}"
    )


def load_settings(path: Path) -> ExperimentSettings:
  """Reads a YAML file of settings.

  Raises:
    ConfigError: naming the file and the field: a missing file, no YAML, an unknown key (with what it may have meant), a
      value of the wrong type.
  """
  if not path.is_file():
    raise ConfigError(f"{path}: no such configuration file")
  try:
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
  if not isinstance(content, dict):
    raise ConfigError(f"{path}: expected settings by name, got {type(content).__name__}")
  return parse_settings(content, str(path))


def parse_settings(content: Any, source: str) -> ExperimentSettings:
  """Settings from what YAML or JSON gave; raises `ConfigError` as `load_settings` does, naming `source`."""
  try:
    return TypeAdapter(ExperimentSettings).validate_python(content)
  except ValidationError as error:
    raise ConfigError("; ".join(f"{source}: {_explain(problem)}" for problem in error.errors())) from error


def settings_as_json(settings: ExperimentSettings) -> dict[str, Any]:
  """The settings in JSON's types, which `parse_settings` reads back."""
  content: dict[str, Any] = TypeAdapter(ExperimentSettings).dump_python(settings, mode="json")
  return content


def dump_settings(settings: ExperimentSettings) -> str:
  """The settings as YAML that `load_settings` reads back."""
  return yaml.safe_dump(settings_as_json(settings), sort_keys=False)


def _explain(problem: Any) -> str:
  name = ".".join(map(str, problem["loc"]))
  if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
    near = difflib.get_close_matches(str(problem["loc"][-1]), _field_names(), n=1)
    return f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
  return f"{name}: {problem['msg']}, got {problem['input']!r}"


def setting_names() -> list[str]:
  """The dotted names of all settings."""
  return list(_flatten(settings_as_json(ExperimentSettings())))


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested settings by dotted names."""
  flat: dict[str, Any] = {}
  for name, value in content.items():
    flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
  return flat


def _field_names() -> list[str]:
  groups: tuple[Any, ...] = (
    ExperimentSettings,
    TaskSettings,
    TrainingSettings,
    EvolutionSettings,
    MeshSettings,
    BaselineSettings,
    OutputSettings,
  )
  return [field.name for group in groups for field in dataclasses.fields(group)]
