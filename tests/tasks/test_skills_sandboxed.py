"""The miniature skills in the real sandbox."""

import pytest

from cqd_jax.sandbox.sandbox import Limits, Sandbox, probe
from cqd_jax.tasks.execution import Job
from cqd_jax.tasks.skills.database import NUM_DATA_SETS
from cqd_jax.tasks.skills.shell import NUM_TREES
from cqd_jax.tasks.task import grade_population


@pytest.fixture(scope="module")
def sandbox(suite):
  if reason := probe():
    pytest.skip(reason)
  limits = Limits(cpu_seconds=1, wall_seconds=20.0)
  with Sandbox([skill.harness for skill in suite.values()], limits=limits, workers=2) as started:
    yield started


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_gold_answer_passes_and_no_answer_of_another_task_does(suite, sandbox, split):
  tasks = list(suite.values())
  examples = [task.examples(split) for task in tasks]
  gold = [[example.answer for example in asked] for asked in examples]
  verdicts = grade_population(tasks, examples, [gold, gold[1:] + gold[:1]], sandbox.run)
  assert verdicts.shape == (2, 3, len(gold[0]))
  for asked, passed in zip(examples, verdicts[0], strict=True):
    assert [example.answer for example, right in zip(asked, passed, strict=True) if not right] == []
  assert not verdicts[1].any()


@pytest.mark.parametrize(
  ("answer", "status"),
  [
    ("\n  while True: pass", {"timeout", "killed"}),
    ("import os; os._exit(0)", {"killed"}),
    ("import sys; sys.exit(0)", {"killed", "error"}),
    ("import os; os.kill(1, 9); return 1", {"ok", "killed"}),
    ("return [0]*10**12", {"ok"}),  # a MemoryError on every input
    ("return len(", {"error"}),
  ],
)
def test_coding_answers_that_misbehave_fail(suite, sandbox, answer, status):
  task = suite["coding"]
  example = task.examples("test")[0]
  [outcome, after] = sandbox.run([task.job(example, answer), task.job(example, example.answer)])
  assert outcome.status in status
  assert not task.passed(example, outcome)
  assert task.passed(example, after)


@pytest.mark.parametrize("answer", ["delete from staff", "attach '/tmp/x' as y", "drop table goods", "vacuum"])
def test_database_answers_that_write_change_nothing_for_the_next(suite, sandbox, answer):
  outcomes = sandbox.run([Job("database", answer), Job("database", f"select count(*) from staff -- {answer}")])
  assert [list(result) for result in outcomes[0].value] == [["raises"]] * NUM_DATA_SETS
  assert outcomes[1].value == [[[30]]] * NUM_DATA_SETS


def test_a_shell_answer_that_removes_everything_reaches_nothing(suite, sandbox, tmp_path):
  task = suite["os"]
  keep = tmp_path / "keep"
  keep.write_text("kept")
  remove = f"rm -rf {keep} /etc /home /root /tmp; echo done"
  example = task.examples("test")[0]
  [outcome, after] = sandbox.run([Job("os", remove), task.job(example, example.answer)])
  assert keep.read_text() == "kept"
  assert not task.passed(example, outcome)
  assert task.passed(example, after)


def test_shell_answers_see_one_tree_and_leave_no_trace(sandbox):
  first, second = sandbox.run([Job("os", "ls ..; touch ../trace"), Job("os", "ls ..; : again")])
  assert [len(result["stdout"].split()) for result in second.value] == [1, 1]
  assert "trace" not in second.value[1]["stdout"]
  assert len(first.value) == NUM_TREES
