"""The miniature suite, and an executor without isolation for answers that are known to be harmless."""

import contextlib
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
    folder = str(tmp_path_factory.mktemp(harness.name))
    scope: dict[str, Any] = {"__name__": f"harness_{harness.name}"}
    exec(compile(harness.source, f"<harness {harness.name}>", "exec"), scope)
    if "prepare" in scope:
      scope["prepare"](harness.setup)

    def execute(jobs: Sequence[Job]) -> list[Outcome]:
      # the harness of os leaves for the tree that it runs in
      with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setenv("TMPDIR", folder)
        return [_execute(scope["run"], job) for job in jobs]

    return execute

  return make


def _execute(run: Callable[[Any], Any], job: Job) -> Outcome:
  try:
    return Outcome("ok", run(job.payload))
  except Exception as error:
    return Outcome("error", None, str(error))
