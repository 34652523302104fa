"""`cqd distill`: one model learns what a run's experts and swarm answered right; the run may be finished or not."""

import dataclasses
from pathlib import Path

from rich.console import Console

from cqd_jax.config.plugs import Plug
from cqd_jax.report.page import write_report
from cqd_jax.run.artifacts import write_best
from cqd_jax.run.commands import restored
from cqd_jax.run.compare import Row, offers_of, score_on_test
from cqd_jax.run.compile_cache import use_compile_cache
from cqd_jax.run.experiment import check_isolation, title_of
from cqd_jax.run.files import RunFiles, open_run, read_settings
from cqd_jax.run.loop import Loop
from cqd_jax.run.methods import as_methods, methods_of
from cqd_jax.run.read_run import read_record
from cqd_jax.run.stages import explained, read_result
from cqd_jax.run.table import make_table, rows_as_markdown
from cqd_jax.store.run_dir import RunDirError, locked, write_json, write_text
from cqd_jax.terminal.interrupt import interruptible


def distill(run_dir: Path, plug: Plug, console: Console) -> Path:
  """Teaches one model, and writes it; a finished run's table gets its row.

  Args:
    run_dir: of a run of language models that has a checkpoint.
    plug: of the method: `distill` with its settings and a name.
    console: where progress and the table go.

  Returns:
    The model's folder.

  Raises:
    ValueError: naming the run directory or the setting that cannot be used, or the folder that exists.
    Stopped: after Ctrl-C; the same command goes on.
  """
  files = open_run(run_dir)
  (method,) = as_methods([plug])
  folder = files.models / method.slug
  if folder.exists():
    raise RunDirError(f"{folder}: already exists; nothing was overwritten (another one: --name NAME)")
  settings = read_settings(files)
  if method.name in [own.name for own in methods_of(settings)]:
    raise RunDirError(f"{run_dir}: has a method named {method.name!r}; expected another --name")
  use_compile_cache(settings.cache_dir)
  with (
    locked(run_dir),
    explained(run_dir, "the same command"),
    restored(files, console) as (context, swarm),
    interruptible(lambda text: console.print(text, highlight=False)) as interrupt,
  ):
    check_isolation(settings, context.problem)
    context = dataclasses.replace(context, interrupt=interrupt)
    context.teachers.swarm = swarm.population(), swarm.space
    searched = Loop(context, method, first=False).run()
    (row,) = score_on_test(context, offers_of(context, searched))
    write_best(context, searched, folder)
    sizes, names = context.swarm_sizes, context.task_names
  rows = _with_row(files, row, names, sizes) if files.finished else [row]
  console.print(make_table(rows, names, sizes, title_of(settings)))
  console.print(f"Model: {folder}", highlight=False)
  return folder


def _with_row(files: RunFiles, row: Row, names: tuple[str, ...], sizes: tuple[int, ...]) -> list[Row]:
  """The rows of a finished run with one more, written wherever they are shown."""
  content = files.read_scores()
  kept = [own for own in read_result(files).rows if own.name != row.name]
  rows = [*kept, row]
  write_text(files.path / "table.md", rows_as_markdown(rows, names, sizes))
  write_json(files.scores, {**content, "test": [dataclasses.asdict(own) for own in rows]})
  write_report(read_record(files), files.report)
  return rows
