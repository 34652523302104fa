"""The console command `cqd`."""

import argparse
import contextlib
import difflib
import io
import itertools
import logging
import os
import sqlite3
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tyro
from rich.console import Console

import cqd_jax
from cqd_jax.cli.grade_command import add_grade
from cqd_jax.cli.merge_command import add_merge
from cqd_jax.cli.origin import own_origin
from cqd_jax.cli.plug_options import split_plug_options, with_plug_options
from cqd_jax.config.settings import ConfigError, ExperimentSettings, load_settings, setting_names
from cqd_jax.terminal.interrupt import Stopped

EXAMPLES = """\
from three experts to a report:
  cqd evolve experiments/skills.yaml                     the miniature experiment, a few minutes on 2 cores
  cqd evolve experiments/skills.yaml --seed 1            another seed
  cqd evolve experiments/skills.yaml --evolution.mutation svd --evolution.mutation.max-scale 2
  cqd evolve --help                                      every setting with its default
  cqd plugs                                              operators, methods, genotypes, ... with their settings

your own models, in folders of Hugging Face (whole models or LoRA adapters):
  cqd inspect BASE EXPERT EXPERT EXPERT                  do they fit, how do they differ, what rank holds them
  cqd merge RECIPE.yml OUT                               merge them by a recipe in mergekit's YAML
  cqd evolve experiments/llama3_agentbench.yaml --dry-run   files, shapes, memory and work, before anything is read

answers that were made anywhere, graded as those of its own models are:
  cqd grade mbpp --data mbpp.jsonl --answers answers.jsonl --json grades.json

a run that was stopped, killed, or out of disk:
  cqd resume runs/skills-seed-0

what it left behind (runs/skills-seed-0 as an example, finished or not):
  cqd check runs/skills-seed-0                           is every file of it sound
  cqd report runs/skills-seed-0                          report.html
  cqd plot runs/skills-seed-0 --format svg               its pictures for a paper
  cqd evaluate runs/skills-seed-0 --model aggregate      score a model on the test questions
  cqd aggregate runs/skills-seed-0 --out merged          the best elites as one model
  cqd export runs/skills-seed-0 swarm --format peft --elites all   adapters for a server that holds one base
"""


CONFIGURED = ("evolve", "train")
"""Commands that take a configuration file and every setting as an option."""

