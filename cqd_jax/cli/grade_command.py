"""`cqd grade TASK --data PATH --answers FILE --json OUT`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from cqd_jax.config.plugs import Plug
from cqd_jax.config.settings import ConfigError
from cqd_jax.store.yaml_text import YAMLTextError, read_yaml, shortened

EXAMPLES = """\
FILE has a line for each answer: the place of the sample in the data, counted from 0, and what the model said, turn by
turn (a single text where the task has one turn):

  {"index": 0, "turns": ["```python\\ndef f(x): ...\\n```"]}
  {"index": 7, "turns": ["Action: Operation ...", "Action: Answer ..."]}

Turns are replayed as if a model had just said them, and really executed, each answer isolated. A dialogue that is not
over when its turns are has failed; turns after its end do not count. Samples may have several answers, or none.

OUT gets {"passed": [true, false, ...], "score": 0.5, ...}: a verdict for each line of FILE in its order (empty lines
are none), and the mean. A line that is broken is named, counts as failed, and is listed under "broken"; samples without
an answer are listed under "unanswered" and do not count.

  cqd grade mbpp --data mbpp.jsonl --answers answers.jsonl --json grades.json
  cqd grade "{use: mbpp, seconds: 10}" --data mbpp.jsonl --answers answers.jsonl --json grades.json
  cqd grade "{use: jsonl, rule: numeric}" --data questions.jsonl --answers answers.jsonl --json grades.json

Exit code: 0 if answers were graded (also if lines are broken); 2 if none could be, or a file or setting is wrong; 130
if it was stopped. OUT is written whole or not at all.
"""


def add_grade(commands: Any) -> None:
  """Adds the command to those of a parser."""
  text = "grade answers that were made anywhere, every one executed"
  command = commands.add_parser(
    "grade",
    help=text,
    description=f"{text.capitalize()}.",
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  command.add_argument(
    "task", metavar="TASK", help="a task that reads data, by name (cqd plugs tasks) or {use: NAME, ...}"
  )
  command.add_argument("--data", type=Path, required=True, metavar="PATH", help="the samples of the task")
  command.add_argument("--answers", type=Path, required=True, metavar="FILE", help="JSON Lines, an answer each")
  command.add_argument("--json", type=Path, required=True, metavar="OUT", help="file to write the verdicts to")
  command.add_argument("--workers", type=int, help="answers executed at a time (default: one for each CPU)")
  command.add_argument("--unsafe", action="store_true", help="execute WITHOUT isolation where nothing isolates")
  command.set_defaults(run=_grade)


def _grade(arguments: argparse.Namespace) -> None:
  # Imported where it is used: it loads JAX, which --help does not need.
  from cqd_jax.run.grade import grade

  def complain(text: str) -> None:
    print(f"cqd: {text}", file=sys.stderr, flush=True)

  console = Console()
  grade(
    _plug(arguments.task),
    arguments.data,
    arguments.answers,
    arguments.json,
    console if console.is_terminal else Console(width=120),
    complain,
    workers=arguments.workers,
    unsafe=arguments.unsafe,
  )


def _plug(text: str) -> Plug:
  try:
    return Plug.parse(read_yaml(text))
  except (YAMLTextError, ValueError) as error:
    raise ConfigError(f"TASK: expected a name, or {{use: NAME, ...}}, got {shortened(text)!r} ({error})") from error
