"""Os: a shell command in a small file tree, graded by what it prints or by the tree that it leaves.

"first 2 lines of src/note.txt having key" asks for `grep key src/note.txt | head -n 2`. The command is really run, in
two trees, so that a wrong one rarely does the right thing.
"""

import dataclasses
import functools
import random
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import TypeAlias

from cqd_jax.tasks.execution import JSON, Harness
from cqd_jax.tasks.skills.grammar import SIZES, Grammar, Skill, pick
from cqd_jax.tasks.task import Split

Tree: TypeAlias = Mapping[str, str]
"""Each file's content by its path, folder/name.extension."""

NUM_TREES = 2
NUM_FILES = 60
FOLDERS = ("src", "doc", "lib", "old", "tmp")
NAMES = ("note", "data", "main", "plan", "info")
EXTENSIONS = ("txt", "log", "csv")
WORDS = ("key", "sun", "map", "fox", "ice", "oak", "jam", "web")
"""What lines are made of; no word is part of another."""


@dataclasses.dataclass(frozen=True)
class Lines:
  """Lines of a file.

  Attributes:
    path: of the file.
    word: that the lines have (or have not), or "" for all lines.
    without: whether the lines that have the word are left out rather than the others.
    order: "" as they are, "sorted" or "reverse".
    cut: "" for all, or the "first" or "last" `number`.
    count: whether their number is asked for; then neither order nor cut.
  """

  path: str
  word: str = ""
  without: bool = False
  order: str = ""
  cut: str = ""
  number: int = 0
  count: bool = False


@dataclasses.dataclass(frozen=True)
class Files:
  """Paths, or the `count`, of the files of a folder with an extension, and with `word` in them unless that is ""."""

  folder: str
  extension: str
  word: str = ""
  count: bool = False


@dataclasses.dataclass(frozen=True)
class Change:
  """ "rm", or "cp" or "mv" to the folder `target`, of what `source` matches: a path or folder/*.extension."""

  verb: str
  source: str
  target: str = ""


Meaning: TypeAlias = Lines | Files | Change

HAVING_WORDS = {False: (" having {}", " with {}"), True: (" without {}", " not having {}")}
COUNT_WORDS = ("count the ", "how many ", "number of ")
LIST_WORDS = ("list the ", "show the ", "all the ")
CUT_WORDS = {"first": ("first {} ", "top {} "), "last": ("last {} ", "bottom {} ")}
ORDER_WORDS = {"sorted": ("sorted {}", "{} sorted"), "reverse": ("reverse sorted {}", "{} reverse sorted")}
VERB_WORDS = {"rm": ("delete ", "remove "), "cp": ("copy ",), "mv": ("move ",)}


def draw(rng: random.Random) -> Meaning:
  """A random command: on the lines of a file (3 in 5), on names of files, or a change of the tree."""
  kind = pick(rng, ("lines", "lines", "lines", "files", "change"))
  if kind == "lines":
    return _draw_lines(rng)
  folder, extension = pick(rng, FOLDERS), pick(rng, EXTENSIONS)
  if kind == "files":
    word = pick(rng, WORDS) if pick(rng, (True, True, False)) else ""
    return Files(folder, extension, word, pick(rng, (False, True)))
  verb = pick(rng, tuple(VERB_WORDS))
  source = f"{folder}/*.{extension}" if pick(rng, (False, True)) else pick(rng, _common_paths())
  others = [other for other in FOLDERS if not source.startswith(other)]
  return Change(verb, source, "" if verb == "rm" else pick(rng, others))


def _draw_lines(rng: random.Random) -> Lines:
  path = pick(rng, _common_paths())
  word = pick(rng, WORDS) if pick(rng, (True, True, False)) else ""
  without = pick(rng, (False, False, True)) if word else False
  if pick(rng, (False, False, True)):
    return Lines(path, word, without, count=True)
  order = pick(rng, ("", "sorted", "reverse"))
  cut = pick(rng, ("", "first", "last")) if word or order else pick(rng, ("first", "last"))
  return Lines(path, word, without, order, cut, pick(rng, range(1, 6)) if cut else 0)


