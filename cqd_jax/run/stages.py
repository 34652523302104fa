"""A run from its first method to its report; each stage finds what an earlier session has done, so it can be resumed.

Search, compare, test, write: scores are kept in the history, each method in checkpoints, and `scores.json` is written
when everything else is there.
"""

import base64
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cqd_jax.genotypes.space import Space, population_of_one, take
from cqd_jax.report.archive_plot import plot_archives, save_figure
from cqd_jax.report.page import write_report
from cqd_jax.report.png import png_bytes
from cqd_jax.run.artifacts import write_best, write_models
from cqd_jax.run.basis_table import describe_basis
from cqd_jax.run.compare import Offer, Row, offers_of, plain_offers, score_on_test
from cqd_jax.run.context import Method, RunContext
from cqd_jax.run.files import RunFiles, again
from cqd_jax.run.loop import Loop, Searched
from cqd_jax.run.read_run import read_record
from cqd_jax.run.scoring import names_of
from cqd_jax.run.table import cost_table, make_table, rows_as_markdown
from cqd_jax.store.checkpoints import Checkpoints
from cqd_jax.store.run_dir import RunDirError, is_disk_full, write_json, write_text
from cqd_jax.tasks.problem import Sample, Transcribed
from cqd_jax.tasks.task import AskedSplit
from cqd_jax.terminal.interrupt import Stopped
from cqd_jax.types import Genotype

