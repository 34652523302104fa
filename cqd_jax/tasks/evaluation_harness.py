"""Tasks of lm-evaluation-harness as episodes: its prompts, filters and metrics, on answers of any engine.

Needs `pip install 'cqd_jax[lm-eval]'`. Everything is read from this machine: the harness's data sets from the cache of
Hugging Face, or from files that are named.
"""

import functools
import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cqd_jax.tasks.episode import Episode, Message
from cqd_jax.tasks.execution import Job, Outcome
from cqd_jax.tasks.splits import divide_by_seed
from cqd_jax.tasks.task import Example, Split

LENGTHS: Mapping[str, Callable[[str], int]] = {
  "acc": lambda text: 1,
  "acc_norm": len,
  "acc_bytes": lambda text: len(text.encode()),
}
"""By the metric of a task with choices, by what their log-likelihoods are divided before they are compared."""

SOURCES: Mapping[Split, Sequence[Split]] = {
  "test": ("test", "validation", "train"),
  "validation": ("validation", "train", "test"),
  "train": ("train", "validation", "test"),
}
"""Where questions come from: the first of these splits that the harness's task has."""


def lm_eval(
  *,
  sizes: Mapping[Split, int],
  seed: int,
  task: str,
  include: str = "",
  data: Mapping[str, str] | None = None,
  num_fewshot: int | None = None,
  metric: str = "",
  answer_filter: str = "",
  name: str = "",
) -> Episode:
  """A task of lm-evaluation-harness whose answers are written (generate_until) or chosen (multiple_choice).

  Choices are compared by their log-likelihoods, which the engine has to give. Questions of a split that the task does
  not have are taken from another one, none of them twice. The harness draws its examples from its own few-shot split.

  Args:
    sizes: most questions per split.
    seed: draws the questions, and the examples of the prompts.
    task: its name.
    include: a folder with YAML files of further tasks.
    data: files (JSON lines, JSON) by the data set's split, as {train: train.jsonl, test: test.jsonl}, in place of the
      data set that the task names.
    num_fewshot: examples in a prompt. Not given: what the task says.
    metric: that is the score. Not given: the task's first.
    answer_filter: that is applied to an answer. Not given: the task's first.
    name: of the task here. Not given: its own.

  Raises:
    ValueError: naming what cannot be used, or is not there.
  """
  found = _load(task, include, data)
  chosen_metric = _checked_metric(found, task, metric)
  episode = HarnessTask(found, chosen_metric, _checked_filter(found, task, answer_filter), name or task)
  episode.draw(sizes, seed, found.config.num_fewshot or 0 if num_fewshot is None else num_fewshot)
  return episode if found.OUTPUT_TYPE == "generate_until" else HarnessChoices(episode)


