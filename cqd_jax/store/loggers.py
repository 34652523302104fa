"""Metrics to where people watch them: TensorBoard, Weights & Biases."""

import contextlib
import importlib
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cqd_jax.store.run_dir import write_text


@runtime_checkable
class MetricsLogger(Protocol):
  """Takes the figures of a step."""

  def log(self, step: int, figures: Mapping[str, float]) -> None:
    """Records figures by name, as "coverage/coding"."""

  def close(self) -> None:
    """Ends the recording."""


class TensorBoardLogger:
  """Event files that TensorBoard reads, by tensorboardX; written in this thread, so an error is the caller's to see.

  Args:
    folder: for the event files; a new one is added for each logger.
    first_step: TensorBoard forgets what earlier files tell of this step and later ones: a resumed run reports it again.
  """

  def __init__(self, folder: Path, *, first_step: int = 0):
    # Imported here: protocol buffers take a quarter of a second.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2
    from tensorboardX.summary import scalar

    folder.mkdir(parents=True, exist_ok=True)
    self._event, self._scalar = event_pb2, scalar
    self._writer = EventsWriter(str(folder / "events"))
    if first_step:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._write(first_step, session_log=start)

  def log(self, step: int, figures: Mapping[str, float]) -> None:
    """See `MetricsLogger`; what is not finite is left out."""
    for name, value in figures.items():
      if math.isfinite(value):
        self._write(step, summary=self._scalar(name, value))
    self._writer.flush()

  def close(self) -> None:
    """See `MetricsLogger`."""
    self._writer.close()

  def _write(self, step: int, **content: Any) -> None:
    self._writer.write_event(self._event.Event(step=step, wall_time=time.time(), **content))


class WandbLogger:
  """A run of Weights & Biases; needs the extra `pip install 'cqd_jax[wandb]'`. Its own settings (WANDB_MODE) hold.

  Args:
    project: where the run goes.
    name: of the run, for people.
    folder: for what wandb keeps on disk, and for the run's id, by which a resumed run goes on in the same curves.
    config: shown beside the run.
  """

  def __init__(self, project: str, *, name: str, folder: Path, config: Mapping[str, Any]):
    try:
      wandb: Any = importlib.import_module("wandb")
    except ImportError as error:
      raise ValueError("output.wandb_project: needs wandb: pip install 'cqd_jax[wandb]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "id"
    if not known.is_file():
      write_text(known, uuid.uuid4().hex)
    self._run = wandb.init(
      project=project,
      name=name,
      id=known.read_text(encoding="utf-8"),
      dir=str(folder),
      resume="allow",
      config=dict(config),
      save_code=False,
    )

  def log(self, step: int, figures: Mapping[str, float]) -> None:
    """See `MetricsLogger`."""
    self._run.log(dict(figures), step=step)

  def close(self) -> None:
    """See `MetricsLogger`."""
    self._run.finish()


@contextlib.contextmanager
def all_closed(loggers: Sequence[MetricsLogger]) -> Iterator[Sequence[MetricsLogger]]:
  """Closes the loggers when the block ends, each even if another fails."""
  with contextlib.ExitStack() as stack:
    for logger in loggers:
      stack.callback(logger.close)
    yield loggers
