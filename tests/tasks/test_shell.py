import itertools
import os
import random

import pytest

from cqd_jax.tasks.execution import Job, Outcome
from cqd_jax.tasks.skills import shell as make_shell
from cqd_jax.tasks.skills.shell import (
  FOLDERS,
  NUM_FILES,
  NUM_TREES,
  WORDS,
  Change,
  Files,
  Lines,
  answer,
  draw,
  expected,
  given,
  prompt,
  trees,
)
from cqd_jax.tasks.task import Example, grade


@pytest.fixture(scope="module")
def task():
  return make_shell(sizes={"train": 0, "validation": 0, "test": 0})


@pytest.fixture(scope="module")
def execute(task, in_process):
  return in_process(task.harness)


@pytest.fixture(scope="module")
def run(execute):
  def run_one(command):
    [outcome] = execute([Job("os", command)])
    assert outcome.status == "ok", outcome
    return outcome.value

  return run_one


@pytest.fixture(scope="module")
def path():
  """A file of both trees."""
  return min(set(trees()[0]) & set(trees()[1]))


def passes(task, execute, meaning, command):
  return bool(grade(task, [Example("", answer(meaning), expected(meaning))], [command], execute)[0])


def test_trees_hold_60_small_files_and_differ():
  first, second = trees()
  assert len(trees()) == NUM_TREES
  for tree in trees():
    assert len(tree) == NUM_FILES == 60
    assert {path.split("/")[0] for path in tree} == set(FOLDERS)
    assert all(8 <= text.count("\n") <= 14 and text.endswith("\n") for text in tree.values())
  common = set(first) & set(second)
  assert 30 < len(common) < 60
  assert all(first[path] != second[path] for path in common)


def test_no_word_is_part_of_another_or_of_two_neighbors():
  assert not any(a in b for a, b in itertools.permutations(WORDS, 2))


def test_the_documented_example(run):
  meaning = Lines("src/note.txt", "key", cut="first", number=2)
  assert answer(meaning) == "grep key src/note.txt | head -n 2"
  path = "doc/data.txt"
  for tree, result in zip(trees(), given(Lines(path, "key", cut="first", number=2)), strict=True):
    having = [line for line in tree[path].split("\n") if "key" in line.split(" ")]
    assert result == {"stdout": "".join(f"{line}\n" for line in having[:2]), "changes": {}}


def test_different_meanings_have_different_answers():
  rng = random.Random(0)
  meanings = {draw(rng) for _ in range(5000)}
  assert len({answer(meaning) for meaning in meanings}) == len(meanings)


def test_a_cut_of_sorted_lines_has_one_reading():
  """ "first 2 lines of F sorted" might be cut before it is sorted, so it is never said."""
  rng = random.Random(0)
  said = {prompt(Lines("src/note.txt", order="sorted", cut="first", number=2), rng) for _ in range(50)}
  assert said == {"first 2 sorted lines of src/note.txt", "top 2 sorted lines of src/note.txt"}


@pytest.mark.parametrize(
  ("command", "right"),
  [
    ("sort {path}", True),
    ("cat {path} | sort", True),
    ("cd $(dirname {path}) && sort $(basename {path})", True),
    ("sort {path}; exit 3", True),  # the exit status is not judged
    ("sort {path}; echo oops >&2", True),
    ("sort {path} >/dev/null", False),
    ("sort {path}; echo", False),
    ('printf %s "$(sort {path})"', False),
    ("sort -o {path} {path}; cat {path}", False),
    ("sort {path}; touch {path}.bak", False),
    ("sort {path}; rm -r *", False),
    ("sort {path}; mkdir new", False),
    ("sort {path}; mkfifo {path}.pipe", False),
    ("sort {path}; ln -s /etc new", False),
    ("sort {path}; f=$(cat {path}); rm {path}; ln -s /etc/passwd {path}", False),
    ("sort {path}; echo >> {path}", False),
    ("sort /etc/hostname", False),
    ("sort nothing", False),
    ("sort '", False),
    ("", False),
    ("sort {path}\0", False),
  ],
)
def test_output_counts_and_the_tree_must_stay(task, execute, path, command, right):
  assert passes(task, execute, Lines(path, order="sorted"), command.replace("{path}", path)) is right