def prompt(meaning: Meaning, rng: random.Random) -> str:
  """The meaning in English."""
  match meaning:
    case Lines():
      having = pick(rng, HAVING_WORDS[meaning.without]).format(meaning.word) if meaning.word else ""
      text = f"lines of {meaning.path}{having}"
      if meaning.count:
        return pick(rng, COUNT_WORDS) + text
      if meaning.order:
        # after a cut, "sorted" at the end could be read as sorting what was cut
        text = pick(rng, ORDER_WORDS[meaning.order][: 1 if meaning.cut else 2]).format(text)
      if meaning.cut:
        return pick(rng, CUT_WORDS[meaning.cut]).format(meaning.number) + text
      return pick(rng, LIST_WORDS) + text
    case Files():
      having = pick(rng, HAVING_WORDS[False]).format(meaning.word) if meaning.word else ""
      start = pick(rng, COUNT_WORDS if meaning.count else LIST_WORDS)
      return f"{start}{meaning.extension} files in {meaning.folder}{having}"
    case Change():
      source, verb = meaning.source, pick(rng, VERB_WORDS[meaning.verb])
      if "*" in source:
        folder, extension = source.split("/*.")
        source = f"{pick(rng, ('the', 'all'))} {extension} files in {folder}"
      return f"{verb}{source}" + (f" to {meaning.target}" if meaning.target else "")


def answer(meaning: Meaning) -> str:
  """The meaning as a command."""
  match meaning:
    case Lines():
      return _lines_answer(meaning)
    case Files():
      pattern = f"{meaning.folder}/*.{meaning.extension}"
      listing = f"grep -l {meaning.word} {pattern}" if meaning.word else f"ls {pattern}"
      return listing + (" | wc -l" if meaning.count else "")
    case Change():
      return f"{meaning.verb} {meaning.source} {meaning.target}".rstrip()


def _lines_answer(meaning: Lines) -> str:
  steps = []
  if meaning.word:
    steps.append(f"grep {'-v ' if meaning.without else ''}{meaning.word}")
  if meaning.order:
    steps.append("sort -r" if meaning.order == "reverse" else "sort")
  if meaning.cut:
    steps.append(f"{'head' if meaning.cut == 'first' else 'tail'} -n {meaning.number}")
  if meaning.count:
    # `wc` would print the path too, were it given one
    steps.append("wc -l" if steps else "wc -l <")
  return " | ".join([f"{steps[0]} {meaning.path}", *steps[1:]])


def near_misses(meaning: Meaning) -> Iterator[Meaning]:
  """A part less, its opposite, another verb, a number off by one."""
  match meaning:
    case Lines():
      if meaning.word:
        if meaning.count or meaning.order or meaning.cut:
          yield dataclasses.replace(meaning, word="", without=False)
        yield dataclasses.replace(meaning, without=not meaning.without)
      if meaning.order:
        for order in ("", "sorted", "reverse"):
          if order != meaning.order and (order or meaning.word or meaning.cut):
            yield dataclasses.replace(meaning, order=order)
      if meaning.cut:
        opposite = "last" if meaning.cut == "first" else "first"
        yield dataclasses.replace(meaning, cut=opposite)
        for number in (meaning.number - 1, meaning.number + 1):
          yield dataclasses.replace(meaning, number=number)
    case Files():
      yield dataclasses.replace(meaning, count=not meaning.count)
      if meaning.word:
        yield dataclasses.replace(meaning, word="")
    case Change():
      for verb in VERB_WORDS:
        if verb != meaning.verb:
          target = (
            ""
            if verb == "rm"
            else meaning.target or next(folder for folder in FOLDERS if not meaning.source.startswith(folder))
          )
          yield Change(verb, meaning.source, target)


def given(meaning: Meaning) -> JSON:
  """What the command prints in each tree and how it changes it; from Python only."""
  return [_evaluate(meaning, tree) for tree in trees()]


