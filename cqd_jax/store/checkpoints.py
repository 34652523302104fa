"""Checkpoints of all that the next iteration depends on, by Orbax: the last few, in the background, verified."""

import contextlib
import errno
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from cqd_jax.trees import fingerprint, leaf_path

State = TypeVar("State")

FINGERPRINT = "fingerprint"


class DamagedCheckpoint(ValueError):
  """A checkpoint that does not give back what was written, or does not fit; the message names its folder."""


class Checkpoints:
  """The checkpoints of one run, in one folder, each in a subfolder named by its step.

  A checkpoint appears whole or not at all. `save` returns as soon as the arrays are safe from donation; writing goes on
  in the background, and an error of it is raised by the next `save`, `wait` or `close`. Each checkpoint carries
  checksums of its leaves, which are compared when it is read: Orbax by itself restores a flipped bit without a word.

  Args:
    folder: made if need be.
    keep: how many to keep; older ones are deleted once a newer one is whole.
  """

  def __init__(self, folder: Path, *, keep: int = 3):
    if keep < 1:
      raise ValueError(f"keep: expected at least 1, got {keep}")
    self._folder = folder.absolute()
    self._options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    self._manager: ocp.CheckpointManager | None = None
    self._quiet = contextlib.ExitStack()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    # While another error is on its way, one of the background must not take its place.
    with contextlib.suppress(Exception) if error is not None else contextlib.nullcontext():
      self.close()

  def save(self, step: int, state: Any) -> None:
    """Begins to write the arrays of a pytree (typed PRNG keys included), by their paths in the tree.

    Raises:
      ValueError: if there is a checkpoint of this step.
      Exception: what went wrong while the one before was written.
    """
    if step in self.steps():
      raise ValueError(f"{self._folder / str(step)}: already exists; a checkpoint is never overwritten")
    named = _by_path(state)
    named[FINGERPRINT] = fingerprint(named)
    self._open().save(step, args=ocp.args.StandardSave(named), force=True)

  def steps(self) -> list[int]:
    """The steps of all whole checkpoints, ascending."""
    if not self._folder.is_dir():
      return []
    return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())

  def load(self, step: int, like: State) -> State:
    """Reads a checkpoint into the structure, shapes and dtypes of `like`.

    Raises:
      FileNotFoundError: if there is none of this step.
      DamagedCheckpoint: if it does not fit `like`, cannot be read, or its checksums do not agree.
    """
    path = self._folder / str(step)
    if not path.is_dir():
      raise FileNotFoundError(f"{path}: no such checkpoint")
    named = _by_path(like)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, named)
    target[FINGERPRINT] = jax.ShapeDtypeStruct((len(named), 2), jnp.uint32)
    manager = self._open()
    try:
      data = manager.restore(step, args=ocp.args.StandardRestore(target))
    except (MemoryError, PermissionError, InterruptedError):
      raise  # nothing that would tell of the checkpoint
    except Exception as error:  # Orbax and TensorStore raise many kinds; the user needs the folder's name
      if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM):
        raise
      raise DamagedCheckpoint(f"{path}: does not fit or is damaged ({_first_line(error)})") from error
    written = data.pop(FINGERPRINT)
    read = fingerprint({name: data[name] for name in named})
    if not np.array_equal(written, read):
      differs: np.ndarray = np.any(np.asarray(written) != np.asarray(read), axis=1)
      wrong = [name for name, differ in zip(sorted(named), differs, strict=True) if differ]
      raise DamagedCheckpoint(f"{path}: damaged, its checksum of {wrong[0]} does not agree")
    leaves, structure = jax.tree.flatten(like)
    restored = [_from_data(leaf, data[name]) for name, leaf in zip(named, leaves, strict=True)]
    return cast(State, jax.tree.unflatten(structure, restored))

  def verify(self, step: int) -> None:
    """Reads a checkpoint and compares its checksums, whatever it is of.

    Raises:
      DamagedCheckpoint: if it cannot be read, or its checksums do not agree.
    """
    path = self._folder / str(step)
    try:
      with _without_log(), ocp.StandardCheckpointer() as reader:
        data = reader.restore(path / "default")
      written = data.pop(FINGERPRINT)
      read = fingerprint({name: jnp.asarray(leaf) for name, leaf in data.items()})
    except (MemoryError, PermissionError, InterruptedError):
      raise
    except Exception as error:  # as in `load`
      raise DamagedCheckpoint(f"{path}: is damaged ({_first_line(error)})") from error
    if not np.array_equal(written, read):
      raise DamagedCheckpoint(f"{path}: damaged, its checksums do not agree")

  def load_newest(self, like: State, *, at_most: int | None = None) -> tuple[int, State] | None:
    """The newest checkpoint that is whole, as (step, state); None if there is none.

    A damaged one is moved aside to `damaged-STEP`, with a warning, and the one before it is tried; so is one of a step
    above `at_most`, to `unused-STEP`.
    """
    for step in reversed(self.steps()):
      if at_most is not None and step > at_most:
        self._set_aside(step, f"unused-{step}")
        warnings.warn(
          f"{self._folder / str(step)}: is ahead of the history, which ends at {at_most}; not used", stacklevel=2
        )
        continue
      try:
        return step, self.load(step, like)
      except DamagedCheckpoint as error:
        self._set_aside(step, f"damaged-{step}")
        warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
    return None

  def prune(self, *, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints, and what was set aside."""
    self.close()
    if not self._folder.is_dir():
      return
    steps = self.steps()
    kept = {str(step) for step in steps[len(steps) - keep :]}
    for path in self._folder.iterdir():
      if path.name not in kept:
        shutil.rmtree(path, ignore_errors=True)

  def wait(self) -> None:
    """Returns when all that was saved is on disk; raises what went wrong on the way."""
    if self._manager is not None:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def close(self) -> None:
    """Waits, and ends the background work."""
    if self._manager is not None:
      try:
        self.wait()
      finally:
        manager, self._manager = self._manager, None
        with contextlib.suppress(Exception), self._quiet:  # `wait` has told of it
          manager.close()

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      self._quiet.enter_context(_without_log())
      self._manager = ocp.CheckpointManager(self._folder, options=self._options)
    return self._manager

  def _set_aside(self, step: int, name: str) -> None:
    self.close()  # Orbax keeps a list of what is there
    target = self._folder / name
    shutil.rmtree(target, ignore_errors=True)
    (self._folder / str(step)).rename(target)


def _by_path(state: Any) -> dict[str, Any]:
  """The leaves by name, in the tree's order: the file then outlives a change of the classes around them."""
  return {".".join(leaf_path(path)): _to_data(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def _is_key(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_data(leaf: Any) -> Any:
  return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


def _from_data(like: Any, leaf: Any) -> Any:
  return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like)) if _is_key(like) else leaf


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0].split(". ")[0][:200] if lines else type(error).__name__


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
  """Without Orbax's log: what goes wrong is raised as well."""
  logger = logging.getLogger("absl")
  before = logger.disabled
  logger.disabled = True
  try:
    yield
  finally:
    logger.disabled = before
