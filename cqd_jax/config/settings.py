"""Settings of an experiment: dataclasses, read from YAML, overridden by dotted names on the command line."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from tyro.constructors import PrimitiveConstructorSpec

from cqd_jax.config.plugs import Plug
from cqd_jax.config.problem import with_tasks
from cqd_jax.store.yaml_text import YAMLTextError, read_yaml, shortened, write_yaml

STRICT = ConfigDict(extra="forbid")


class ConfigError(ValueError):
  """A configuration that cannot be used; its text is for the user."""


def _expanded(path: Path) -> Path:
  """A path as a shell would have it: ~ is the home of the user."""
  try:
    return path.expanduser()
  except RuntimeError as error:
    raise ValueError(f"{error}") from error


Place = Annotated[Path, AfterValidator(_expanded)]


def _plug_from_text(text: str) -> Plug:
  try:
    return Plug.parse(read_yaml(text))
  except YAMLTextError as error:
    raise ValueError(f"expected a name, or {{use: NAME, ...}}, got {shortened(text)!r} ({error})") from error


def _plug_as_text(plug: Plug | None) -> str:
  if plug is None:
    return "None"
  return write_yaml(plug.dump(), one_line=True).strip().removesuffix("\n...")


ON_COMMAND_LINE = PrimitiveConstructorSpec(
  nargs=1,
  metavar="NAME",
  instance_from_str=lambda words: _plug_from_text(words[0]),
  is_instance=lambda value: isinstance(value, Plug),
  str_from_instance=lambda plug: [_plug_as_text(plug)],
)
"""A plug as an option: `--evolution.mutation svd`, `--evolution.mutation "{use: svd, max_scale: 2}"`, or setting by
setting: `--evolution.mutation.max-scale 2`."""

OPTIONAL_ON_COMMAND_LINE = PrimitiveConstructorSpec(
  nargs=1,
  metavar="NAME|None",
  instance_from_str=lambda words: None if words[0] == "None" else _plug_from_text(words[0]),
  is_instance=lambda value: value is None or isinstance(value, Plug),
  str_from_instance=lambda plug: [_plug_as_text(plug)],
)

PlugSetting = Annotated[Plug, ON_COMMAND_LINE]
OptionalPlugSetting = Annotated[Plug | None, OPTIONAL_ON_COMMAND_LINE]


@dataclass(frozen=True, config=STRICT)
class TaskSettings:
  """Which tasks there are, and how many questions each has."""

  names: tuple[PlugSetting, ...] = (Plug("coding"), Plug("database"), Plug("os"))
  """The K tasks, one archive each: coding, database, os; or your own as package.module:function, a function that is
  called with `sizes` (questions per split) and `seed` and returns a task (see cqd_jax.tasks.task and .episode)."""
  train: int = 3000
  """Training examples per task."""
  validation: int = 100
  """Questions per task that every method is scored on while it searches."""
  test: int = 300
  """Questions per task that only the final table is scored on."""
  labels: int = 1000
  """Training questions per task that experts and swarm answer where a method distills: it learns what passed."""


@dataclass(frozen=True, config=STRICT)
class TrainingSettings:
  """How the miniature base model and its experts are trained (AdamW, packed rows, loss on answers only)."""

  rows: int = 16
  """Packed rows per batch."""
  row_length: int = 96
  """Tokens per row."""
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
  """Peak for each expert, in the order of the tasks."""


@dataclass(frozen=True, config=STRICT)
class EvolutionSettings:
  """CycleQD, the method whose archives the report shows. Its plugs: cqd plugs."""

  children: int = 200
  """Children scored in all, which is also what each other method may score."""
  batch_size: int = 4
  """Children per iteration."""
  schedule: PlugSetting = Plug("cycle")
  """Where parents come from: cycle (the paper), round_robin (the reference's workers), fixed."""
  flip_interval: int = 1
  """Iterations until the schedule moves on."""
  genotype: PlugSetting = Plug("dense")
  """What an individual is stored as: dense, all weights of its task vector; core, small cores in bases that the experts
  share, where children are made a thousand times faster; coefficients, merge coefficients [experts, groups]."""
  cells: PlugSetting = Plug("from_experts")
  """How archives are cut into cells: from_experts (the paper's grid of 15 per dimension), grid, cvt."""
  selection: PlugSetting = Plug("elite")
  """How parents are sampled: elite (the paper), reference_elite (the reference code), uniform."""
  crossover: OptionalPlugSetting = None
  """How two parents become a child: linear (the paper), slerp, ties, dare, line. Not given: linear, std 0.03; or line
  where individuals are coefficients."""
  mutation: OptionalPlugSetting = None
  """What happens to a child then: expert_svd (the reference code: adds part of the expert of the active task), svd (the
  paper: factors on the child's singular values), gaussian, none. Not given: expert_svd, rate 0.3; or none where
  individuals are coefficients."""

  def as_method(self) -> Plug:
    """The same as a method of the comparison."""
    settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "children"}
    return Plug("cycleqd", {name: value for name, value in settings.items() if value is not None})