@pytest.mark.parametrize(
  ("command", "right"),
  [
    ("mv {path} {target}", True),
    ("mv -v {path} {target}/", True),  # what a change prints is not judged
    ("cp {path} {target} && rm {path}", True),
    ("cp {path} {target}", False),
    ("rm {path}", False),
    ("mv {path} {target}/other", False),
    ("mv {path} {target}; touch extra", False),
    ("true", False),
  ],
)
def test_the_tree_that_is_left_counts(task, execute, path, command, right):
  target = next(folder for folder in FOLDERS if not path.startswith(folder))
  command = command.replace("{path}", path).replace("{target}", target)
  assert passes(task, execute, Change("mv", path, target), command) is right


def test_changes_are_told_in_full(run, path):
  changed = run(f"rm {path}; mkdir -p a/b; printf 'x\\377' > a/b/c; ln -s a d; mkfifo e; chmod 700 a")
  for result in changed:
    assert result == {
      "stdout": "",
      "status": 0,
      "changes": {path: None, "a/": "", "a/b/": "", "a/b/c": "x\xff", "d?": "", "e?": ""},
    }


def test_a_folder_that_is_gone_is_told_with_its_files(run):
  for tree, result in zip(trees(), run("cd src && rm -r ../src"), strict=True):
    assert result["changes"] == {"src/": None} | {path: None for path in tree if path.startswith("src/")}


def test_what_is_printed_and_left_is_bounded(run, execute):
  for result in run("yes"):
    assert len(result["stdout"]) == 4001
    assert result["changes"] == {}
  for result in run("yes | head -c 100000 > big"):
    assert list(result["changes"]) == ["big"]
    assert len(result["changes"]["big"]) == 4000
  [outcome] = execute([Job("os", "mkdir many; cd many; seq 1000 | xargs touch")])
  assert (outcome.status, outcome.detail) == ("error", "the command left more than 300 files and folders")


def test_a_command_that_finds_nothing_is_not_tried_on_every_tree(run):
  assert [result["status"] for result in run("exit 7")] == [7]
  assert len(run("nonsense")) == 1
  assert len(run("nonsense | wc -l")) == 1  # no question has the answer 0
  assert len(run("echo 0; touch new")) == NUM_TREES
  assert len(run("echo")) == NUM_TREES


def test_the_surroundings_are_the_same_for_all(run):
  for result in run("cat; echo $LC_ALL; printf 'b\\nA\\na\\n' | sort | tr '\\n' ' '; ls"):
    assert result["stdout"] == "C\nA a b " + "".join(sorted(f"{folder}\n" for folder in FOLDERS))
  here = os.getcwd()
  run("cd /")
  assert os.getcwd() == here


def test_a_question_without_an_answer_is_not_asked():
  assert expected(Files("src", "md")) is None
  assert expected(Files("src", "md", count=True)) is None
  assert expected(Files("src", "txt", count=True)) is not None


@pytest.mark.parametrize(
  "result",
  [
    {"stdout": None, "changes": {}},
    {"stdout": ["4\n"], "changes": {}},
    {"stdout": 4, "changes": {}},
    {"stdout": "4", "changes": {}},
    {"stdout": "4\n"},
    {"stdout": "4\n", "changes": []},
    {"stdout": "4\n", "changes": None},
    {"stdout": "4\n", "changes": {"x": None}},
  ],
)
def test_only_the_text_itself_is_the_text(task, result):
  example = Example("", "", [{"stdout": "4\n", "changes": {}}] * NUM_TREES)
  right = {"stdout": "4\n", "changes": {}}
  assert task.passed(example, Outcome("ok", [right] * NUM_TREES))
  assert task.passed(example, Outcome("ok", [right, result])) is False
  assert task.passed(example, Outcome("ok", [right])) is False
