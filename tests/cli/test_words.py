"""What goes wrong is one line: in the package in its words, in a user's own file with file and line."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cqd_jax
from cqd_jax.cli.main import in_words, main

HINT = "(CQD_TRACEBACK=1 shows the whole traceback)"
PACKAGE = Path(cqd_jax.__file__).parent / "tasks" / "imaginary.py"
INSTALLED = Path(np.__file__).parent / "imaginary.py"
ELSEWHERE = Path("/some/venv/lib/python3.12/site-packages/library/imaginary.py")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv("CQD_TRACEBACK", raising=False)


def function(source, file, **names):
  """The function `act` of a source, as if it stood in that file."""
  exec(compile(source, str(file), "exec"), names)
  return names["act"]


def said(action, capsys):
  code = in_words(action)
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err.startswith("cqd: ")
  assert captured.err.count("\n") == 1
  return code, captured.err.removeprefix("cqd: ").rstrip("\n")


RAISES = "def act():\n  raise {}"
CALLS = "def act():\n  return inner()"
MISTAKES = {
  "ValueError('bad')": "ValueError: bad",
  "TypeError('of two\\n  lines')": "TypeError: of two lines",
  "KeyError('lost')": "KeyError: 'lost'",
  "ZeroDivisionError": "ZeroDivisionError",
  "OSError(2, 'No such file')": "FileNotFoundError: [Errno 2] No such file",
  "RuntimeError('x')": "RuntimeError: x",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_users_file_is_named_with_file_and_line(tmp_path, capsys, mistake):
  act = function(RAISES.format(mistake), tmp_path / "mine" / "task.py")
  assert said(act, capsys) == (1, f"mine/task.py:2 in act: {MISTAKES[mistake]} {HINT}")


def test_a_file_elsewhere_is_named_by_its_whole_path(capsys):
  act = function("\n\ndef act(): 1 / 0", "/elsewhere/task.py")
  assert said(act, capsys) == (1, f"/elsewhere/task.py:3 in act: ZeroDivisionError: division by zero {HINT}")


@pytest.mark.parametrize(
  ("call", "text"),
  [
    ("json.loads('{')", "JSONDecodeError: Expecting property name"),
    ("np.zeros((2, 3)) @ np.zeros((2, 3))", "ValueError: matmul: "),
    ("np.concatenate([np.zeros(2), np.zeros((2, 2))])", "ValueError: all the input array"),
    ("subprocess.run(['/none'])", "FileNotFoundError: "),
    ("inner()", "ValueError: no\n"),
    ("elsewhere()", "ValueError: no\n"),
    ("[inner() for _ in range(1)]", "ValueError: no\n"),
  ],
)
def test_what_a_library_raises_is_the_callers(tmp_path, capsys, call, text):
  inner = function("def act():\n  raise ValueError('no')", INSTALLED)
  elsewhere = function("def act():\n  raise ValueError('no')", ELSEWHERE)
  names = {"json": json, "np": np, "subprocess": subprocess, "inner": inner, "elsewhere": elsewhere}
  act = function(f"def act():\n  {call}", tmp_path / "task.py", **names)
  code, line = said(act, capsys)
  assert code == 1
  assert line.startswith("task.py:2 in ")
  assert text in line.replace(f" {HINT}", "\n")


@pytest.mark.parametrize("between", [PACKAGE, INSTALLED, "<string>", "<frozen importlib._bootstrap>"])
def test_a_users_file_that_is_called_by_whatever_is_named(tmp_path, capsys, between):
  inner = function(RAISES.format("KeyError(1)"), tmp_path / "task.py")
  assert said(function(CALLS, between, inner=inner), capsys) == (1, f"task.py:2 in act: KeyError: 1 {HINT}")


@pytest.mark.parametrize("outer", ["script.py", PACKAGE, INSTALLED])
@pytest.mark.parametrize("mistake", ["ValueError('x: expected 1, got 2')", "OSError('x: expected 1, got 2')"])
def test_what_the_package_raises_stays_as_it_says(capsys, outer, mistake):
  inner = function(RAISES.format(mistake), PACKAGE)
  assert said(function(CALLS, outer, inner=inner), capsys) == (2, "x: expected 1, got 2")


def test_what_a_library_raises_for_the_package_stays_too(capsys):
  inner = function(RAISES.format("ValueError('no')"), INSTALLED)
  assert said(function(CALLS, PACKAGE, inner=inner), capsys) == (2, "no")
  inner = function(RAISES.format("sqlite3.OperationalError('disk full')"), INSTALLED, sqlite3=sqlite3)
  assert said(function(CALLS, PACKAGE, inner=inner), capsys) == (2, "disk full")


def test_what_nobody_foresaw_in_the_package_is_said_so(capsys, monkeypatch):
  act = function(RAISES.format("KeyError('lost')"), PACKAGE)
  assert said(act, capsys) == (1, f"unexpected KeyError: 'lost' {HINT}")
  monkeypatch.setenv("CQD_TRACEBACK", "1")
  with pytest.raises(KeyError):
    in_words(act)


WRAPS = """
def act():
  try:
    inner()
  except Exception as error:
    raise {}("tasks.names: 'mine' failed") {}
