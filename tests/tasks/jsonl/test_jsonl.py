"""A user's own questions from a file: forms, splits, duplicates, mistakes; and nothing is executed."""

import json
import sys
import types
import warnings

import jax.numpy as jnp
import pytest

from cqd_jax.config.plugs import Plug, resolve
from cqd_jax.config.settings import parse_settings
from cqd_jax.genotypes.space import dense_space
from cqd_jax.run.experiment import check_isolation
from cqd_jax.run.text_run import needs_sandbox, open_problem
from cqd_jax.sandbox import sandbox
from cqd_jax.sandbox.sandbox import SandboxUnavailable
from cqd_jax.tasks import Episode, Message, Outcome

SIZES = {"train": 100, "validation": 100, "test": 100}


@pytest.fixture
def write(tmp_path):
  def write(lines, name="sums.jsonl"):
    path = tmp_path / name
    path.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in lines))
    return str(path)

  return write


def make(data, sizes=SIZES, seed=0, **settings):
  plug = Plug("jsonl", {"data": data, "rule": "numeric", **settings})
  return resolve("tasks", plug, "tasks")(sizes=sizes, seed=seed)


def sums(count):
  return [{"prompt": f"{n} plus {n}?", "answer": 2 * n} for n in range(count)]


def test_lines_become_dialogues(write):
  messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7 times 7?"}]
  task = make(write([*sums(2), {"messages": messages, "answer": "#### 49", "note": "further fields do not matter"}]))
  assert isinstance(task, Episode)
  assert (task.name, task.max_turns, task.harness) == ("sums", 1, None)
  first, _, last = task.samples()
  assert task.opening(first) == (Message("user", "0 plus 0?"),)
  assert task.opening(last) == (Message("system", "Be brief."), Message("user", "7 times 7?"))
  assert (last.prompt, last.answer) == ("7 times 7?", "#### 49")
  assert task.job(last, ["49"]) is None
  assert [task.reply(last, [text], Outcome("ok")) for text in ("It is 49.", "50", "")] == [1.0, 0.0, 0.0]
  assert make(write(sums(3)), name="my sums").name == "my sums"


def test_splits_by_seed(write):
  path = write(sums(30))
  task, again, other = (make(path, {"train": 15, "validation": 5, "test": 10}, seed) for seed in (0, 0, 1))
  prompts = [[example.prompt for example in task.examples(split)] for split in SIZES]
  assert [len(own) for own in prompts] == [15, 5, 10]
  assert len({prompt for own in prompts for prompt in own}) == 30
  assert task.examples("test") == again.examples("test")
  assert task.examples("test") != other.examples("test")
  assert [example.prompt for example in task.samples()] == [each["prompt"] for each in sums(30)]


def test_splits_by_a_field(write):
  words = ["train", "valid", "Test ", "dev", "training", "val", "validation", "test"]
  lines = [{**each, "part": word} for each, word in zip(sums(8), words, strict=True)]
  task = make(write(lines), split_by="part")
  places = {split: [int(example.prompt.split()[0]) for example in task.examples(split)] for split in SIZES}
  assert places == {"train": [0, 4], "validation": [1, 3, 5, 6], "test": [2, 7]}
  assert len(make(write(lines), {"train": 1, "validation": 2, "test": 0}, split_by="part").examples("validation")) == 2
  with pytest.raises(ValueError, match=r"sums\.jsonl:9: part: expected one of train, .*, got 'rest'"):
    make(write([*lines, {"prompt": "x", "answer": 1, "part": "rest"}]), split_by="part")
  with pytest.raises(ValueError, match=r"sums\.jsonl:1: part: expected text, got none \(there are prompt, answer\)"):
    make(write(sums(3)), split_by="part")


def test_duplicates_between_splits_are_reported_with_number_and_lines(write):
  parts = ["train", "train", "test", "validation", "test"]
  prompts = ["a b", "c", "A  b", "c", "d"]
  lines = [{"prompt": p, "answer": 1, "part": part} for p, part in zip(prompts, parts, strict=True)]
  path = write(lines)
  with pytest.warns(UserWarning, match="2 prompts are in several splits") as caught:
    make(path, split_by="part")
  (warning,) = caught
  assert str(warning.message) == (
    f"{path}: 2 prompts are in several splits: "
    f"{path}:1 (train) and {path}:3 (test); {path}:2 (train) and {path}:4 (validation)"
  )
  many = [{"prompt": str(n % 9), "answer": 1, "part": part} for n, part in enumerate(["train"] * 9 + ["test"] * 9)]
  with pytest.warns(UserWarning, match=r"9 prompts are in .*:5 \(train\) and .*:14 \(test\); and 4 more$"):
    make(write(many), {"train": 9, "validation": 0, "test": 9}, split_by="part")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    make(write([*lines[:2], lines[4]]))  # a seed may draw none


