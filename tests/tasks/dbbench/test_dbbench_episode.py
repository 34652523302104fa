"""Dialogues: what is executed, what is shown, what ends them, and what each kind of a model scores."""

import pytest
from dbbench_cases import ENTRIES, TABLE, write
from dbbench_policies import SCORES, Scripted, answer, operate, score_policies

from cqd_jax.sandbox.dbbench import dbbench, harness_source
from cqd_jax.tasks import Episode, Message, Outcome, TextProblem
from cqd_jax.tasks.dbbench.episode import INSTRUCTION

SIZES = {"train": 0, "validation": 0, "test": len(ENTRIES)}


@pytest.fixture
def task(tmp_path):
  return dbbench(sizes=SIZES, seed=0, data=str(write(tmp_path / "data.jsonl")))


@pytest.fixture
def by_kind(task):
  return {example.expected["kind"]: example for example in task.examples("test")}


def test_each_policy_scores_what_it_must(task, in_process):
  assert isinstance(task, Episode)
  assert score_policies(task, in_process(task.harness)) == SCORES


def test_the_harness_is_one_text_without_this_package():
  assert "cqd_jax" not in harness_source()


def test_the_dialogue(task, by_kind):
  example = by_kind["other"]
  opening = task.opening(example)
  assert [message.role for message in opening] == ["user", "assistant", "user"]
  assert opening[0].content == INSTRUCTION
  assert opening[2].content == f"Which nation has 37 medals?\nThe table is {TABLE}."
  answers = [operate("SELECT\nNation")]
  job = task.job(example, answers)
  assert job.payload["statements"] == ["SELECT Nation"]
  assert task.reply(example, answers, Outcome("ok", {"observation": "x" * 900})) == Message(
    "user", "x" * 800 + "[TRUNCATED]"
  )
  answers.append(answer("['Norway']"))
  assert task.job(example, answers) is None
  assert task.reply(example, answers, Outcome("ok")) == 1.0


def test_a_changed_table_is_graded_whatever_is_answered(task, by_kind):
  example = by_kind["INSERT"]
  for last in ("", answer("['no']"), "Action: Operation\n```sql\nnever closed"):
    answers = [operate(example.answer), last]
    job = task.job(example, answers)
    assert job.payload["hash"]
    assert job.payload["statements"] == [example.answer]
    assert task.reply(example, answers, Outcome("ok", {"hash": example.expected["answer_md5"]})) == 1.0
    assert task.reply(example, answers, Outcome("ok", {"hash": "0" * 32})) == 0.0


@pytest.mark.parametrize(
  "outcome",
  [Outcome("ok", None), Outcome("ok", [1]), Outcome("ok", {"hash": None, "observation": 3}), Outcome("timeout")],
)
def test_odd_outcomes_are_failures_and_no_errors(task, by_kind, outcome):
  example = by_kind["INSERT"]
  assert task.reply(example, [operate("x"), ""], outcome) == 0.0
  reply = task.reply(example, [operate("x")], outcome)
  assert reply.role == "user"
  assert reply.content.startswith("Error: the operation was ended")


def test_answers_made_elsewhere_are_of_all_samples(task):
  assert [example.expected["index"] for example in task.samples()] == list(range(len(ENTRIES)))
  example = task.samples()[0]
  assert task.action(example, [operate("SELECT\n1")]) == "SELECT 1"
  assert task.action(example, [operate("SELECT 1"), answer("[1]")]) == ""


def test_no_more_operations_than_allowed(tmp_path):
  task = dbbench(sizes=SIZES, seed=0, data=str(write(tmp_path / "data.jsonl")), operations=2)
  example = task.examples("test")[0]
  answers = [operate("SELECT 1"), operate("SELECT 2"), operate("SELECT 3")]
  assert isinstance(task.reply(example, answers[:2], Outcome("ok", {"observation": "[]"})), Message)
  assert task.reply(example, answers, Outcome("ok")) == 0.0
  assert task.max_turns == 3


def test_settings(tmp_path):
  path = str(write(tmp_path / "data.jsonl"))
  (tmp_path / "told.txt").write_text("Do it.")
  told = dbbench(sizes=SIZES, seed=0, data=path, instruction=str(tmp_path / "told.txt"), name="db")
  assert told.name == "db"
  assert told.opening(told.examples("test")[0])[0].content == "Do it."
  with pytest.raises(ValueError, match=r"instruction: expected a text file, got .*nothing"):
    dbbench(sizes=SIZES, seed=0, data=path, instruction=str(tmp_path / "nothing"))
  with pytest.raises(ValueError, match="operations: expected operations >= 1, got 0"):
    dbbench(sizes=SIZES, seed=0, data=path, operations=0)
  with pytest.raises(ValueError, match="dbbench: expected at least one sample for each of"):
    dbbench(sizes={"train": 1, "validation": 1, "test": 1}, seed=0, data=str(write(tmp_path / "two", ENTRIES[:2])))
  assert len(dbbench(sizes=SIZES, seed=0, data=path).examples("test")) == len(ENTRIES)


def test_scores_depend_on_what_is_told_and_executed(tmp_path):
  path = str(write(tmp_path / "data.jsonl"))
  (tmp_path / "told.txt").write_text("Do it.")

  def fingerprint(**settings):
    task = dbbench(sizes=SIZES, seed=0, data=path, **settings)
    return TextProblem([task], Scripted([]), lambda jobs: [], max_new_tokens=1).fingerprint("test")

  assert fingerprint() == fingerprint()
  others = [{"operations": 4}, {"instruction": str(tmp_path / "told.txt")}]
  assert len({fingerprint(), *(fingerprint(**settings) for settings in others)}) == 3
