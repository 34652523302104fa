"""What the JSON files of a run directory hold, and the one door through which they are read."""

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from cqd_jax.store.run_dir import RunDirError, read_json
from cqd_jax.store.yaml_text import shortened

FORMAT = 3

STRICT = ConfigDict(strict=True, extra="allow")
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0)]
Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


@with_config(STRICT)
class Session(TypedDict):
  """A session of a run."""

  began: str
  versions: dict[str, str]
  devices: list[str]


@with_config(STRICT)
class Record(TypedDict):
  """What the report says beside what the history has."""

  planned: Count
  swarm_sizes: list[Size]
  method: str
  facts: dict[str, str]
  unit: NotRequired[str]


@with_config(STRICT)
class Facts(TypedDict):
  """`run.json`."""

  format: int
  kind: str
  created: str
  settings: dict[str, Any]
  sessions: Annotated[list[Session], Field(min_length=1)]
  seconds: dict[str, Seconds]
  record: NotRequired[Record]
  models: NotRequired[dict[str, str]]
  problem: NotRequired[dict[str, str]]


@with_config(STRICT)
class TableRow(TypedDict):
  """A row of the table."""

  name: str
  scores: dict[str, float]
  mean: float | None
  minimum: float | None
  evaluations: Count
  solved: dict[str, float]
  chosen: NotRequired[dict[str, float]]
  answers: NotRequired[Count]


@with_config(STRICT)
class SampleAnswer(TypedDict):
  """A sample of the best individual; pictures are [caption, PNG in base 64], turns [role, text]."""

  task: str
  prompt: str
  gold: str
  answer: str
  score: float | None
  pictures: list[Pair]
  turns: NotRequired[list[Pair]]
  reason: NotRequired[str]


@with_config(STRICT)
class Scores(TypedDict):
  """`scores.json`."""

  tasks: Annotated[list[str], Field(min_length=1)]
  seed: int
  test: list[TableRow]
  best: Count
  aggregated: list[Count]
  samples: list[SampleAnswer]
  throughput: dict[str, float]
  seconds: dict[str, Seconds]


Content = TypeVar("Content")


def read_as(path: Path, kind: type[Content], advice: str = "") -> Content:
  """A JSON file, checked.

  Args:
    path: of the file.
    kind: `Facts` or `Scores`.
    advice: what to do about a damaged one.

  Raises:
    RunDirError: naming the file and the field that is missing or of the wrong type.
  """
  content = read_json(path)
  if kind is Facts and (not isinstance(content, dict) or content.get("format") != FORMAT):
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    raise RunDirError(
      f"{path}: expected a run of format {FORMAT}, got {shortened(repr(found))}; a run of another format can be looked "
      "at, and gone on with, by the version of cqd_jax that made it"
    )
  try:
    return TypeAdapter(kind).validate_python(content)
  except ValidationError as error:
    problem = error.errors()[0]
    name = ".".join(map(str, problem["loc"])) or "the whole"
    said = f"{path}: damaged, {shortened(name)!r}: {problem['msg']}, got {shortened(repr(problem['input']))}"
    raise RunDirError(said + (f"; {advice}" if advice else "")) from error