REPORTED: tuple[AskedSplit, ...] = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run gives.

  Attributes:
    run_dir: the run directory.
    rows: every method on the test split.
    throughput: individuals scored per second while the first method searched, and the share of its time that went into
      recording; what else the problem counts.
    seconds: by stage, all sessions together.
  """

  run_dir: Path
  rows: list[Row]
  throughput: dict[str, float]
  seconds: dict[str, float]


@contextlib.contextmanager
def stage(files: RunFiles, name: str) -> Iterator[None]:
  """Times a block and notes its seconds, also where it is ended."""
  started = time.perf_counter()
  try:
    yield
  finally:
    files.record_seconds(name, time.perf_counter() - started)


@contextlib.contextmanager
def explained(run_dir: Path, resume: str) -> Iterator[None]:
  """Says how to go on, with the command `resume`, where a run is stopped or its disk is full."""
  advice = f"nothing scored is lost; go on with: {resume}"
  try:
    yield
  except Stopped as stopped:
    raise Stopped(f"stopped; {advice}") from stopped
  except Exception as error:
    if is_disk_full(error):
      raise RunDirError(f"{run_dir}: no space left on its disk; free some, {advice}") from error
    raise


def run_stages(context: RunContext, methods: Sequence[Method], facts: dict[str, str]) -> Result:
  """Runs what is missing of a run.

  Args:
    context: of the run.
    methods: the first is the one whose archives the report shows and whose individuals are written.
    facts: short lines about the run, for the report.

  Raises:
    ValueError: naming the method's setting that cannot be used, or the task that changed since the run began.
    Stopped: if somebody asked for it.
  """
  files = context.files
  problem = context.problem
  files.check_problem({split: problem.fingerprint(split) for split in REPORTED})
  # What cannot be made is refused before anything is scored.
  loops = [Loop(context, method, first=index == 0) for index, method in enumerate(methods)]
  files.describe(
    planned=loops[0].budget, swarm_sizes=context.swarm_sizes, method=methods[0].name, facts=facts, unit=context.unit
  )
  with stage(files, "evolve"):
    _describe_space(context, loops[0])
    first = loops[0].run()
    context.teachers.swarm = first.population(), first.space
  throughput = _throughput_of_search(context)
  _draw_archives(context, first)
  write_report(read_record(files), files.report)  # it can be looked at while the rest is computed
  with stage(files, "compare"):
    others = [loop.run() for loop in loops[1:]]
    offers = [
      *plain_offers(context),
      *(offer for searched in others for offer in offers_of(context, searched)),
      *offers_of(context, first),
    ]
  with stage(files, "test"):
    rows = score_on_test(context, offers)
  with stage(files, "write"):
    write_models(context, first)
    for searched in others:
      if getattr(searched.algorithm, "writes_model", False):
        write_best(context, searched, files.models / searched.method.slug)
  return _finish(context, methods, first, _best_offer(offers, first), rows, throughput)


def show(result: Result, files: RunFiles, console: Console, title: str) -> None:
  """Prints the table, the seconds and where the report is."""
  record = read_record(files)
  console.print(make_table(result.rows, record.task_names, record.swarm_sizes, title))
  stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
  console.print(f"{stages}; {sum(result.seconds.values()):.0f} s in all", highlight=False)
  console.print(
    f"any {'/'.join(map(str, record.swarm_sizes))}: what so many members solve together, chosen on validation; scored: "
    "candidates scored on validation; answers: in all, those that were learned from included",
    highlight=False,
  )
  console.print(cost_table(record.costs))
  console.print(f"Report: {files.report} (open it in a browser)", highlight=False)


def read_result(files: RunFiles) -> Result:
  """The result of a finished run.

  Raises:
    RunDirError: naming the file that is damaged.
  """
  content = files.read_scores()
  try:
    rows = [
      Row(**{**row, "solved": {int(size): share for size, share in row["solved"].items()}}) for row in content["test"]
    ]
  except (TypeError, ValueError) as error:
    raise RunDirError(f"{files.scores}: damaged, 'test': {error}; {again(files)}") from error
  return Result(files.path, rows, content["throughput"], content["seconds"])


def _finish(
  context: RunContext,
  methods: Sequence[Method],
  first: Searched,
  best: Offer,
  rows: list[Row],
  throughput: dict[str, float],
) -> Result:
  """Writes the results; from then on the run is finished."""
  files, names = context.files, context.task_names
  samples = _samples(context, best)
  throughput |= _throughput_of_problem(context)
  seconds = files.read_facts()["seconds"]
  write_text(files.path / "table.md", rows_as_markdown(rows, names, context.swarm_sizes))
  for method in methods:
    with Checkpoints(files.path / "checkpoints" / method.slug) as checkpoints:
      checkpoints.prune(keep=1)
  repertoire = first.repertoire
  population = first.population()
  aggregated = (
    []
    if repertoire is None
    else [int(repertoire.best(archive).lineage.identity) for archive in range(repertoire.num_tasks)]
  )
  write_json(  # last but the report, which resuming would write again
    files.scores,
    {
      "tasks": list(names),
      "seed": context.seed,
      "test": [dataclasses.asdict(row) for row in rows],
      "best": int(population.identities[first.best(population)]),
      "aggregated": aggregated,
      "samples": samples,
      "expert_scores_on_validation": first.initial_scores.tolist(),
      "throughput": throughput,
      "seconds": seconds,
    },
  )
  write_report(read_record(files), files.report)
  return Result(files.path, rows, throughput, seconds)


def _samples(context: RunContext, best: Offer) -> list[dict[str, Any]]:
  """What the best individual answers, pictures as text."""
  assert best.model is not None
  individual = take(best.space.as_scored(population_of_one(best.model)), 0)
  return [
    {
      **{field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)},
      "pictures": [
        [caption, base64.b64encode(png_bytes(np.asarray(image))).decode()] for caption, image in sample.pictures
      ],
    }
    for sample in _shown(context, individual, best.space.scored_in)
  ]


def _shown(context: RunContext, individual: Genotype, space: Space) -> Sequence[Sample]:
  """From what is kept of its test if that will do; else it is asked again."""
  problem, count = context.problem, context.output.samples
  if isinstance(problem, Transcribed):
    (name,) = names_of(population_of_one(individual), space)
    kept = context.history.transcripts("test", problem.fingerprint("test"), name)
    if (found := problem.shown("test", kept, count)) is not None:
      return found
  return problem.samples("test", individual, space, count)


def _best_offer(offers: Sequence[Offer], first: Searched) -> Offer:
  names = (first.method.name, f"{first.method.name}, best elite")
  return next(offer for offer in offers if offer.name in names)


def _describe_space(context: RunContext, loop: Loop) -> None:
  basis = loop.space.basis
  if basis is not None:
    line, table = describe_basis(basis, context.expert_names)
    context.console.print(line, highlight=False)
    write_text(context.files.path / "basis.md", table)


def _draw_archives(context: RunContext, first: Searched) -> None:
  repertoire = first.repertoire
  if repertoire is not None:
    figure = plot_archives(repertoire, context.task_names, experts=first.initial_scores)
    save_figure(figure, context.files.path / "archives.png")


def _throughput_of_search(context: RunContext) -> dict[str, float]:
  clock = context.clock
  if not clock.iterate_s:
    return {}
  return {
    "candidates_per_s_evolving": clock.candidates / clock.iterate_s,
    "recording_share_of_evolving": clock.record_s / clock.iterate_s,
  }


def _throughput_of_problem(context: RunContext) -> dict[str, float]:
  clock, problem = context.clock, context.problem
  found = {}
  if decoding := getattr(problem, "decode_seconds", 0.0):
    found["candidates_per_s_decoding"] = clock.candidates / decoding
  if grading := getattr(problem, "grade_seconds", 0.0):
    found["answers_per_s_grading"] = clock.samples / grading
  if decoding and (tokens := getattr(problem, "decoded_tokens", 0)):
    found["tokens_per_s_decoding"] = tokens / decoding
  return found
