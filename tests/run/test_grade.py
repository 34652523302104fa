"""`cqd grade`: answers from a file, replayed and executed; broken lines are named and the rest is graded."""

import json
import signal
import sys
import tracemalloc
import types
from pathlib import Path

import pytest
from rich.console import Console

from cqd_jax.cli.main import main
from cqd_jax.config.plugs import Plug
from cqd_jax.run import grade as module
from cqd_jax.run.grade import grade
from cqd_jax.sandbox.sandbox import probe
from cqd_jax.tasks import Example, FromData, Message

needs_sandbox = pytest.mark.skipif(probe() is not None, reason=f"{probe()}")
QUIET = Console(quiet=True)


class Guessing:
  """Guess the number of a line: it says whether it is more or less, three times at most; nothing is executed."""

  name = "guessing"
  harness = None
  max_turns = 3

  def __init__(self, numbers):
    self._numbers = numbers

  def samples(self):
    return [Example("guess", str(number), number) for number in self._numbers]

  def examples(self, split):
    return self.samples()[:1]

  def opening(self, example):
    return (Message("user", example.prompt),)

  def job(self, example, answers):
    return None

  def reply(self, example, answers, outcome):
    if not answers[-1].strip("-").isdigit():
      return 0.5 if answers[-1] == "half" else 0.0
    wrong = int(answers[-1]) - example.expected
    return Message("user", "less" if wrong > 0 else "more") if wrong else 1.0


@pytest.fixture(autouse=True)
def own(monkeypatch, tmp_path):
  numbers = tmp_path / "numbers.txt"
  numbers.write_text("5 7 9")
  own = types.ModuleType("own_games")

  def guessing(*, sizes, seed, data: str):
    return Guessing([int(word) for word in Path(data).read_text().split()])

  def no_data(*, sizes, seed, data: str):
    return types.SimpleNamespace(name="x", harness=None, max_turns=1, examples=0, opening=0, job=0, reply=0)

  own.guessing, own.no_data = guessing, no_data
  monkeypatch.setitem(sys.modules, "own_games", own)
  monkeypatch.chdir(tmp_path)
  return numbers


def write(path, lines):
  path.write_bytes(b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines))
  return path


def graded(tmp_path, lines, task="own_games:guessing", said=None):
  """The result of grading lines."""
  answers = write(tmp_path / "answers.jsonl", lines)
  complain = (lambda text: None) if said is None else said.append
  plug = Plug.parse(task)
  grade(plug, tmp_path / "numbers.txt", answers, tmp_path / "out.json", QUIET, complain)
  return json.loads((tmp_path / "out.json").read_text())


def answer(index, *turns):
  return {"index": index, "turns": list(turns)}


def test_turns_are_replayed_to_the_end_of_each_dialogue(tmp_path):
  assert isinstance(Guessing([]), FromData)
  lines = [
    answer(0, "5"),
    answer(1, "5", "8", "7"),
    answer(2, "9", "1", "no number"),  # what comes after the end does not count
    answer(1, "5"),  # not over when its turns are
    answer(1),
    answer(1, "1", "2", "3", "7"),  # over after three
    answer(0, "half"),
    answer(2, ""),
  ]
  out = graded(tmp_path, lines)
  assert out["passed"] == [True, True, True, False, False, False, False, False]
  assert out["score"] == 3.5 / 8
  assert (out["broken"], out["num_broken"], out["unanswered"]) == ([], 0, [])


def test_several_answers_to_a_sample_and_none_to_another(tmp_path):
  out = graded(tmp_path, [answer(1, "7"), answer(1, "7"), answer(1, "6")])
  assert out["passed"] == [True, True, False]
  assert out["score"] == pytest.approx(2 / 3)
  assert out["unanswered"] == [0, 2]