class HarnessTask:
  """A task of the harness whose answers are written; see `lm_eval`.

  Args:
    task: the harness's.
    metric: that is the score.
    components: name and parts of the filter, as the harness builds it.
    name: of the task.
  """

  harness = None  # nothing is executed
  max_turns = 1

  def __init__(self, task: Any, metric: str, components: tuple[str, list[Any]], name: str):
    self.name = name
    self.metric = metric
    self.settings = json.dumps(task.dump_config(), default=str, sort_keys=True)
    self.version = metadata.version("lm_eval")
    self.filter = repr(components)
    generation = dict(task.config.generation_kwargs or {})
    until = generation.get("until", ())
    self.until = tuple([until] if isinstance(until, str) else until or ())
    if limit := generation.get("max_gen_toks"):
      self.max_new_tokens = int(limit)
    self._task = task
    self._components = components
    self._examples: dict[Split, list[Example]] = {}

  def draw(self, sizes: Mapping[Split, int], seed: int, num_fewshot: int) -> None:
    """Fixes the questions of all splits."""
    task = self._task
    docs: dict[Split, Any] = {}
    for split in SOURCES:
      own = "training" if split == "train" else split
      if getattr(task, f"has_{own}_docs")():
        docs[split] = list(getattr(task, f"{own}_docs")())
    for split, chosen in drawn({split: len(own) for split, own in docs.items()}, sizes, seed).items():
      task.set_fewshot_seed(seed)
      self._examples[split] = [self._example(docs[source][index], num_fewshot) for source, index in chosen]

  def _example(self, doc: dict[str, Any], num_fewshot: int) -> Example:
    task = self._task
    context = task.fewshot_context(doc, num_fewshot)
    if not isinstance(context, str):
      raise ValueError(f"lm_eval: {self.name} has several contexts per question, which is not supported")
    target = task.doc_to_target(doc)
    target = target[0] if isinstance(target, list) and target else target
    return Example(context, str(target), expected=doc)

  def examples(self, split: Split) -> Sequence[Example]:
    """The questions that were drawn."""
    return self._examples[split]

  def opening(self, example: Example) -> tuple[Message, ...]:
    """Examples and question, as the harness writes them."""
    return (Message("user", example.prompt),)

  def job(self, example: Example, answers: Sequence[str]) -> Job | None:
    """None: answers are read, not executed."""
    del example, answers
    return None

  def reply(self, example: Example, answers: Sequence[str], outcome: Outcome) -> float:
    """The harness's metric of the answer up to the first stop, through its filter; 0 where that fails."""
    del outcome
    text = answers[0]
    text = text[: min((place for stop in self.until if (place := text.find(stop)) >= 0), default=len(text))]
    try:
      return self.score(example, text)
    except Exception:  # anybody's code, on whatever a model wrote
      return 0.0

  def score(self, example: Example, text: str) -> float:
    """The metric of a text."""
    instances = importlib.import_module("lm_eval.api.instance")
    instance = instances.Instance("generate_until", example.expected, (example.prompt, {}), 0, resps=[text])
    filtered = self._built_filter
    filtered.apply([instance])
    return self.graded(example, [instance.filtered_resps[filtered.name]])

  def graded(self, example: Example, results: Sequence[Any]) -> float:
    """The metric of what the harness calls results."""
    return float(self._task.process_results(example.expected, list(results))[self.metric])

  def options(self, example: Example) -> list[str]:
    """The choices of a question as the harness has them."""
    return [str(choice) for choice in self._task.doc_to_choice(example.expected)]

  def label(self, choice: str) -> str:
    """A choice as it follows the prompt."""
    return f"{self._task.config.target_delimiter or ''}{choice}"

  @functools.cached_property
  def _built_filter(self) -> Any:
    return importlib.import_module("lm_eval.filters").build_filter_ensemble(*self._components)


class HarnessChoices:
  """A task of the harness whose answers are chosen; see `lm_eval`."""

  harness = None
  max_turns = 1

  def __init__(self, task: HarnessTask):
    self.task = task
    self.name = task.name

  def examples(self, split: Split) -> Sequence[Example]:
    """The questions, each with its first right choice as the answer."""
    return [Example(each.prompt, self._right(each), expected=each.expected) for each in self.task.examples(split)]

  def opening(self, example: Example) -> tuple[Message, ...]:
    """As `HarnessTask`."""
    return self.task.opening(example)

  def choices(self, example: Example) -> Sequence[str]:
    """See `Choosing`."""
    return [self.task.label(choice) for choice in self.task.options(example)]

  def choose(self, example: Example, likelihoods: Sequence[float]) -> str:
    """The likeliest, by the metric's measure of length; the first of equals."""
    choices, length = self.task.options(example), LENGTHS[self.task.metric]
    values = [value / max(length(choice), 1) for value, choice in zip(likelihoods, choices, strict=True)]
    return self.task.label(choices[values.index(max(values))])

  def job(self, example: Example, answers: Sequence[str]) -> Job | None:
    """None."""
    del example, answers
    return None

  def reply(self, example: Example, answers: Sequence[str], outcome: Outcome) -> float:
    """The harness's metric, as if the choice were certain."""
    del outcome
    choices = self.choices(example)
    return self._value(example, choices.index(answers[0])) if answers[0] in choices else 0.0

  def _value(self, example: Example, chosen: int) -> float:
    places = range(len(self.task.options(example)))
    return self.task.graded(example, [(float(place == chosen) - 1, place == chosen) for place in places])

  def _right(self, example: Example) -> str:
    labels = self.choices(example)
    return next((label for place, label in enumerate(labels) if self._value(example, place) >= 1), "")