@pytest.mark.parametrize(
  ("rule", "answer", "gold"),
  [("exact", "x", "x"), ("numeric", 4, "4"), ("contains", "x", "x"), ("regex", "x+", ""), ("own_rules:same", [1], "")],
)
def test_what_is_known_to_be_right_can_be_learned(write, monkeypatch, rule, answer, gold):
  own = types.ModuleType("own_rules")
  own.same = lambda text, expected: text == json.dumps(expected)
  monkeypatch.setitem(sys.modules, "own_rules", own)
  task = make(write([{"prompt": str(n), "answer": answer} for n in range(3)]), rule=rule)
  example = task.samples()[0]
  assert example.answer == gold
  right = gold or {"regex": "axxb"}.get(rule, "[1]")
  assert task.reply(example, [right], Outcome("ok")) == 1.0


MISTAKES = [
  (["{"], r"sums\.jsonl:4: no JSON"),
  (["3"], r"sums\.jsonl:4: expected an object, got int"),
  ([{"prompt": "x"}], r"sums\.jsonl:4: answer: expected one, got none \(there are prompt\)"),
  ([{"answer": 1}], r"sums\.jsonl:4: expected either prompt or messages \(there are answer\)"),
  ([{"prompt": "x", "messages": [], "answer": 1}], r"sums\.jsonl:4: expected either prompt or messages"),
  ([{"prompt": 5, "answer": 1}], r"sums\.jsonl:4: prompt: expected text, got 5"),
  ([{"prompt": "x", "answer": "many"}], r"sums\.jsonl:4: answer: expected a number for the rule numeric, got 'many'"),
  ([{"messages": [], "answer": 1}], r"sums\.jsonl:4: messages: expected a list of role"),
  ([{"messages": [{"role": "bot", "content": "x"}], "answer": 1}], r"sums\.jsonl:4: messages: expected a list of role"),
  ([{"messages": [{"role": "assistant", "content": "x"}], "answer": 1}], r":4: messages: expected the last one"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "message"), MISTAKES)
def test_what_is_wrong_with_a_line_is_named(write, lines, message):
  with pytest.raises(ValueError, match=message):
    make(write([*sums(2), "", *lines]))


def test_what_is_wrong_with_a_file_is_named(write, tmp_path):
  with pytest.raises(ValueError, match=r"sums\.jsonl: expected at least one sample for each of .*, got 2"):
    make(write(sums(2)))
  with pytest.raises(ValueError, match=r"sums\.jsonl: expected samples, got an empty file"):
    make(write([""]))
  (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9", "answer": 1}')
  with pytest.raises(ValueError, match=r"latin\.jsonl: cannot be read \(.*utf-8"):
    make(str(tmp_path / "latin.jsonl"))


class Calculator:
  """Says the sum, as often as the individual's number says; else nothing."""

  fingerprint = "calculator"

  def generate(self, individuals, requests):
    able = individuals.genotypes[:, 0].astype(int).tolist()
    return [
      [
        f"It is {2 * int(request.messages[-1].content.split()[0])}." if n < count else "?"
        for n, request in enumerate(own)
      ]
      for count, own in zip(able, requests, strict=True)
    ]


@pytest.fixture
def nothing_isolates(monkeypatch):
  monkeypatch.setattr(sandbox, "_find_mode", lambda: ("none", "Nothing isolates here: bubblewrap is not installed"))


@pytest.mark.usefixtures("nothing_isolates")
def test_a_problem_of_nothing_else_needs_no_sandbox(write, monkeypatch):
  own = types.ModuleType("own_engine")
  own.calculator = lambda interface: Calculator()
  monkeypatch.setitem(sys.modules, "own_engine", own)
  paths = [write(sums(12), f"{name}.jsonl") for name in ("one", "two")]
  tasks = [{"use": "jsonl", "data": path, "rule": "numeric"} for path in paths]
  content = {
    "tasks": {"names": tasks, "train": 4, "validation": 4, "test": 4},
    "training": {"expert_learning_rates": [1e-3, 1e-3]},
    "engine": "own_engine:calculator",
  }
  with open_problem(parse_settings(content, "here")) as (problem, _):
    assert problem.task_names == ("one", "two")
    check_isolation(parse_settings(content, "here"), problem)
    space = dense_space(jnp.zeros(1), jnp.asarray([[0.0], [3.0], [8.0]]))
    scored = problem.score("test", space.experts, space).with_scores()
    assert scored.scores.tolist() == [[0, 0], [0.75, 0], [1, 1]]
    assert problem.fingerprint("test") != problem.fingerprint("validation")
  content["tasks"]["names"] = [tasks[0], "coding"]
  with open_problem(parse_settings(content, "here")) as (problem, _):
    assert needs_sandbox(problem.episodes)
    with pytest.raises(SandboxUnavailable, match="bubblewrap is not installed"):
      check_isolation(parse_settings(content, "here"), problem)
