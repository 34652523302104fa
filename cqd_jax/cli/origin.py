"""Where an error began: in the package, or in a file of the user's own, as a task."""

import dataclasses
import functools
import site
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import cqd_jax

INSTALLED = ("site-packages", "dist-packages")
"""Folders of what is installed, in whatever environment."""


@dataclasses.dataclass(frozen=True)
class Origin:
  """An error that began in a user's file.

  Attributes:
    error: it, or of its causes the one that did.
    where: `file:line in function`; the file as seen from the working directory.
  """

  error: BaseException
  where: str

  def __str__(self) -> str:
    text = " ".join(str(self.error).split())
    return f"{self.where}: {type(self.error).__name__}{text and f': {text}'}"


def own_origin(error: BaseException) -> Origin | None:
  """Where an error, or else the nearest of its causes, began in a user's own file; None if nothing of it did.

  An error begins in the innermost frame that is not of a library: what NumPy raises is the fault of who called it. If
  that frame is the package's, the error is the package's, also where a user's file called the package.
  """
  for cause in _chain(error):
    if isinstance(cause, SyntaxError) and cause.filename and _is_own(cause.filename):
      return Origin(cause, f"{_shown(cause.filename)}:{cause.lineno}")
    for frame in reversed(traceback.extract_tb(cause.__traceback__)):
      if _is_own(frame.filename):
        return Origin(cause, f"{_shown(frame.filename)}:{frame.lineno} in {frame.name}")
      if _is_below(frame.filename, _package()):
        break
  return None


def _chain(error: BaseException) -> Iterator[BaseException]:
  """An error and what Python would show that it came from, each once."""
  seen: set[int] = set()
  cause: BaseException | None = error
  while cause is not None and id(cause) not in seen:
    seen.add(id(cause))
    yield cause
    cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _is_own(file: str) -> bool:
  """Whether a file is neither the package's, nor installed, nor Python's own, nor none at all, as `<string>`."""
  if file.startswith("<") or not set(INSTALLED).isdisjoint(Path(file).parts):
    return False
  return not any(_is_below(file, folder) for folder in (_package(), *_libraries()))


def _is_below(file: str, folder: Path) -> bool:
  return not file.startswith("<") and Path(file).resolve().is_relative_to(folder)


def _package() -> Path:
  return Path(cqd_jax.__file__).resolve().parent


@functools.cache
def _libraries() -> tuple[Path, ...]:
  named = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
  return tuple(Path(folder).resolve() for folder in (*named, *site.getsitepackages(), site.getusersitepackages()))


def _shown(file: str) -> str:
  path = Path(file).resolve()
  return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