def drawn(
  available: Mapping[Split, int], sizes: Mapping[Split, int], seed: int
) -> dict[Split, list[tuple[Split, int]]]:
  """Which questions are in which split: for each its source and its place there, none in two splits.

  Raises:
    ValueError: if there are fewer questions than splits to share them; see `divide_by_seed`.
  """
  sharing: dict[Split, list[Split]] = {}
  for split, preferred in SOURCES.items():
    source = next((each for each in preferred if available.get(each)), None)
    if source is None:
      raise ValueError(f"lm_eval: expected questions for {split}, got none in any split")
    sharing.setdefault(source, []).append(split)
  chosen: dict[Split, list[tuple[Split, int]]] = {}
  for source, splits in sharing.items():
    own: dict[Split, int] = {split: sizes[split] if split in splits else 0 for split in SOURCES}
    divided = divide_by_seed(range(available[source]), own, seed, f"lm_eval: {source}")
    chosen |= {split: [(source, index) for index in divided[split]] for split in splits}
  return chosen


def _installed() -> Any:
  """The harness, kept from asking the network."""
  for setting in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
    os.environ.setdefault(setting, "1")
  try:
    importlib.import_module("datasets").config.HF_DATASETS_OFFLINE = True
    return importlib.import_module("lm_eval.tasks")
  except ImportError as error:
    raise ValueError(f"lm_eval: needs lm-evaluation-harness: pip install 'cqd_jax[lm-eval]' ({error})") from error


def _load(task: str, include: str, data: Mapping[str, str] | None) -> Any:
  """The harness's task with its data."""
  harness = _installed()
  if missing := [path for path in (include, *(data or {}).values()) if path and not Path(path).exists()]:
    raise ValueError(f"lm_eval: {missing[0]}: no such file or folder")
  spec: Any = task
  if data is not None:
    files = {split: str(Path(path).absolute()) for split, path in data.items()}
    own = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    spec = {"group": "local", "task": [{"task": task, **own}]}  # only in a group is a task's own config completed
  try:
    manager = harness.TaskManager(include_path=include or None, include_defaults=False) if include else None
    if manager is None or task not in manager.all_tasks:  # the harness's own tasks are thousands of files
      manager = harness.TaskManager(include_path=include or None)
    found = list(manager.load([spec])["tasks"].values())
  except Exception as error:  # of YAML, of the data set, of the task's own code
    raise ValueError(f"lm_eval: {task!r} cannot be loaded ({type(error).__name__}: {error})") from error
  if len(found) != 1:
    raise ValueError(f"lm_eval: expected the name of one task, got {task!r}, which is {len(found)}")
  if found[0].OUTPUT_TYPE not in ("generate_until", "multiple_choice"):
    raise ValueError(f"lm_eval: expected generate_until or multiple_choice, got {task!r}: {found[0].OUTPUT_TYPE}")
  if found[0].config.unsafe_code:
    raise ValueError(f"lm_eval: {task!r} executes answers in this process; name it as a task with a harness instead")
  return found[0]


def _checked_metric(found: Any, task: str, metric: str) -> str:
  """One that is a number per question, the more the better."""
  means = [name for name, total in found.aggregation().items() if getattr(total, "__name__", "") == "mean"]
  known = [name for name in means if found.higher_is_better().get(name, True)]
  if found.OUTPUT_TYPE == "multiple_choice":
    known = [name for name in known if name in LENGTHS]
  if not known or (metric and metric not in known):
    raise ValueError(f"lm_eval: expected a metric of {task!r} among {known}, got {metric or list(found.aggregation())}")
  return metric or known[0]


def _checked_filter(found: Any, task: str, name: str) -> tuple[str, list[Any]]:
  """Its name, and its parts as the harness builds them."""
  filters: dict[str, list[Any]] = {"none": [("take_first", None)]}
  if found.config.filter_list:
    filters = {
      str(each["name"]): [
        (part["function"], {key: value for key, value in part.items() if key != "function"} or None)
        for part in each["filter"]
      ]
      for each in found.config.filter_list
    }
  if name and name not in filters:
    raise ValueError(f"lm_eval: expected a filter of {task!r} among {list(filters)}, got {name!r}")
  chosen = name or next(iter(filters))
  return chosen, filters[chosen]