HINT = "CQD_TRACEBACK=1 shows the whole traceback"


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code: 0, 2 for what a user can mend, 1 for the unforeseen, 130 if stopped."""
  given = list(sys.argv[1:] if arguments is None else arguments)
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())  # where users have the tasks of their own
  parser = _make_parser()
  command, rest = parser.parse_known_args(given)
  if rest and command.command not in CONFIGURED:
    parser.error(f"unrecognized arguments: {' '.join(rest)}")
  if command.command in CONFIGURED:
    return in_words(lambda: _configured(command.command, rest))
  return in_words(lambda: command.run(command))


def in_words(action: Callable[[], object]) -> int:
  """Runs an action; what goes wrong is one line on standard error, and an exit code as `main` returns it.

  What began in a file of the user's own, as a task, is named with file and line. With CQD_TRACEBACK set, errors are
  raised as they are.
  """
  # What Orbax leaves unread when a disk is full is reported once, in words; for good, as it is found at the very end.
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  try:
    with _plain_words():
      action()
  except BrokenPipeError:  # who reads the output has seen enough, as `| head` does
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except Stopped as stopped:
    print(f"cqd: {stopped}", file=sys.stderr)
    return 130
  except KeyboardInterrupt:
    print("cqd: stopped at once", file=sys.stderr)
    return 130
  except Exception as error:
    if os.environ.get("CQD_TRACEBACK"):
      raise
    text, code = _explained(error)
    print(f"cqd: {text}", file=sys.stderr)
    return code
  return 0


EXPECTED = (ValueError, OSError, RuntimeError, sqlite3.Error)
"""What the package raises, with words for a user, about what a user can mend."""


def _explained(error: Exception) -> tuple[str, int]:
  """What is said of an error, and the exit code."""
  origin = own_origin(error)
  if origin is not None and origin.error is error:
    return f"{origin} ({HINT})", 1
  text, code = (f"{error}", 2) if isinstance(error, EXPECTED) else (f"unexpected {type(error).__name__}: {error}", 1)
  if origin is not None:
    return f"{text}; it began at {origin} ({HINT})", code
  return (text, code) if code == 2 else (f"{text} ({HINT})", code)


@contextlib.contextmanager
def _plain_words() -> Iterator[None]:
  """Warnings are one line; and threads keep quiet: what goes wrong in those of Orbax is raised in this one as well."""
  with warnings.catch_warnings():
    warnings.simplefilter("default")
    warnings.showwarning = lambda message, *_, **__: print(f"cqd: {message}", file=sys.stderr)
    hooks = threading.excepthook, sys.unraisablehook
    threading.excepthook, sys.unraisablehook = (lambda _: None), (lambda _: None)
    try:
      yield
    finally:
      threading.excepthook, sys.unraisablehook = hooks


def make_console() -> Console:
  """Standard output; where that is no terminal, lines are wide enough for the table."""
  console = Console()
  return console if console.is_terminal else Console(width=120)


def _make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="cqd",
    description="Evolve a population of neural networks by model merging.",
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--version", action="version", version=f"cqd_jax {cqd_jax.__version__}")
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
  commands.add_parser(
    "evolve", help="train or load the experts, evolve, compare, and write a run directory", add_help=False
  )
  plugs = commands.add_parser(
    "plugs",
    help="list what a configuration can name, with settings and defaults",
    description="List what a configuration can name, with settings and defaults; package.module:function names yours.",
    epilog=PLUGS,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  plugs.add_argument("kind", nargs="?", help="only plugs of this kind, as crossover")
  plugs.set_defaults(run=_plugs)
  inspect = commands.add_parser(
    "inspect",
    help="look at experts before they are merged",
    description="Look at experts before they are merged: do they fit their base, how large are their task vectors, "
    "what rank holds them, how alike are they.",
    epilog=INSPECT,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  inspect.add_argument("base", type=Path, metavar="BASE", help="folder of the base model")
  inspect.add_argument("experts", type=Path, nargs="+", metavar="EXPERT", help="folders: whole models, LoRA adapters")
  inspect.add_argument("--figure", type=Path, help="draw energy by rank into this file (png, svg, pdf)")
  inspect.add_argument("--max-rank", type=int, default=64, help="measure energy up to this rank (default: 64)")
  inspect.set_defaults(run=_inspect)
  add_merge(commands, make_console)
  commands.add_parser("train", help="only train the base and the experts, into the cache", add_help=False)

  def add(name: str, run: Callable[[argparse.Namespace], None], text: str, epilog: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
      name,
      help=text,
      description=f"{text[0].upper()}{text[1:]}.",
      epilog=epilog,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a directory that `cqd evolve` made")
    command.set_defaults(run=run)
    return command

  add("resume", _resume, "go on with a run that was stopped or killed", RESUME)
  evaluate = add("evaluate", _evaluate, "score a model on a run's questions, every answer executed", EVALUATE)
  evaluate.add_argument("--model", default="best", help="a name in RUN_DIR/models, or a model folder (default: best)")
  evaluate.add_argument("--split", choices=("test", "validation"), default="test", help="which questions")
  aggregate = add("aggregate", _aggregate, "merge the best elites of the archives into one model", AGGREGATE)
  aggregate.add_argument("--out", type=Path, help="folder to write (default: RUN_DIR/models/aggregate)")
  export = add("export", _export, "write members of the swarm as models, or as LoRA adapters of one base", EXPORT)
  export.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
  export.add_argument("--format", choices=("hf", "peft"), default="hf", help="whole models, or LoRA adapters")
  export.add_argument(
    "--elites",
    default="best",
    help="all; best: of each archive; none: only the best of all; or identities as 3,17 (default: best)",
  )
  export.add_argument("--rank", type=int, help="peft: of every module (default: the smallest that is exact)")
  export.add_argument(
    "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="peft: of the factors"
  )
  export.add_argument(
    "--drop-vectors", action="store_true", help="peft: leave out changed norms and biases, which vLLM does not take"
  )
  export.add_argument(
    "--drop-embeddings",
    action="store_true",
    help="peft: leave out changes of embedding and head, which vLLM does not take of every architecture",
  )
  add_grade(commands)
  distill = add("distill", _distill, "teach one model all that a run's experts and swarm answered right", DISTILL)
  distill.add_argument("--name", default="distilled", help="of the row and of the model folder (default: distilled)")
  distill.add_argument("--labels", choices=("swarm", "experts", "references"), default="swarm", help="whose answers")
  distill.add_argument(
    "--start",
    choices=("task_arithmetic", "base", "best", "average"),
    default="task_arithmetic",
    help="what is taught: the experts' sum at its best scale, the base, the swarm's best or the average of its best",
  )
  distill.add_argument("--members", type=int, default=8, help="members of the swarm that answer (default: 8)")
  distill.add_argument("--steps", type=int, default=300, help="of Adam (default: 300)")
  distill.add_argument("--learning-rate", type=float, default=5e-4, help="the largest (default: 0.0005)")
  add("check", _check, "read every file of a run, and say what is damaged and how it is made again", CHECK)
  report = add("report", _report, "write the page that shows a run, finished or not", REPORT)
  report.add_argument("--out", type=Path, help="file to write (default: RUN_DIR/report.html)")
  plot = add("plot", _plot, "write every picture of the report as files, for a paper", PLOT)
  plot.add_argument("--out", type=Path, help="folder to write into (default: RUN_DIR/figures)")
  plot.add_argument("--format", nargs="+", choices=("png", "svg", "pdf"), default=["png", "svg"], help="of the files")
  return parser


RESUME = """\
The run goes on where it was: trained models, scores and archives are kept after every step, and the result is the same,
to the bit, as if it had never been interrupted. Ctrl-C stops a run after the iteration at hand, a second one at once.

  cqd resume runs/skills-seed-0
