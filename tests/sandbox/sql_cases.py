"""Whether the databases of DBBench are at hand."""

import importlib

import pytest

from cqd_jax.sandbox.mariadb import MariaDBUnavailable, check_client, programs, unprivileged_user
from cqd_jax.sandbox.sandbox import probe

DATA = "shared/data/dbbench/standard.jsonl"


def need(database):
  """Skips the test, with the reason, where the database is not at hand."""
  if database == "sqlite":
    if (reason := probe()) is not None:
      pytest.skip(f"nothing isolates answers here: {reason}")
    return
  try:
    check_client()
    programs()
    unprivileged_user()
  except MariaDBUnavailable as error:
    pytest.skip(str(error))


def published(rootpath):
  """The path of the published data; skips the test where they are not there."""
  path = rootpath.parent / DATA
  if not path.is_file():
    pytest.skip(f"no data at {path}")
  return path


def of_the_task(rootpath, name):
  """A module beside the task's own tests."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(rootpath / "tests/tasks/dbbench"))
    return importlib.import_module(name)