BROKEN = {
  b"{": "no JSON (",
  b"\xff{}": "no JSON ('utf-8' codec",
  b"[" * 100_000: "no JSON (",
  b"[0]": "expected an object with index and turns, got list",
  b'{"turns": ["5"]}': "index: expected a whole number, got None",
  b'{"index": true, "turns": ["5"]}': "index: expected a whole number, got True",
  b'{"index": 1.0, "turns": ["5"]}': "index: expected a whole number, got 1.0",
  b'{"index": "0", "turns": ["5"]}': "index: expected a whole number, got '0'",
  b'{"index": 3, "turns": ["5"]}': "index: expected 0 to 2, got 3",
  b'{"index": -1, "turns": ["5"]}': "index: expected 0 to 2, got -1",
  b'{"index": 0}': "turns: expected a list of texts, got None",
  b'{"index": 0, "turns": "5"}': "turns: expected a list of texts, got '5'",
  b'{"index": 0, "turns": [5]}': "turns: expected a list of texts, got [5]",
  b'{"index": ' + b"9" * 5000 + b"}": "no JSON (Exceeds the limit",
}  # fmt: skip


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: line[:30].decode(errors="replace"))
def test_a_broken_line_is_named_and_the_rest_graded(tmp_path, line):
  said = []
  out = graded(tmp_path, [answer(0, "5"), b"", line, b"  ", answer(1, "7")], said=said)
  assert out["passed"] == [True, False, True]
  assert out["score"] == pytest.approx(2 / 3)
  ((number, why),) = [(each["line"], each["why"]) for each in out["broken"]]
  assert number == 3
  assert why.startswith(BROKEN[line])
  assert len(why) < 300
  assert said == [f"{tmp_path / 'answers.jsonl'}:3: {why}"]


def test_a_line_that_is_too_long_is_never_read_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(module, "LONGEST_LINE", 1000)
  out = graded(tmp_path, [answer(0, "5"), answer(0, "5" * 5000), answer(1, "7"), answer(1, "7" * 900)])
  assert out["passed"] == [True, False, True, False]
  assert out["broken"] == [{"line": 2, "why": "longer than 1000 bytes"}]


def test_many_broken_lines_do_not_flood(tmp_path, monkeypatch):
  monkeypatch.setattr(module, "MOST_KEPT", 50)
  said = []
  out = graded(tmp_path, [answer(0, "5"), *[b"{"] * 70], said=said)
  assert out["passed"] == [True] + [False] * 70
  assert [each["line"] for each in out["broken"]] == list(range(2, 52))
  assert out["num_broken"] == 70
  assert len(said) == module.MOST_SAID + 1
  assert said[-1].endswith("answers.jsonl: 70 broken lines in all")


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    ([], r"answers\.jsonl: expected answers, got none in 0 lines$"),
    ([b"", b"{", b"{"], "expected answers, got none in 2 lines; line 2: no JSON"),
  ],
)
def test_where_there_is_no_answer_nothing_is_written(tmp_path, lines, message):
  with pytest.raises(ValueError, match=message):
    graded(tmp_path, lines)
  assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
  ("task", "message"),
  [
    ("coding", "TASK: coding has no setting 'data'"),
    ("codng", "TASK: no tasks 'codng'.*did you mean 'coding'"),
    ("own_games:no_data", "TASK: own_games:no_data gives no `samples` of its data"),
    ({"use": "own_games:guessing", "size": 3}, "TASK: own_games:guessing has no setting 'size'"),
    ("jsonl", "TASK: jsonl needs the setting 'rule'"),
  ],
)
def test_what_cannot_be_graded_is_named(tmp_path, task, message):
  with pytest.raises(ValueError, match=message):
    graded(tmp_path, [answer(0, "5")], task=task)


def test_files_that_are_not_there_are_named_before_anything_is_graded(tmp_path, own):
  answers = write(tmp_path / "answers.jsonl", [answer(0, "5")])
  plug = Plug("own_games:guessing")
  for out in (tmp_path / "nowhere" / "out.json", tmp_path):
    with pytest.raises(ValueError, match="expected a file in a folder that exists"):
      grade(plug, own, answers, out, QUIET, print)
  with pytest.raises(ValueError, match=r"nothing\.jsonl: cannot be read \(No such file"):
    grade(plug, own, tmp_path / "nothing.jsonl", tmp_path / "out.json", QUIET, print)


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
  """30 MB of answers in batches of 1 MB."""
  monkeypatch.setattr(module, "BATCH_BYTES", 1 << 20)
  line = json.dumps(answer(0, "5", "x" * 100_000)).encode() + b"\n"
  path = tmp_path / "answers.jsonl"
  with path.open("wb") as file:
    for _ in range(300):
      file.write(line)
  tracemalloc.start()
  grade(Plug("own_games:guessing"), tmp_path / "numbers.txt", path, tmp_path / "out.json", QUIET, print)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 10 << 20
  assert json.loads((tmp_path / "out.json").read_text())["score"] == 1.0