@dataclass(frozen=True, config=STRICT)
class MeshSettings:
  """The devices to run on, population x model of them. Only rounding depends on it; a run may resume on another."""

  population: int = 1
  """Into how many parts the candidates decoded together are divided; divides engine's candidates_per_batch."""
  model: int = 1
  """Into how many parts the base's weights are divided; more than 1 needs a genotype with share_base."""


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
  """Metrics of each iteration to this project of Weights & Biases (pip install 'cqd_jax[wandb]'); empty: none."""
  elites: Literal["all", "best", "none"] = "all"
  """Which elites become model folders: all, the best one of each archive, or none. The best of all and the aggregate
  always do."""
  form: Literal["whole", "adapters"] = "whole"
  """What those folders hold: whole models, or LoRA adapters of the base."""
  samples: int = 8
  """Test questions per task whose answers are shown in the report; the history keeps so many of everybody tested."""
  transcripts: int = 2
  """Validation questions per task whose dialogues the history keeps of every individual; 0: none."""


DEFAULT_METHODS: tuple[Plug, ...] = (
  Plug("task_arithmetic", {"name": "task arithmetic, tuned scale"}),
  Plug("random_search", {"name": "random search, per model"}),
  Plug("cma_es", {"name": "CMA-ES, per kernel", "genotype": {"use": "coefficients", "granularity": "kernel"}}),
  Plug("distill", {"name": "distilled from the experts", "labels": "experts"}),
  Plug("distill", {"name": "distilled from the swarm"}),
)
"""What evolution is compared with in the miniature experiment."""


@dataclass(frozen=True, config=STRICT)
class ExperimentSettings:
  """One experiment; every field has a default, so a YAML file names only what differs."""

  name: str = "skills"
  """Names the run directory."""
  preset: Literal["miniature", "llm"] = "miniature"
  """Which defaults stand for what is not given. miniature: experts trained here, a comparison of methods. llm:
  answers of up to 512 tokens, core space, no other methods, elites as adapters. Not given: llm where a base is."""
  seed: int = 0
  """Of everything: data order, training, every method."""
  runs_dir: Place = Path("runs")
  """Run directories go here: NAME-seed-SEED, with a number behind it where that is taken; nothing is overwritten."""
  run_dir: Place | None = None
  """The run directory, to choose its name yourself; refused where it exists."""
  base: Place | None = None
  """Folder of a base model in the format of Hugging Face (Llama, Mistral, Qwen2, Qwen3). Not given: a miniature base
  and its experts are trained."""
  experts: tuple[Place, ...] = ()
  """Folders of the base's experts: whole models or PEFT LoRA adapters. They need not be as many as the tasks."""
  cache_dir: Place = Path("cache")
  """Trained experts, and compiled programs, are kept here and reused."""
  max_new_tokens: int = 30
  """Tokens that an answer may have."""
  workers: int = 0
  """Sandbox workers; 0: one per usable core."""
  unsafe: bool = False
  """Execute answers WITHOUT isolation where bubblewrap does not work: only for models that you trust."""
  swarm_sizes: tuple[int, ...] = (3, 8)
  """For how many members to report the share of test questions that at least one of them solves."""
  tasks: TaskSettings = dataclasses.field(default_factory=TaskSettings)
  """Tasks and numbers of questions."""
  training: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)
  """Base and experts."""
  engine: PlugSetting = Plug("local")
  """Who produces answers: local, the decoder in this process, with candidates_per_batch and prompt_buckets."""
  evolution: EvolutionSettings = dataclasses.field(default_factory=EvolutionSettings)
  """CycleQD."""
  methods: tuple[PlugSetting, ...] = DEFAULT_METHODS
  """What evolution is compared with, each scoring as many candidates: a list of plugs (cqd plugs); `name:` in one names
  its row."""
  mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)
  """Devices."""
  output: OutputSettings = dataclasses.field(default_factory=OutputSettings)
  """What a run leaves behind."""


PRESETS: Mapping[str, Mapping[str, Any]] = {
  "miniature": {},
  "llm": {
    "max_new_tokens": 512,
    "engine": {"use": "local", "candidates_per_batch": 4, "prompt_buckets": 16},
    "evolution": {"genotype": {"use": "core", "rank": 64, "share_base": True}},
    "methods": [],
    "output": {"elites": "best", "form": "adapters", "checkpoint_every": 10},
  },
}
"""Defaults by name, as a file would give them, where they differ from those of the classes."""