"""

EVALUATE = """\
  cqd evaluate runs/skills-seed-0                          the elite with the best mean on validation
  cqd evaluate runs/skills-seed-0 --model aggregate
  cqd evaluate runs/skills-seed-0 --model elite-000042 --split validation
  cqd evaluate runs/skills-seed-0 --model some/folder      a folder that `cqd aggregate --out` wrote
"""

AGGREGATE = """\
theta_base + sum over k of beta_k tau_k: tau_k is the task vector of archive k's best elite, beta the softmax of their
fitnesses (CycleQD's final model). Taken from the newest checkpoint.

  cqd aggregate runs/skills-seed-0 --out merged
"""

INSPECT = """\
Nothing is loaded whole: matrices are read one by one, and adapters are never multiplied out.

  cqd inspect models/base models/coding models/database models/os --figure energy.png
"""

EXPORT = """\
OUT gets one folder per model, swarm.json that maps each to its scores and cells, and a README.md with the commands that
serve them. An adapter is exact unless --rank is smaller than needed; the error is then reported. Adapters with changed
norms or biases are for peft; vLLM, and cqd itself, take those without (--drop-vectors). Of some architectures, as
Qwen, vLLM takes no adapter of embedding or head (--drop-embeddings); the README says so where it matters.

  cqd export runs/skills-seed-0 merged                                      the best of each archive, and the aggregate
  cqd export runs/skills-seed-0 swarm --format peft --elites all            a whole swarm for one server
  cqd export runs/skills-seed-0 swarm --format peft --rank 16 --drop-vectors
"""

DISTILL = """\
Experts and the members of the swarm that complement one another best answer training questions (tasks.labels of each
task). What passed is learned by gradient steps, until the score on validation no longer rises; the table of a finished
run gets a row, and RUN_DIR/models a folder. It can be stopped, and goes on by the same command.

  cqd distill runs/skills-seed-0
  cqd distill runs/skills-seed-0 --name "taught by the experts" --labels experts
"""

PLUGS = """\
  cqd plugs crossover
  cqd evolve experiments/skills.yaml --evolution.crossover slerp --evolution.crossover.std 0.2
"""

CHECK = """\
Weights are compared with the checksums that were kept when they were written, checkpoints with their own, the history
with what a whole history is. Nothing is changed. The exit code is 0 where all is sound, else 2.

  cqd check runs/skills-seed-0
"""

REPORT = """\
  cqd report runs/skills-seed-0                            then open runs/skills-seed-0/report.html
"""

PLOT = """\
  cqd plot runs/skills-seed-0 --format svg pdf --out figures
"""


def _configured(command: str, arguments: list[str]) -> None:
  """`cqd evolve|train CONFIG.yaml [--a.b value]`: what is on the command line overrides the file."""
  dry = command == "evolve" and "--dry-run" in arguments
  arguments = [argument for argument in arguments if not (dry and argument == "--dry-run")]
  has_file = bool(arguments) and not arguments[0].startswith("-")
  default = load_settings(Path(arguments[0]), _deciding(arguments)) if has_file else ExperimentSettings()
  if not has_file and not {"-h", "--help"} & set(arguments):
    raise ConfigError(f"{command}: expected a configuration file, as in: cqd {command} experiments/skills.yaml")
  settings = _override(command, default, arguments[1:] if has_file else arguments)
  # Imported where it is used, here and below: it loads JAX, which neither --help nor a mistake needs.
  if dry:
    from cqd_jax.run.plan import dry_run

    dry_run(settings, make_console())
  elif command == "train":
    from cqd_jax.run.commands import train

    train(settings, make_console())
  else:
    from cqd_jax.run.experiment import run_experiment

    run_experiment(settings, make_console())


def _deciding(options: Sequence[str]) -> dict[str, str]:
  """The options on which the preset depends, which has to be known before the file's settings are put on top of it."""
  given = {}
  for option, following in zip(options, [*options[1:], ""], strict=True):
    name, equals, value = option.partition("=")
    if name in ("--preset", "--base") and (value := value if equals else following) != "None":
      given[name.removeprefix("--")] = value
  return given


def _override(command: str, default: ExperimentSettings, options: list[str]) -> ExperimentSettings:
  """The settings with what the options say in place of the file's; a mistake is one line, as everywhere."""
  options, own = split_plug_options(options)
  settings = _override_fields(command, default, options)
  return with_plug_options(settings, own)


def _override_fields(command: str, default: ExperimentSettings, options: list[str]) -> ExperimentSettings:
  box = io.StringIO()
  try:
    with contextlib.redirect_stderr(box):
      settings, unknown = tyro.cli(
        ExperimentSettings,
        default=default,
        args=options,
        prog=f"cqd {command} CONFIG.yaml",
        description="Settings come from CONFIG.yaml; options override them by their dotted names.\n\n"
        f"example: cqd {command} experiments/skills.yaml --seed 1 --evolution.children 400"
        + (
          "\n\n--dry-run: check files and shapes, report memory, disk and work, and end." if command == "evolve" else ""
        ),
        return_unknown_args=True,
      )
  except SystemExit as stop:
    if not stop.code:
      raise  # --help
    raise ConfigError(f"{command}: {_first_paragraph(box.getvalue())}") from None
  if unknown:
    near = difflib.get_close_matches(unknown[0].lstrip("-").replace("-", "_"), setting_names(), n=1)
    hint = f"; did you mean --{near[0].replace('_', '-')}?" if near else f"; all: cqd {command} --help"
    raise ConfigError(f"{command}: unknown option {unknown[0]!r}{hint}")
  return settings


def _first_paragraph(box: str) -> str:
  """What a message in a box, drawn in Unicode or in ASCII, says between its first two rules, on one line."""
  lines = [line.strip("│| \n") for line in box.splitlines()]
  rest = itertools.dropwhile(lambda line: not _is_rule(line), lines)
  said = itertools.takewhile(lambda line: not _is_rule(line), itertools.islice(rest, 1, None))
  return " ".join(said) or " ".join(box.split())


def _is_rule(line: str) -> bool:
  """Whether a line is one; the upper edge of a frame may hold the title."""
  return line.rstrip("╮╯+").endswith(("──", "--"))


def _plugs(arguments: argparse.Namespace) -> None:
  from cqd_jax.cli.plugs_table import show_plugs

  show_plugs(arguments.kind, make_console())


def _resume(arguments: argparse.Namespace) -> None:
  from cqd_jax.run.experiment import resume_experiment

  resume_experiment(arguments.run_dir, make_console())


def _evaluate(arguments: argparse.Namespace) -> None:
  from cqd_jax.run.commands import evaluate

  evaluate(arguments.run_dir, arguments.model, arguments.split, make_console())


def _distill(arguments: argparse.Namespace) -> None:
  from cqd_jax.config.plugs import Plug
  from cqd_jax.run.distill import distill

  given = ("labels", "start", "members", "steps", "learning_rate")
  plug = Plug("distill", {"name": arguments.name, **{name: getattr(arguments, name) for name in given}})
  distill(arguments.run_dir, plug, make_console())


def _check(arguments: argparse.Namespace) -> None:
  from cqd_jax.run.check import check

  check(arguments.run_dir, make_console())


def _aggregate(arguments: argparse.Namespace) -> None:
  from cqd_jax.run.commands import aggregate

  aggregate(arguments.run_dir, arguments.out, make_console())


def _export(arguments: argparse.Namespace) -> None:
  from cqd_jax.run.swarm import ExportSettings, export

  settings = ExportSettings(
    arguments.format,
    arguments.elites,
    arguments.rank,
    arguments.dtype,
    keep_vectors=not arguments.drop_vectors,
    keep_embeddings=not arguments.drop_embeddings,
  )
  export(arguments.run_dir, arguments.out, settings, make_console())


def _inspect(arguments: argparse.Namespace) -> None:
  from cqd_jax.inspect.command import inspect

  inspect(arguments.base, arguments.experts, make_console(), figure=arguments.figure, max_rank=arguments.max_rank)


def _report(arguments: argparse.Namespace) -> None:
  from cqd_jax.run.commands import report

  report(arguments.run_dir, arguments.out, make_console())


def _plot(arguments: argparse.Namespace) -> None:
  from cqd_jax.run.commands import plot

  plot(arguments.run_dir, arguments.out, arguments.format, make_console())


if __name__ == "__main__":
  sys.exit(main())