def test_a_stop_leaves_what_was_there(tmp_path, monkeypatch, capsys):
  (tmp_path / "out.json").write_text("before")
  write(tmp_path / "answers.jsonl", [answer(0, "5")] * 5)
  monkeypatch.setattr(module, "BATCH_LINES", 2)
  reply = Guessing.reply

  def stopping(self, *arguments):
    signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(Guessing, "reply", reply)
    return reply(self, *arguments)

  monkeypatch.setattr(Guessing, "reply", stopping)
  given = ["--data", "numbers.txt", "--answers", "answers.jsonl", "--json", "out.json"]
  assert main(["grade", "own_games:guessing", *given]) == 130
  assert (tmp_path / "out.json").read_text() == "before"
  assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "numbers.txt", "out.json"]
  assert "stopped" in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
  write(tmp_path / "answers.jsonl", [answer(0, "5"), b"{", answer(1, "6")])
  given = ["--data", "numbers.txt", "--answers", "answers.jsonl", "--json", "out.json"]
  assert main(["grade", "{use: own_games:guessing}", *given]) == 0
  shown = capsys.readouterr()
  assert "1 of 3 answers passed, score 0.3333" in shown.out
  assert "1 broken lines count as failed; 1 of 3 samples have no answer and do not count" in shown.out
  assert "3/3" in shown.out
  assert shown.err.startswith("cqd: answers.jsonl:2: no JSON")
  assert json.loads((tmp_path / "out.json").read_text())["passed"] == [True, False, False]
  assert main(["grade", "{use: ", *given]) == 2
  assert "TASK: expected a name, or {use: NAME, ...}" in capsys.readouterr().err


def test_help_shows_the_forms(capsys):
  with pytest.raises(SystemExit) as stop:
    main(["grade", "--help"])
  assert stop.value.code == 0
  text = capsys.readouterr().out
  for part in ('{"index": 0, "turns": [', '"passed": [true, false', "Exit code", "--data", "unanswered"):
    assert part in text


@needs_sandbox
def test_mbpp_is_graded_in_the_sandbox(tmp_path):
  lines = [
    {"prompt": "Add 1.", "code": "", "test_imports": [], "test_list": ["assert f(1) == 2", "assert f(5) == 6"]},
    {"prompt": "Add 2.", "code": "", "test_imports": [], "test_list": ["assert f(1) == 3"]},
  ]
  write(tmp_path / "numbers.txt", lines)
  right = "```python\ndef f(x):\n  return x + 1\n```"
  texts = [right, "def f(x): return 2", "import os; os._exit(0)", "def f(x):\n  while True: pass", ""]
  out = graded(tmp_path, [*(answer(0, text) for text in texts), answer(1, right)], task={"use": "mbpp", "seconds": 1})
  assert out["passed"] == [True, False, False, False, False, False]
  assert out["unanswered"] == []


@needs_sandbox
@pytest.mark.soak
def test_ten_thousand_answers(tmp_path, shared_data):
  path = shared_data("mbpp/mbpp.jsonl")
  codes = [json.loads(line)["code"] for line in path.read_text().splitlines()]
  lines = [answer(n % 974, f"# {n}\n{codes[n % 974]}") for n in range(10_000)]
  answers = write(tmp_path / "answers.jsonl", lines)
  grades = grade(Plug("mbpp", {"seconds": 1}), path, answers, tmp_path / "out.json", QUIET, print)
  assert {n % 974 for n, passed in enumerate(grades.passed) if not passed} == {122}