MOST_PROBLEMS = 3
"""So many are named in one message."""

RESUME_MAY_CHANGE = ("runs_dir", "cache_dir", "run_dir", "workers", "unsafe", "output", "mesh")
"""Settings that change no result (the mesh: only rounding), so that a run may resume with others."""


def changed_settings(before: ExperimentSettings, now: ExperimentSettings) -> dict[str, tuple[Any, Any]]:
  """Settings that change what is computed and differ: dotted name -> (before, now)."""
  flat = [_flatten(settings_as_json(settings)) for settings in (before, now)]
  return {
    name: (flat[0][name], flat[1][name])
    for name in flat[0]
    if flat[0][name] != flat[1][name] and name.split(".")[0] not in RESUME_MAY_CHANGE
  }


AT_LEAST = {
  "max_new_tokens": 1,
  "workers": 0,
  "tasks.train": 1,
  "tasks.validation": 1,
  "tasks.test": 1,
  "tasks.labels": 1,
  "training.rows": 1,
  "training.row_length": 1,
  "training.base_schedule_steps": 2,
  "training.expert_steps": 2,
  "evolution.children": 1,
  "evolution.batch_size": 1,
  "evolution.flip_interval": 1,
  "mesh.population": 1,
  "mesh.model": 1,
  "output.checkpoint_every": 1,
  "output.checkpoints_kept": 1,
  "output.samples": 0,
  "output.transcripts": 0,
}


AT_MOST = {
  "workers": 1024,
  "max_new_tokens": 10**6,
  "tasks.train": 10**6,
  "tasks.validation": 10**6,
  "tasks.test": 10**6,
  "tasks.labels": 10**6,
}
MOST = 10**7
"""Bounds of what a machine can have in mind: a slip of some zeros is said, and does not eat the memory."""

SEEDS = 2**32


def check_name(name: str, where: str) -> None:
  """Checks what becomes the name of a file or folder.

  Raises:
    ConfigError: naming `where`.
  """
  if not name.strip() or len(name.encode(errors="replace")) > 100:
    raise ConfigError(f"{where}: expected a name of 1 to 100 bytes, got {shortened(name)!r}")
  if name in (".", "..") or any(character in "/\\" or not character.isprintable() for character in name):
    raise ConfigError(f"{where}: expected a name, which cannot lead to another folder, got {name!r}")


def check_settings(settings: ExperimentSettings, num_tasks: int) -> None:
  """Checks what a type cannot say, before anything is begun.

  Raises:
    ConfigError: naming the setting.
  """
  flat = _flatten(settings_as_json(settings))
  for name, least in AT_LEAST.items():
    if not flat[name] >= least:
      raise ConfigError(f"{name}: expected at least {least}, got {flat[name]}")
    if flat[name] > (most := AT_MOST.get(name, MOST)):
      raise ConfigError(f"{name}: expected at most {most}, got {flat[name]}")
  check_name(settings.name, "name")
  if not 0 <= settings.seed < SEEDS:
    raise ConfigError(f"seed: expected 0 to 2**32 - 1, got {settings.seed}")
  for name, value in flat.items():
    for number in value if isinstance(value, list) else [value]:
      if isinstance(number, float) and not math.isfinite(number):
        raise ConfigError(f"{name}: expected finite numbers, got {value}")
  evolution = settings.evolution
  if evolution.children % evolution.batch_size:
    raise ConfigError(
      f"evolution.children: expected a multiple of evolution.batch_size={evolution.batch_size}, "
      f"got {evolution.children}"
    )
  if settings.mesh.model > 1 and not evolution.genotype.settings.get("share_base"):
    raise ConfigError(
      f"mesh.model: expected 1, got {settings.mesh.model}: weights are divided only where the base is shared "
      "(evolution.genotype: {use: core, share_base: true})"
    )
  if min(settings.swarm_sizes, default=1) < 1:
    raise ConfigError(f"swarm_sizes: expected at least 1 member each, got {settings.swarm_sizes}")
  if max(settings.swarm_sizes, default=1) > MOST:
    raise ConfigError(f"swarm_sizes: expected at most {MOST} members each, got {settings.swarm_sizes}")
  if not 2 <= num_tasks <= 8:
    raise ConfigError(f"tasks.names: expected 2 to 8 tasks, one archive each, got {num_tasks}")
  if settings.base is None and settings.experts:
    raise ConfigError("base: expected the folder of the experts' base model, got none")
  if settings.base is not None and not settings.experts:
    raise ConfigError("experts: expected at least one folder, got none")
  if settings.base is None and len(settings.training.expert_learning_rates) != num_tasks:
    raise ConfigError(
      f"training.expert_learning_rates: expected {num_tasks}, one per task, got "
      f"{settings.training.expert_learning_rates}"
    )


