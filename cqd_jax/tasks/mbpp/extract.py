"""The code in an answer, however a model wraps it."""

import ast
import builtins
import dataclasses
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence

from cqd_jax.tasks.mbpp.bindings import names_bound

LONGEST = 1 << 16
"""Characters of an answer that are looked at."""

MOST_PARSED = 1 << 18
"""Characters that are parsed for one answer at most, so that none takes more than a second."""

LONGEST_START = 500
"""Characters of a line in which the beginning of a statement is looked for."""

_FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<mark>`{3,}|~{3,})[ \t]*(?P<label>[^`\n]*)$")
_SPECIAL_TOKEN = re.compile(r"(?:<\|[\w-]{1,40}\|>|</s>|<eos>|<end_of_turn>)\Z")
_START = re.compile(r"^[ \t]*(?:async\s+def|def|class|import|from|@)\b|^[ \t]*@|^[A-Za-z_]\w*(?:\s*:[^=\n]+)?\s*=[^=]")


def extract_code(answer: str, names: Sequence[str]) -> str:
  """The code of an answer that defines what is asked for.

  In the order of what counts more:

  1. What stands after the thoughts, between [BEGIN] and [DONE], where there are such marks, or before a [DONE].
  2. Fenced blocks (of any label, indented, the last one perhaps unclosed), and else the stretches of the text that are
     Python. Of several that define a name of `names` the last whole one; with it what others define that it lacks, as
     helpers and imports.
  3. What is not whole, as a last function that was cut off, is left out line by line until the rest is Python.
  4. A text that goes on after the `def` of the prompt gets it back.

  Args:
    answer: a model's text.
    names: functions and classes, one of which the code has to define.

  Returns:
    Source, or "" where there is none to be found.
  """
  text = answer[:LONGEST].lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
  text = _between_marks(_without_special_tokens(text.rpartition("</think>")[2]))
  parser = _Parser()
  found: list[_Piece] = []
  for chunks in _ways_to_divide(text, parser):
    pieces = [piece for chunk in chunks if (piece := parser.piece(chunk)) is not None]
    if (chosen := _chosen(pieces, names)) is not None:
      found.append(chosen)
      if chosen.whole:
        return chosen.source
  if found:
    return found[0].source
  return _without_names(text, names, parser)


def _ways_to_divide(text: str, parser: "_Parser") -> Iterator[Sequence[str]]:
  """Where the code may be: between fences, between fences in the middle of lines, in the text."""
  fenced, prose = _divide(text)
  yield fenced
  if "```" in text:
    yield _divide(_with_fences_alone(text))[0]
  yield [stretch for part in prose for stretch in parser.stretches(part)]


def _without_names(text: str, names: Sequence[str], parser: "_Parser") -> str:
  """The code of an answer in which nothing defines what is asked for, or which goes on after a `def`."""
  fenced, prose = _divide(text)
  name = re.escape(names[0]) if names else "(?!)"
  for part in (*fenced, *prose):
    if re.match(rf"\s*{name}\s*\(", part) and (piece := parser.piece(f"def {part.lstrip()}")) is not None:
      return piece.source
  if begun := re.search(rf"\b(?:async\s+)?def\s+{name}\s*\(", text):  # after words, or within `backticks`
    for end in ("\0", "`"):
      if (piece := parser.piece(text[begun.start() :].partition(end)[0])) is not None:
        return piece.source
  rest = parser.piece("\n".join(fenced)) if fenced else parser.whole(text)
  return rest.source if rest else ""


