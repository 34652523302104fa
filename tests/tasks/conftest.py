"""The miniature suite, and an executor without isolation for answers that are known to be harmless."""

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cqd_jax.tasks.execution import Execute, Harness, Job, Outcome
from cqd_jax.tasks.skills import Skill, skills


@pytest.fixture(scope="session")
def suite() -> dict[str, Skill[Any]]:
  return {skill.name: skill for skill in skills()}


@pytest.fixture(scope="session", params=["coding", "database", "os"])
def skill(request: pytest.FixtureRequest, suite: dict[str, Skill[Any]]) -> Skill[Any]:
  return suite[request.param]


@pytest.fixture(scope="session")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Harness], Execute]:
  """Makes an `Execute` that runs a harness in this very process, with its files in a folder of pytest's."""

  def make(harness: Harness) -> Execute:
    scope: dict[str, Any] = {"__name__": f"harness_{harness.name}"}
    exec(compile(harness.source, f"<harness {harness.name}>", "exec"), scope)
    if "prepare" in scope:
      scope["prepare"](harness.setup)

    def execute(jobs: Sequence[Job]) -> list[Outcome]:
      return [execute_one(job) for job in jobs]

    def execute_one(job: Job) -> Outcome:
      with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder, contextlib.chdir(folder):
        scope.get("furnish", lambda: None)()
        return _execute(scope["run"], job)

    return execute

  return make


def _execute(run: Callable[[Any], Any], job: Job) -> Outcome:
  try:
    return Outcome("ok", run(job.payload))
  except Exception as error:
    return Outcome("error", None, str(error))