"""


@pytest.mark.parametrize(("kind", "code", "start"), [("ValueError", 2, ""), ("KeyError", 1, "unexpected KeyError: ")])
@pytest.mark.parametrize("chained", ["from error", ""])
def test_the_cause_in_a_users_file_is_named_too(tmp_path, capsys, kind, code, start, chained):
  inner = function(RAISES.format("TypeError('bad')"), tmp_path / "task.py")
  again = function(WRAPS.format("RuntimeError", "from error"), INSTALLED, inner=inner)
  for cause in (inner, again):
    got, line = said(function(WRAPS.format(kind, chained), PACKAGE, inner=cause), capsys)
    assert got == code
    assert line.startswith(start)
    assert line.replace('"', "").endswith(f"'mine' failed; it began at task.py:2 in act: TypeError: bad {HINT}")


def test_a_cause_that_is_hidden_or_the_packages_own_is_not_named(tmp_path, capsys):
  inner = function(RAISES.format("TypeError('bad')"), tmp_path / "task.py")
  assert said(function(WRAPS.format("ValueError", "from None"), PACKAGE, inner=inner), capsys) == (
    2,
    "tasks.names: 'mine' failed",
  )
  inner = function(RAISES.format("TypeError('bad')"), PACKAGE)
  assert said(function(WRAPS.format("ValueError", "from error"), PACKAGE, inner=inner), capsys) == (
    2,
    "tasks.names: 'mine' failed",
  )


def test_an_error_that_is_its_own_cause_ends(tmp_path, capsys):
  act = function(
    "def act():\n  one, two = ValueError('a'), ValueError('b')\n  one.__cause__, two.__cause__ = two, one\n  raise one",
    PACKAGE,
  )
  assert said(act, capsys) == (2, "a")


TASKS = {
  "def make(sizes, seed):\n  return 1 / 0\n": "of_mine.py:2 in make: ZeroDivisionError: division by zero",
  "import nothing_of_the_kind\n": "of_mine.py:1 in <module>: ModuleNotFoundError: No module named",
  "x = [\nmake = None y\n": "of_mine.py:",
  "raise ValueError('not today')\n": "of_mine.py:1 in <module>: ValueError: not today",
}


@pytest.mark.parametrize("source", TASKS)
def test_a_users_task_that_fails_is_named_by_the_command(tmp_path, capsys, monkeypatch, source):
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "of_mine", raising=False)
  (tmp_path / "of_mine.py").write_text(source)
  (tmp_path / "config.yaml").write_text("tasks:\n  names: [of_mine:make]\n")
  code = main(["evolve", "config.yaml"])
  line = capsys.readouterr().err
  assert code in (1, 2)
  assert line.count("\n") == 1
  assert TASKS[source] in line
  assert HINT in line
