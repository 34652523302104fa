"""MBPP from a file of the user's: both published forms, splits, prompts, and what is wrong with a file."""

import dataclasses
import json

import pytest

from cqd_jax.config.plugs import Plug, PlugError, resolve
from cqd_jax.tasks import Outcome, Task
from cqd_jax.tasks.mbpp import mbpp

EVERYTHING = {"train": 10**6, "validation": 10**6, "test": 10**6}


def line(number, **fields):
  """A line of the full file: `times_N(x)` is N times x."""
  usual = {
    "text": f"Write a function to multiply by {number}.",
    "code": f"def times_{number}(x):\r\n  return {number} * x",
    "task_id": number,
    "test_setup_code": "",
    "test_list": [f"assert times_{number}(2) == {2 * number}", f"assert times_{number}(-1) == -{number}"],
    "challenge_test_list": [f"assert times_{number}(10) == {10 * number}"],
  }
  return {**usual, **fields}


def sanitized(number):
  """The same in the other form."""
  full = line(number)
  return {
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "task_id": number,
    "prompt": full["text"],
    "code": full["code"],
    "test_imports": ["import math"],
    "test_list": [f"assert math.isclose(times_{number}(2), {2 * number})"],
  }


@pytest.fixture
def write(tmp_path):
  def write(lines, name="mbpp.jsonl"):
    path = tmp_path / name
    path.write_text("".join(f"{json.dumps(each)}\n" if isinstance(each, dict) else f"{each}\n" for each in lines))
    return str(path)

  return write


def make(data, sizes=EVERYTHING, seed=0, **settings):
  return resolve("tasks", Plug("mbpp", {"data": data, **settings}), "tasks")(sizes=sizes, seed=seed)


def numbers(task, split):
  return [example.expected["number"] for example in task.examples(split)]


def answers(task, execute, texts):
  """The verdicts on an answer to each sample of the file."""
  samples = task.samples()
  outcomes = execute([task.job(sample, text) for sample, text in zip(samples, texts, strict=True)])
  return [task.passed(sample, outcome) for sample, outcome in zip(samples, outcomes, strict=True)]


@pytest.mark.parametrize("prompt", ["chat", "few_shot"])
def test_the_full_form(write, in_process, prompt):
  task = make(write([*map(line, (2, 3, 4, 11, 511, 601))]), prompt=prompt)
  assert isinstance(task, Task)
  gold = [sample.answer for sample in task.samples()]
  execute = in_process(task.harness)
  assert answers(task, execute, gold) == [True] * 6
  assert answers(task, execute, [*gold[1:], gold[0]]) == [False] * 6


@pytest.mark.parametrize("array", [False, True])
def test_the_sanitized_form(write, in_process, array):
  lines = [sanitized(number) for number in (2, 3, 4, 11)]
  path = write([json.dumps(lines, indent=1)], "sanitized-mbpp.json") if array else write(lines)
  task = make(path, sizes={"train": 1, "validation": 1, "test": 2})
  gold = [sample.answer for sample in task.samples()]
  assert answers(task, in_process(task.harness), gold) == [True] * 4
  assert "math.isclose(times_2(2), 4)" in task.samples()[0].prompt


def test_published_splits_are_kept_and_limited_by_seed(write):
  path = write([line(number) for number in (*range(1, 16), *range(511, 515), *range(601, 607))])
  task = make(path)
  assert numbers(task, "test") == [11, 12, 13, 14, 15]
  assert numbers(task, "validation") == [511, 512, 513, 514]
  assert numbers(task, "train") == list(range(601, 607))
  sizes = {"train": 2, "validation": 3, "test": 4}
  first, again, other = (make(path, sizes, seed=seed) for seed in (1, 1, 2))
  for split, size in sizes.items():
    assert numbers(first, split) == numbers(again, split) == sorted(numbers(first, split))
    assert len(numbers(first, split)) == size
    assert set(numbers(first, split)) < set(numbers(task, split))
  assert [numbers(first, split) for split in sizes] != [numbers(other, split) for split in sizes]
  assert [sample.expected["number"] for sample in first.samples()][:3] == [1, 2, 3]