def expected(meaning: Meaning) -> JSON:
  """As `given`, except that what a change prints does not matter: None stands for it.

  None for all where a tree gives no line or counts none, which many other commands would get right.
  """
  results = given(meaning)
  if isinstance(meaning, Change):
    return [{**result, "stdout": None} for result in results]
  return None if any(result["stdout"] in ("", "0\n") for result in results) else results


def _evaluate(meaning: Meaning, tree: Tree) -> dict[str, JSON]:
  match meaning:
    case Lines():
      return {"stdout": _text(_evaluate_lines(meaning, tree)), "changes": {}}
    case Files():
      paths = _matching(f"{meaning.folder}/*.{meaning.extension}", tree)
      found = [path for path in paths if meaning.word in tree[path]]
      return {"stdout": _text([str(len(found))] if meaning.count else found), "changes": {}}
    case Change():
      changes: dict[str, str | None] = {}
      for path in _matching(meaning.source, tree):
        if meaning.verb != "cp":
          changes[path] = None
        if meaning.target:
          changes[meaning.target + "/" + path.split("/")[1]] = tree[path]
      return {"stdout": "", "changes": changes}


def _text(lines: list[str]) -> str:
  return "".join(line + "\n" for line in lines)


def _evaluate_lines(meaning: Lines, tree: Tree) -> list[str]:
  lines = tree[meaning.path].splitlines()
  if meaning.word:
    lines = [line for line in lines if (meaning.word in line) != meaning.without]
  if meaning.count:
    return [str(len(lines))]
  if meaning.order:
    lines = sorted(lines, reverse=meaning.order == "reverse")
  if meaning.cut == "first":
    lines = lines[: meaning.number]
  if meaning.cut == "last":
    lines = lines[len(lines) - min(meaning.number, len(lines)) :]
  return lines


def _matching(pattern: str, tree: Tree) -> list[str]:
  start, star, end = pattern.partition("*")
  return sorted(p for p in tree if (p.startswith(start) and p.endswith(end) if star else p == pattern))


@functools.cache
def trees() -> tuple[Tree, ...]:
  """The trees that a command is run in; they are fixed for good."""
  return tuple(_grow(random.Random(f"os {index}")) for index in range(NUM_TREES))


def _grow(rng: random.Random) -> Tree:
  paths = [f"{d}/{name}.{extension}" for d in FOLDERS for name in NAMES for extension in EXTENSIONS]
  kept = sorted(sorted(paths, key=lambda _: rng.random())[:NUM_FILES])
  return {path: _write(pick(rng, range(8, 15)), rng) for path in kept}


def _write(num_lines: int, rng: random.Random) -> str:
  lines = [" ".join(pick(rng, WORDS) for _ in range(3)) for _ in range(num_lines)]
  return _text(lines)


@functools.cache
def _common_paths() -> tuple[str, ...]:
  first, *others = trees()
  return tuple(path for path in first if all(path in other for other in others))


def shell(*, sizes: Mapping[Split, int] = SIZES, seed: int = 0) -> Skill[Meaning]:
  """The task "os"; `sizes` examples per split, drawn by `seed`.

  An answer passes if in both trees it prints the expected lines and leaves the tree as it was; or, where a change is
  asked for, if it leaves exactly the expected tree, whatever it prints. The exit status is not judged.
  """
  source = resources.files(__package__).joinpath("harness_shell.py").read_text(encoding="utf-8")
  return Skill(
    name="os",
    harness=Harness("os", source, [dict(tree) for tree in trees()]),
    grammar=Grammar(draw, prompt, answer, given, expected, near_misses),
    verdict=_same,
    sizes=sizes,
    seed=seed,
  )


def _same(expected: JSON, value: JSON) -> bool:
  if not isinstance(value, list) or len(value) != len(expected):
    return False
  return all(map(_same_in_tree, expected, value))


def _same_in_tree(expected: JSON, value: JSON) -> bool:
  if not isinstance(value, dict) or value.get("changes") != expected["changes"]:
    return False
  return expected["stdout"] is None or value.get("stdout") == expected["stdout"]
