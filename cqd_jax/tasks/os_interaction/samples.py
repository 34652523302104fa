"""The published samples, read from their JSON: what is set up, asked, and checked."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cqd_jax.tasks.splits import SPLITS, divide_by_seed
from cqd_jax.tasks.task import Split

LANGUAGES = ("bash", "python", "c++", "c")


class Script(NamedTuple):
  """A program as text; `language` is one of `LANGUAGES`."""

  language: str
  code: str


class Match(NamedTuple):
  """What an answer has to be.

  Attributes:
    answer: the very text, or None.
    regex: what is to be found in it where there is no text.
    strip: whether space around the answer does not count.
  """

  answer: str | None
  regex: str
  strip: bool

  def fits(self, answer: str) -> bool:
    """Whether an answer is right."""
    given = answer.strip() if self.strip else answer
    return given == self.answer if self.answer is not None else re.search(self.regex, given) is not None


@dataclasses.dataclass(frozen=True)
class Sample:
  """One sample.

  Attributes:
    name: its group, file and place, as "std-001-stock-00000".
    description: what is asked.
    init: executed before all else, each in a shell of its own.
    start: executed in the shell that the model then speaks to; "" for nothing.
    match: what the answer has to be; or else there are checks.
    checks: each gets the answer and the outputs of those before as arguments, and has to end with 0; None among them
      is the example.
    example: a solution that prints the answer where one is asked for, or None.
  """

  name: str
  description: str
  init: tuple[Script, ...]
  start: str
  match: Match | None
  checks: tuple[Script | None, ...]
  example: Script | None

  @property
  def steps(self) -> tuple[Script, ...]:
    """The checks, with the example in its places."""
    return tuple(step or self.example or Script("bash", "exit 1") for step in self.checks)

  @property
  def languages(self) -> set[str]:
    """In which something of it is written."""
    return {script.language for script in (*self.init, *self.steps)}


def read_samples(folder: Path) -> list[Sample]:
  """The samples of all groups, in their order.

  Args:
    folder: holds `data/GROUP/*.json` and `scripts/GROUP/`, where a group is a number.

  Raises:
    ValueError: naming the file and the field that is not as expected, or the folder that holds none.
  """
  groups = sorted(
    (path for path in (folder / "data").glob("*") if path.name.isdigit()), key=lambda path: int(path.name)
  )
  samples = [
    sample
    for group in groups
    for file in sorted(group.glob("*.json"))
    for sample in _read_file(file, folder / "scripts" / group.name)
  ]
  if not samples:
    raise ValueError(f"data: expected data/1/*.json and so on in {folder}, found none")
  return samples


def _read_file(file: Path, scripts: Path) -> Iterator[Sample]:
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{file}: expected JSON; {error}") from error
  for place, item in enumerate(content if isinstance(content, list) else [content]):
    name = f"std-{int(file.parent.name):03}-{file.stem}-{place:05}"
    try:
      yield _read_sample(name, item, scripts)
    except ValueError as error:
      raise ValueError(f"{file}: sample {place}: {error}") from error


def _read_sample(name: str, item: Any, scripts: Path) -> Sample:
  item = _mapping("sample", item)
  description = item.get("description")
  if not isinstance(description, str) or not description:
    raise ValueError(f"description: expected text, got {description!r}")
  evaluation = _mapping("evaluation", item.get("evaluation"))
  # Some files have the example beside the evaluation; one has a list in the place of what is to be created.
  example = _script("example", evaluation.get("example", item.get("example")), scripts)
  created = item.get("create")
  init = created.get("init", []) if isinstance(created, Mapping) else []
  match: Match | None = None
  checks: tuple[Script | None, ...] = ()
  if "match" in evaluation:
    match = _match(evaluation["match"])
  elif "check" in evaluation:
    checks = tuple(_script("check", step, scripts) for step in _listed(evaluation["check"]))
  if not match and not checks:
    raise ValueError("evaluation: expected match or check")
  if None in checks and example is None:
    raise ValueError("evaluation: a check is the example, and there is none")
  start = _script("start", item.get("start"), scripts)
  return Sample(
    name=name,
    description=description,
    init=tuple(script for step in _listed(init) if (script := _script("init", step, scripts))),
    start=start.code if start else "",
    match=match,
    checks=checks,
    example=example,
  )


def _listed(value: Any) -> list[Any]:
  return value if isinstance(value, list) else [value]


def _mapping(field: str, value: Any) -> Mapping[str, Any]:
  if not isinstance(value, Mapping):
    raise ValueError(f"{field}: expected a mapping, got {type(value).__name__}")
  return value


def _script(field: str, value: Any, scripts: Path) -> Script | None:
  if value is None:
    return None
  if isinstance(value, str):
    return Script("bash", value)
  value = _mapping(field, value)
  language = value.get("language", "bash")
  if language not in LANGUAGES:
    raise ValueError(f"{field}.language: expected one of {', '.join(LANGUAGES)}, got {language!r}")
  if isinstance(value.get("code"), str):
    return Script(language, value["code"])
  if not isinstance(value.get("file"), str):
    raise ValueError(f"{field}: expected code or file, got {', '.join(map(str, value)) or 'nothing'}")
  path = scripts / value["file"]
  if not path.resolve().is_relative_to(scripts.resolve()) or not path.is_file():
    raise ValueError(f"{field}.file: expected a file in {scripts}, got {value['file']!r}")
  return Script(language, path.read_text(encoding="utf-8"))


def _match(value: Any) -> Match:
  if isinstance(value, str):
    return Match(value, "", strip=True)
  value = _mapping("match", value)
  answer, regex = value.get("answer"), value.get("regex")
  if not isinstance(answer if answer is not None else regex, str):
    raise ValueError("match: expected the text of an answer or a regex")
  try:
    re.compile(regex or "")
  except re.error as error:
    raise ValueError(f"match.regex: {error}") from error
  return Match(answer, regex or "", strip=bool(value.get("strip", False)))


def share_out(
  samples: Sequence[Sample], sizes: Mapping[Split, int], seed: int, source: str
) -> dict[Split, list[Sample]]:
  """The samples of each split, drawn by `seed`; no two splits share a sample, or two that ask the same of the same.

  Raises:
    ValueError: as of `divide_by_seed`.
  """
  alike: dict[tuple[Any, ...], list[Sample]] = {}
  for sample in samples:
    alike.setdefault((sample.description, sample.init, sample.start), []).append(sample)
  asked = {split: sizes.get(split, 0) for split in SPLITS}
  divided = divide_by_seed(list(alike.values()), asked, seed, source)
  return {split: [sample for each in own for sample in each][: asked[split]] for split, own in divided.items()}