@pytest.mark.parametrize("numbers_there", [[*range(11, 31)], [*range(11, 30), 2000], [None] * 20])
def test_other_files_are_divided_by_seed(write, numbers_there):
  lines = [line(n, task_id=number) for n, number in enumerate(numbers_there)]
  if numbers_there[0] is None:
    for each in lines:
      del each["task_id"]
  sizes = {"train": 10, "validation": 4, "test": 6}
  task, again, other = (make(write(lines), sizes, seed=seed) for seed in (0, 0, 1))
  drawn = [[example.prompt for example in task.examples(split)] for split in sizes]
  assert [len(own) for own in drawn] == [10, 4, 6]
  assert len({prompt for own in drawn for prompt in own}) == 20
  assert [task.examples(split) for split in sizes] == [again.examples(split) for split in sizes]
  assert task.examples("test") != other.examples("test")


def test_prompts(write):
  path = write([line(2), line(3, text="Say \\n."), line(11), line(511), line(601)])
  (chat,) = make(path).examples("test")
  assert "Write a function to multiply by 11." in chat.prompt
  assert "\nassert times_11(2) == 22\nassert times_11(-1) == -11\n" in chat.prompt
  assert "times_11(10)" not in chat.prompt
  assert chat.answer == "```python\ndef times_11(x):\n  return 11 * x\n```"
  (shot,) = make(path, prompt="few_shot", shots=(3, 2)).examples("test")
  assert shot.prompt.index("times_3(2)") < shot.prompt.index("times_2(2)") < shot.prompt.index("times_11(2)")
  assert shot.prompt.count("[BEGIN]\n") == 3
  assert shot.prompt.count("\n[DONE]\n\n") == 2
  assert shot.prompt.endswith("\nassert times_11(-1) == -11\n[BEGIN]\n")
  assert shot.answer == "def times_11(x):\n  return 11 * x\n[DONE]"


def test_examples_of_the_prompt_are_in_no_split(write):
  task = make(write([line(n) for n in range(20)]), prompt="few_shot", shots=(7, 8))
  assert sorted(number for split in EVERYTHING for number in numbers(task, split)) == sorted({*range(20)} - {7, 8})


def test_challenge_tests_count_where_it_is_asked(write, in_process):
  path = write([line(number) for number in (2, 11, 511, 601)])
  up_to_two = "def times_2(x):\n  return 2 * x if x < 3 else 0"
  for challenge, verdict in ((False, True), (True, False)):
    task = make(path, challenge=challenge)
    sample = task.samples()[0]
    (outcome,) = in_process(task.harness)([task.job(sample, up_to_two)])
    assert task.passed(sample, outcome) is verdict
    assert "times_2(10)" not in sample.prompt


def test_setup_code_runs_after_the_answer_and_before_the_tests(write, in_process):
  setup = "tree = Node(3)\r\ntree.left = Node(4)"
  code = "class Node:\n  def __init__(self, value): self.value, self.left = value, None\ndef total(n): return {}"
  own = line(1, test_setup_code=setup, test_list=["assert total(tree) == 7"], code=code.format(7))
  task = make(write([own, line(11), line(511), line(601)]))
  sample = task.samples()[0]
  right, wrong = (code.format(text) for text in ("n.value + n.left.value", "n.value"))
  outcomes = in_process(task.harness)([task.job(sample, answer) for answer in (right, wrong)])
  assert [task.passed(sample, outcome) for outcome in outcomes] == [True, False]


def test_nothing_that_is_expected_goes_into_the_sandbox(write):
  task = make(write([line(number) for number in (12345, 11, 511, 601)]))
  job = json.dumps(task.job(task.samples()[0], "def times_12345(x): pass").payload)
  assert "times_12345(2)" in job
  assert str(2 * 12345) not in job
  assert task.samples()[0].prompt not in job