@dataclasses.dataclass(frozen=True)
class _Piece:
  """Some Python.

  Attributes:
    source: of it.
    tree: of it.
    whole: whether nothing had to be left out.
  """

  source: str
  tree: ast.Module
  whole: bool

  @property
  def defined(self) -> set[str]:
    """Names that it defines for others."""
    return {name for statement in self.tree.body for name in names_bound(statement)}

  @property
  def missing(self) -> set[str]:
    """Names that it uses and that are nobody's."""
    used: set[str] = set()
    bound = self.defined
    for node in ast.walk(self.tree):
      if isinstance(node, ast.Name):
        (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
      elif isinstance(node, ast.arg):
        bound.add(node.arg)
      else:
        bound.update(names_bound(node))
    return {name for name in used - bound if not hasattr(builtins, name)}


class _Parser:
  """Parses, up to so many characters in all."""

  def __init__(self) -> None:
    self._left = MOST_PARSED

  def whole(self, text: str) -> _Piece | None:
    """All of a text, if it is Python."""
    tree = self._tree(text)
    return _Piece(text, tree, True) if isinstance(tree, ast.Module) else None

  def piece(self, block: str) -> _Piece | None:
    """As much of the beginning of a block as is Python; None if that is nothing."""
    text = textwrap.dedent(block).strip("\n")
    if text[:1] in (" ", "\t") and isinstance(self._tree(text), SyntaxError):
      text = text.lstrip()  # only the first line is indented, as by a model whose first token is a space
    lines = text.split("\n")
    count = len(lines)
    while count and self._left > 0:
      source = "\n".join(lines[:count])
      tree = self._tree(source)
      if isinstance(tree, ast.Module):
        return _Piece(source, tree, count == len(lines)) if tree.body else None
      wrong = tree.lineno - 1 if isinstance(tree, SyntaxError) and tree.lineno else count - 1
      count = max(0, min(count - 1, wrong))
    return None

  def stretches(self, text: str) -> Iterator[str]:
    """The parts of a text with prose in it that are Python with a definition or an import."""
    lines = text.split("\n")
    place = 0
    while place < len(lines) and self._left > 0:
      if not _START.match(lines[place][:LONGEST_START]):
        place += 1
        continue
      piece = self.piece("\n".join(lines[place:]))
      if piece is None:
        place += 1
        continue
      yield _without_words(piece)
      place += piece.source.count("\n") + 1

  def _tree(self, source: str) -> ast.Module | Exception:
    self._left -= len(source) + 100
    if self._left < 0:
      return ValueError("parsed enough")
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a model wrote
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
      return error


def _between_marks(text: str) -> str:
  """What stands between [BEGIN] and [DONE]; a prompt may have given the first, a model may go on after the last."""
  before, begun, after = text.partition("[BEGIN]")
  return (after if begun and "[DONE]" not in before else text).partition("[DONE]")[0]


def _without_special_tokens(text: str) -> str:
  """Without the tokens that end a turn, where whoever decoded it left some."""
  text = text.rstrip()
  for _ in range(4):
    text = (text[:-50] + _SPECIAL_TOKEN.sub("", text[-50:])).rstrip()
  return text


def _divide(text: str) -> tuple[list[str], list[str]]:
  """Fenced blocks and the prose between them."""
  blocks: list[str] = []
  prose: list[str] = []
  inside: tuple[str, str] | None = None  # the indent and the mark of the fence that is open
  lines: list[str] = []

  def end(into: list[str]) -> None:
    into.append("\n".join(lines))
    lines.clear()

  for line in text.split("\n"):
    fence = _FENCE.match(line)
    if fence is None:
      lines.append(line)
    elif inside is None:
      end(prose)
      inside = fence["indent"], fence["mark"]
    elif fence["mark"].startswith(inside[1]) and len(fence["indent"]) <= len(inside[0]):
      end(blocks)
      inside = (fence["indent"], fence["mark"]) if fence["label"].strip() else None
    else:
      lines.append(line)  # as in a docstring
  end(prose if inside is None else blocks)
  return [block for block in blocks if block.strip()], prose


def _with_fences_alone(text: str) -> str:
  """Each fence on a line of its own: models also write "Here it is: ```python", and close after the last word."""
  lines = []
  for line in text.split("\n"):
    before, mark, after = line.partition("```")
    inner, closing, rest = after.partition("```")
    if closing:
      lines += [before, "```", _code_of(inner), "```", rest]
    else:
      lines += [before, f"```{after}"] if mark and before.strip() else [line]
  return "\n".join(lines)


def _code_of(inline: str) -> str:
  """A block that is written on one line, without its label."""
  return re.sub(r"^(?:python3?|py)[ \t]+", "", inline.strip())


def _chosen(pieces: Sequence[_Piece], names: Sequence[str]) -> _Piece | None:
  """The last whole piece that defines the names, or most of them, with what it lacks; None if none does."""
  asked = set(names)
  defining = [place for place, piece in enumerate(pieces) if piece.defined & asked]
  if not defining:
    return None
  best = max(defining, key=lambda place: (len(pieces[place].defined & asked), pieces[place].whole, place))
  sources = [pieces[best].source]
  have, missing = pieces[best].defined, pieces[best].missing
  for other in [piece for place, piece in enumerate(pieces) if place != best][::-1]:
    if wanted := missing & other.defined:
      sources.insert(0, _definitions(other, have))
      have, missing = have | other.defined, (missing - wanted) | (other.missing - have)
  return dataclasses.replace(pieces[best], source="\n".join(sources))


def _definitions(piece: _Piece, have: set[str]) -> str:
  """What a piece defines and others do not, without its examples of use."""
  lines = piece.source.split("\n")
  texts = []
  for statement in piece.tree.body:
    if (own := set(names_bound(statement))) and not own & have:
      first = min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", []))])
      texts += lines[first - 1 : statement.end_lineno]
  return "\n".join(texts)


def _without_words(piece: _Piece) -> str:
  """A stretch without the words that follow it and happen to be Python, as "Explanation" or "Note: fast"."""
  body = list(piece.tree.body)
  while body and _is_words(body[-1]):
    body.pop()
  return "\n".join(piece.source.split("\n")[: body[-1].end_lineno]) if body else ""


def _is_words(statement: ast.stmt) -> bool:
  if isinstance(statement, ast.AnnAssign):
    return statement.value is None
  return isinstance(statement, ast.Expr) and not any(isinstance(node, ast.Call) for node in ast.walk(statement))
