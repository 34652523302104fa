"""What the settings become before anything is scored."""

import pytest

from cqd_jax.config.settings import ExperimentSettings
from cqd_jax.run.text_run import open_problem
from cqd_jax.sandbox import on_demand
from cqd_jax.tasks import Job


class Started(Exception):
  """Instead of a sandbox."""


@pytest.mark.parametrize(("workers", "started"), [(0, 3), (1, 1), (5, 5)])
def test_no_number_of_workers_is_one_for_each_usable_cpu(monkeypatch, workers, started):
  asked = []

  def start(harnesses, *, workers, unsafe, limits):
    asked.append(workers)
    raise Started

  monkeypatch.setattr(on_demand, "Sandbox", start)
  monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
  monkeypatch.setattr("os.cpu_count", lambda: 64)
  with open_problem(ExperimentSettings(workers=workers)) as (problem, _):
    assert not asked  # it starts when the first answer is executed
    with pytest.raises(Started):
      problem._execute([Job("coding", "return 1")])
  assert asked == [started]