WRONG_OUTCOMES = [
  Outcome("error", None, "x"), Outcome("timeout"), Outcome("killed"), Outcome("overflow"), Outcome("ok"),
  Outcome("error", [[4], [-2]]), *(Outcome("ok", value) for value in (
    [], {}, True, 4, "4", [4, -2], [[4]], [[4], [-2], [0]], [[4], [2]], [[True], [-2]], [["other", "int"], [-2]],
    [[4, 4], [-2]],
  )),
]  # fmt: skip


@pytest.mark.parametrize("outcome", WRONG_OUTCOMES, ids=repr)
def test_only_the_values_pass(write, outcome):
  task = make(write([line(number) for number in (2, 11, 511, 601)]))
  sample = task.samples()[0]
  assert task.passed(sample, Outcome("ok", [[4], [-2]]))
  assert not task.passed(sample, outcome)


def test_seconds_are_the_harnesss(write):
  path = write([line(number) for number in (11, 511, 601)])
  quick, usual = make(path, seconds=1).harness, make(path).harness
  assert (quick.cpu_seconds, usual.cpu_seconds) == (1, 3)
  assert quick.name != usual.name


MISTAKES = [
  ([line(11), "{"], r"mbpp\.jsonl:2: no JSON"),
  ([line(11), "[1]"], r"mbpp\.jsonl:2: expected an object, got list"),
  ([line(11), "", {"task_id": 3, "text": "x"}], r":3: test_list: expected a list of texts, got none"),
  ([line(11, text=5)], r"mbpp\.jsonl:1: text: expected text, got 5"),
  ([line(11, test_list="assert f(1)")], r"mbpp\.jsonl:1: test_list: expected a list of texts, got 'assert f\(1\)'"),
  ([line(11, test_list=[])], r"mbpp\.jsonl:1: test_list: expected at least one test, got none"),
  ([line(11, test_list=["assert f(1) =="])], r"mbpp\.jsonl:1: test_list\[0\]: expected Python, got 'assert f\(1\) =='"),
  ([line(11, task_id="11")], r"mbpp\.jsonl:1: task_id: expected a number, got '11'"),
  ([], r"mbpp\.jsonl: expected samples, got an empty file"),
  ([line(11), line(511)], r"mbpp\.jsonl: expected at least one sample for each of train, validation, test, got 2"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "message"), MISTAKES)
def test_what_is_wrong_with_a_file_is_named(write, lines, message):
  with pytest.raises(ValueError, match=message):
    make(write(lines))


def test_what_is_wrong_with_settings_is_named(write, tmp_path):
  path = write([line(number) for number in (2, 11, 511, 601)])
  with pytest.raises(ValueError, match=r"nowhere\.jsonl: cannot be read \(No such file"):
    make(str(tmp_path / "nowhere.jsonl"))
  with pytest.raises(ValueError, match=r"shots: expected task_ids that are in .*mbpp\.jsonl, got 3, 4"):
    make(path, prompt="few_shot")
  with pytest.raises(ValueError, match="shots: expected at least one task_id, got none"):
    make(path, prompt="few_shot", shots=())
  with pytest.raises(ValueError, match="seconds: expected 1 to 3600, got 0"):
    make(path, seconds=0)
  with pytest.raises(PlugError, match="tasks: mbpp needs the setting 'data'"):
    resolve("tasks", Plug("mbpp"), "tasks")
  with pytest.raises(PlugError, match=r"tasks\.prompt: Input should be 'chat' or 'few_shot', got 'zero'"):
    make(path, prompt="zero")


def test_a_challenge_test_is_read_only_where_it_counts(write):
  path = write([line(number, challenge_test_list=["assert ("]) for number in (11, 511, 601)])
  make(path)
  with pytest.raises(ValueError, match=r"mbpp\.jsonl:1: challenge_test_list\[0\]: expected Python"):
    make(path, challenge=True)


def test_what_verdicts_depend_on_is_in_the_fingerprint(write, monkeypatch):
  from cqd_jax.tasks.source import source_digest

  task = mbpp(sizes=EVERYTHING, seed=0, data=write([line(number) for number in (11, 511, 601)]))
  before = source_digest(task)
  assert source_digest(task) == before
  monkeypatch.setattr(task, "harness", dataclasses.replace(task.harness, cpu_seconds=4))
  assert source_digest(task) != before