def load_settings(path: Path, given: Mapping[str, Any] | None = None) -> ExperimentSettings:
  """Reads a YAML file of settings.

  Args:
    path: of the file.
    given: what stands in place of the file's own, as a `preset` or a `base` that decides on one.

  Raises:
    ConfigError: naming the file and the field: a missing file, no YAML, an unknown key (with what it may have meant), a
      value of the wrong type.
  """
  if not path.is_file():
    raise ConfigError(f"{path}: no such configuration file")
  try:
    content = read_yaml(path.read_text(encoding="utf-8"))
  except UnicodeDecodeError as error:
    raise ConfigError(f"{path}: not YAML: {error}") from error
  except YAMLTextError as error:
    raise ConfigError(f"{path}: {error}") from error
  content = {} if content is None else content
  if not isinstance(content, dict):
    raise ConfigError(f"{path}: expected settings by name, got {type(content).__name__}")
  return parse_settings({**content, **(given or {})}, str(path))


def parse_settings(content: Any, source: str) -> ExperimentSettings:
  """Settings from what YAML or JSON gave, on top of their preset; raises as `load_settings`, naming `source`."""
  try:
    content = with_tasks(content) if isinstance(content, Mapping) else content
  except ValueError as error:
    raise ConfigError(f"{source}: {error}") from error
  try:
    whole = _with_preset(content)
    _refuse_flags(whole, source)
    return TypeAdapter(ExperimentSettings).validate_python(whole)
  except ValidationError as error:
    problems = [f"{source}: {_explain(problem)}" for problem in error.errors()[:MOST_PROBLEMS]]
    if (more := error.error_count() - len(problems)) > 0:
      problems.append(f"and {more} more")
    raise ConfigError("; ".join(problems)) from error


def _refuse_flags(content: Any, source: str) -> None:
  """Raises where a number is wanted and true or false was given, which Python takes for 1 and 0."""
  if not isinstance(content, Mapping):
    return
  usual = _flatten(settings_as_json(ExperimentSettings()))
  for name, value in _flatten({key: entry for key, entry in content.items() if isinstance(key, str)}).items():
    own = usual.get(name)
    numbers = own if isinstance(own, list) else [own]
    if numbers and all(isinstance(each, int | float) and not isinstance(each, bool) for each in numbers):
      for each in value if isinstance(value, list) else [value]:
        if isinstance(each, bool):
          raise ConfigError(f"{source}: {name}: expected a number, got {str(each).lower()}")


def _with_preset(content: Any) -> Any:
  """What a file gives, with its preset's defaults for what it does not."""
  if not isinstance(content, Mapping):
    return content
  name = content.get("preset", "llm" if content.get("base") is not None else "miniature")
  defaults = PRESETS.get(name, {}) if isinstance(name, str) else {}
  return {**_merged(defaults, content), "preset": name}


def _merged(defaults: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
  """Groups are merged setting by setting; a plug is one setting."""
  merged = {**defaults, **content}
  for name, value in content.items():
    own = defaults.get(name)
    if isinstance(own, Mapping) and isinstance(value, Mapping) and "use" not in own:
      merged[name] = _merged(own, value)
  return merged


def settings_as_json(settings: ExperimentSettings) -> dict[str, Any]:
  """The settings in JSON's types, which `parse_settings` reads back."""
  content: dict[str, Any] = TypeAdapter(ExperimentSettings).dump_python(settings, mode="json")
  return content


def dump_settings(settings: ExperimentSettings) -> str:
  """The settings as YAML that `load_settings` reads back."""
  return write_yaml(settings_as_json(settings))


def _explain(problem: Any) -> str:
  name = ".".join(map(str, problem["loc"]))
  if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
    near = difflib.get_close_matches(str(problem["loc"][-1]), _field_names(), n=1)
    return f"unknown setting {shortened(name)!r}" + (f"; did you mean {near[0]!r}?" if near else "")
  return shortened(f"{name}: {problem['msg']}, got {shortened(repr(problem['input']))}", 600)


def setting_names() -> list[str]:
  """The dotted names of all settings."""
  return list(_flatten(settings_as_json(ExperimentSettings())))


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested settings by dotted names; a plug is one setting."""
  flat: dict[str, Any] = {}
  for name, value in content.items():
    group = isinstance(value, dict) and "use" not in value
    flat |= _flatten(value, f"{prefix}{name}.") if group else {f"{prefix}{name}": value}
  return flat


def _field_names() -> list[str]:
  groups: tuple[Any, ...] = (
    ExperimentSettings,
    TaskSettings,
    TrainingSettings,
    EvolutionSettings,
    MeshSettings,
    OutputSettings,
  )
  return [field.name for group in groups for field in dataclasses.fields(group)]
