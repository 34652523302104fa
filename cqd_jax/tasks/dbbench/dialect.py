"""MySQL's SQL in SQLite's words. Part of the harness that is sent to the sandbox as text: only the standard library.

Statements are read as tokens in nested parentheses, which is enough for what the two dialects write differently:
texts in double quotes and their backslashes, `/` that never is a division of whole numbers, `||`, comparisons of texts
with numbers, names of functions and types, LIMIT of an UPDATE, what an assignment stores.
"""

import re
from typing import Any, NamedTuple


class Refused(Exception):
  """A statement that MySQL would refuse; the text is its error."""


class Token(NamedTuple):
  """A piece of SQL: a "word", a quoted "name", a "text", a "number" or a "symbol"; `value` is without its quotes."""

  kind: str
  value: str


class Group(NamedTuple):
  """What stands in a pair of parentheses."""

  items: list[Any]


TOKENS = re.compile(
  r"""(?P<space>\s+|--(?:\s[^\n]*|$)|\#[^\n]*|/\*.*?\*/)
  |(?P<text>'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.|"")*")
  |(?P<name>`(?:[^`]|``)*`)
  |(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w$]))
  |(?P<word>[\w$@]+)
  |(?P<symbol><=>|<=|>=|<>|!=|\|\||&&|:=|<<|>>|.)""",
  re.VERBOSE | re.DOTALL,
)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "0": "\0", "Z": "\x1a", "%": "\\%", "_": "\\_"}
COMPARISONS = frozenset(("=", "<", ">", "<=", ">=", "<>", "!=", "<=>"))
SYMBOLS = {"/": "* 1.0 /", "||": "OR", "&&": "AND", "<=>": "IS", "!": "NOT"}
WORDS = {"DIV": "/", "MOD": "%", "RLIKE": "REGEXP", "BINARY": "", "DUAL": "(SELECT 1)"}
FUNCTIONS = {
  "IF": "iif", "LEFT": "mysql_left", "RIGHT": "mysql_right", "INSERT": "mysql_insert", "ISNULL": "mysql_isnull",
  "LENGTH": "mysql_length", "OCTET_LENGTH": "mysql_length", "CHAR_LENGTH": "length", "CHARACTER_LENGTH": "length",
  "SUBSTRING": "mysql_substr", "SUBSTR": "mysql_substr", "MID": "mysql_substr", "DATABASE": "mysql_database",
  "SCHEMA": "mysql_database", "CURRENT_DATE": "curdate", "CURRENT_TIMESTAMP": "now",
}  # fmt: skip
KEYWORDS = frozenset(
  re.findall(
    r"\w+",
    """SELECT FROM WHERE AND OR NOT IN IS LIKE REGEXP RLIKE BETWEEN ON USING BY HAVING WHEN THEN ELSE CASE SET VALUES AS
    LIMIT OFFSET UNION ALL DISTINCT JOIN INNER LEFT RIGHT CROSS OUTER GROUP ORDER INTO UPDATE DELETE INSERT DIV MOD XOR
    ASC DESC END EXISTS BINARY""",
  )
)
BEFORE_TABLES = frozenset(("FROM", "JOIN", "INTO", "UPDATE", "TABLE"))


def translate(sql: str, table: str) -> str:
  """A statement for SQLite.

  Args:
    sql: one statement of MySQL.
    table: name of the table that there is; MySQL tells cases of such names apart.

  Raises:
    Refused: if MySQL would not understand it.
  """
  items = parse(sql)
  while items and items[-1] == Token("symbol", ";"):
    items.pop()
  if not items:
    raise Refused("1065: Query was empty")
  if Token("symbol", ";") in items:
    raise _not_understood(items[items.index(Token("symbol", ";")) + 1])
  _check_tables(items, table)
  first = _word(items[0])
  if first == "UPDATE":
    return _update(items)
  if first in ("INSERT", "REPLACE"):
    return _insert(items)
  if first == "DELETE":
    return _delete(items)
  if first == "TRUNCATE":
    return "DELETE FROM " + expression([item for item in items[1:] if _word(item) != "TABLE"])
  return expression(items)


def parse(sql: str) -> list[Any]:
  """Tokens, and groups of them. Raises `Refused` where a quote or a parenthesis is left open."""
  stack: list[list[Any]] = [[]]
  for found in TOKENS.finditer(sql):
    kind, text = str(found.lastgroup), found[0]
    if text == "(" and kind == "symbol":
      stack.append([])
    elif text == ")" and kind == "symbol" and len(stack) > 1:
      group = Group(stack.pop())
      stack[-1].append(group)
    elif (kind == "symbol" and text in "'\"`)") or len(stack) > 100:
      raise _not_understood(Token(kind, sql[found.start() :]))
    elif kind != "space":
      stack[-1].append(Token(kind, _unquoted(kind, text)))
  if len(stack) > 1:
    raise _not_understood(Token("symbol", ""))
  return stack[0]


def expression(items: list[Any]) -> str:
  """Tokens as SQLite wants them."""
  out: list[str] = []
  operand = 0  # where in `out` the latest operand begins
  for place, item in enumerate(items):
    before = items[place - 1] if place else None
    if before is not None and _is_call(before, item):
      out[-1] = _call(before.value, item)
      operand = len(out) - 1
      continue
    if isinstance(item, Token) and _compares_with_number(items, place) and out and operand < len(out):
      end = len(out) - (_word(before) == "NOT")
      out[operand:end] = ["mysql_number(" + " ".join(out[operand:end]) + ")"] if operand < end else []
    if _is_operand(item) and (not out or out[-1] != "."):
      operand = len(out)
    elif not _is_operand(item) and item != Token("symbol", ".") and _word(item) not in ("NOT", "BETWEEN"):
      operand = len(out) + 1
    out.append(_one(item))
  return " ".join(part for part in out if part)


def stored(items: list[Any]) -> str:
  """A value that is assigned: as the text that MySQL makes of it."""
  sign = "-" if items and items[0] == Token("symbol", "-") else ""
  literal = items[1:] if sign else items
  if len(literal) == 1 and isinstance(literal[0], Token):
    if literal[0].kind == "number" and "e" not in literal[0].value.lower():
      return _quoted(sign + _plain_number(literal[0].value))
    if literal[0].kind == "text" and not sign:
      return _quoted(literal[0].value)
    if _word(literal[0]) in ("NULL", "DEFAULT"):
      return "NULL"
  return f"mysql_text({expression(items)})"


def split(items: list[Any], separator: str = ",") -> list[list[Any]]:
  """What stands between commas."""
  parts: list[list[Any]] = [[]]
  for item in items:
    if item == Token("symbol", separator):
      parts.append([])
    else:
      parts[-1].append(item)
  return parts


def _update(items: list[Any]) -> str:
  after = next((place for place, item in enumerate(items) if _word(item) in ("WHERE", "ORDER", "LIMIT")), len(items))
  if "SET" not in map(_word, items[:after]):
    raise _not_understood(items[-1])
  start = [_word(item) for item in items].index("SET")
  assigned: dict[str, Group] = {}
  assignments = []
  for part in split(items[start + 1 : after]):
    target = part[: part.index(Token("symbol", "="))] if Token("symbol", "=") in part else []
    if not target or not isinstance(target[-1], Token) or target[-1].kind not in ("word", "name"):
      raise _not_understood(part[0] if part else items[-1])
    # MySQL assigns from left to right: what was assigned before is used further on
    value = _replaced(part[len(target) + 1 :], assigned)
    assignments.append(f"{_one(target[-1])} = {stored(value)}")
    assigned[target[-1].value.lower()] = Group(value)
  table = [item for item in items[1:start] if _word(item) not in ("IGNORE", "LOW_PRIORITY")]
  head = f"UPDATE {expression(table)} SET {', '.join(assignments)}"
  return head + _tail(table, items[after:])


def _delete(items: list[Any]) -> str:
  if "FROM" not in map(_word, items):
    raise _not_understood(items[-1])
  rest = items[[_word(item) for item in items].index("FROM") + 1 :]
  place = next((p for p, item in enumerate(rest) if _word(item) in ("WHERE", "ORDER", "LIMIT")), len(rest))
  return f"DELETE FROM {expression(rest[:place])}{_tail(rest[:place], rest[place:])}"


def _tail(table: list[Any], tail: list[Any]) -> str:
  """The conditions of a modification; SQLite knows no LIMIT of one."""
  if not any(_word(item) in ("LIMIT", "ORDER") for item in tail):
    return " " + expression(tail)
  return f" WHERE rowid IN (SELECT rowid FROM {expression(table)} {expression(tail)})"


def _insert(items: list[Any]) -> str:
  words = [_word(item) for item in items]
  head = words[0] + (" OR IGNORE" if "IGNORE" in words[:4] else "") + " INTO"
  start = next(p for p in range(1, len(items) + 1) if p == len(items) or words[p] not in INSERT_WORDS)
  values = next((p for p, word in enumerate(words) if word in ("VALUES", "VALUE", "SET", "SELECT")), len(items))
  if values == len(items) or words[values] == "SELECT":
    return f"{head} {expression(items[start:])}"
  target = items[start:values]
  if words[values] == "SET":
    pairs = [split(part, "=") for part in split(items[values + 1 :])]
    if any(len(pair) != 2 for pair in pairs):
      raise _not_understood(items[-1])
    columns = ", ".join(expression(pair[0]) for pair in pairs)
    return f"{head} {expression(target)} ({columns}) VALUES ({', '.join(stored(pair[1]) for pair in pairs)})"
  if any(isinstance(item, Group) and any(_is_text(each) for each in item.items) for item in target):
    raise _not_understood(next(each for item in target if isinstance(item, Group) for each in item.items))
  rows = []
  for part in split(items[values + 1 :]):
    if len(part) != 1 or not isinstance(part[0], Group):
      return f"{head} {expression(items[start:])}"
    rows.append("(" + ", ".join(stored(each) for each in split(part[0].items)) + ")")
  return f"{head} {expression(target)} VALUES {', '.join(rows)}"


INSERT_WORDS = ("INTO", "IGNORE", "LOW_PRIORITY", "DELAYED", "HIGH_PRIORITY")


def _call(name: str, group: Group) -> str:
  """A function with its arguments."""
  upper, items = name.upper(), group.items
  words = [_word(item) for item in items]
  if upper in ("CAST", "CONVERT"):
    return _cast(items, words)
  if upper in ("TRIM", "SUBSTRING", "SUBSTR", "MID", "EXTRACT") and "FROM" in words:
    return _with_from(upper, items, words)
  if upper == "POSITION" and "IN" in words:
    place = words.index("IN")
    return f"locate({expression(items[:place])}, {expression(items[place + 1 :])})"
  if upper == "GROUP_CONCAT":
    return _group_concat(items, words)
  return f"{FUNCTIONS.get(upper, _one(Token('word', name)))}({expression(items)})"


def _cast(items: list[Any], words: list[str]) -> str:
  place = next((p for p in range(len(items) - 1, -1, -1) if words[p] in ("AS", "USING") or items[p] == COMMA), None)
  if place is None:
    raise _not_understood(Token("symbol", ")"))
  value, kind = expression(items[:place]), words[place + 1] if place + 1 < len(words) else ""
  if kind in ("SIGNED", "UNSIGNED", "INTEGER", "INT"):
    return f"CAST({value} AS INTEGER)"
  if kind in ("DECIMAL", "DEC", "NUMERIC"):
    sizes = split(items[place + 2].items) if len(items) > place + 2 and isinstance(items[place + 2], Group) else []
    return f"ROUND(CAST({value} AS REAL), {expression(sizes[1]) if len(sizes) > 1 else 0})"
  if kind in ("DOUBLE", "FLOAT", "REAL"):
    return f"CAST({value} AS REAL)"
  if kind in ("DATE", "TIME", "DATETIME"):
    return f"{kind.lower()}({value})"
  return f"mysql_text({value})"


COMMA = Token("symbol", ",")


def _with_from(name: str, items: list[Any], words: list[str]) -> str:
  place = words.index("FROM")
  before, after = items[:place], items[place + 1 :]
  if name == "EXTRACT":
    return f"{expression(before)}({expression(after)})"
  if name == "TRIM":
    side = words[0] if words[0] in ("LEADING", "TRAILING", "BOTH") else "BOTH"
    what = expression(before[1:] if words[0] == side else before)
    return f"mysql_trim({_quoted(side)}, {what or _quoted(' ')}, {expression(after)})"
  length = words.index("FOR") if "FOR" in words else len(words)
  tail = f", {expression(items[length + 1 :])}" if length < len(words) else ""
  return f"mysql_substr({expression(before)}, {expression(items[place + 1 : length])}{tail})"


def _group_concat(items: list[Any], words: list[str]) -> str:
  separator, key, falling = _quoted(","), "NULL", 0
  if "SEPARATOR" in words:
    place = words.index("SEPARATOR")
    separator, items, words = expression(items[place + 1 :]), items[:place], words[:place]
  if "ORDER" in words:
    place = words.index("ORDER")
    order = split(items[place + 2 :])[0]
    falling = int(_word(order[-1]) == "DESC") if order else 0
    key = expression([item for item in order if _word(item) not in ("ASC", "DESC")])
    items, words = items[:place], words[:place]
  distinct = int(words[:1] == ["DISTINCT"])
  parts = [f"mysql_text({expression(part)})" for part in split(items[distinct:])]
  return f"mysql_group_concat({distinct}, {separator}, {key}, {falling}, {' || '.join(parts)})"


def _one(item: Any) -> str:
  if isinstance(item, Group):
    return f"({expression(item.items)})"
  if item.kind == "text":
    return _quoted(item.value)
  if item.kind == "name" or (item.kind == "word" and item.value[0].isdigit()):
    return "`" + item.value.replace("`", "``") + "`"
  if item.kind == "word":
    return WORDS.get(item.value.upper(), item.value)
  return SYMBOLS.get(item.value, item.value) if item.kind == "symbol" else item.value


def _is_call(before: Any, item: Any) -> bool:
  if not isinstance(item, Group) or not isinstance(before, Token) or before.kind != "word":
    return False
  upper = before.value.upper()
  return upper not in KEYWORDS or upper in ("LEFT", "RIGHT", "INSERT", "MOD")


def _is_operand(item: Any) -> bool:
  if isinstance(item, Group):
    return True
  return item.kind in ("name", "text", "number") or (item.kind == "word" and item.value.upper() not in KEYWORDS)


def _compares_with_number(items: list[Any], place: int) -> bool:
  """Whether at `place` is an operator behind which a number stands."""
  item, behind = items[place], items[place + 1 : place + 3]
  if item.value not in COMPARISONS and _word(item) != "BETWEEN":
    return False
  if behind[:1] == [Token("symbol", "-")]:
    behind = behind[1:]
  return bool(behind) and isinstance(behind[0], Token) and behind[0].kind == "number"


def _check_tables(items: list[Any], table: str) -> None:
  for place, item in enumerate(items):
    if isinstance(item, Group):
      if not (place and _word(items[place - 1]) in ("TRIM", "SUBSTRING", "SUBSTR", "MID", "EXTRACT")):
        _check_tables(item.items, table)
    elif place and _word(items[place - 1]) in BEFORE_TABLES:
      if item.kind == "text":
        raise _not_understood(item)
      if item.value.lower() == table.lower() and item.value != table:
        raise Refused(f"1146: Table '{item.value}' doesn't exist")


def _replaced(items: list[Any], assigned: dict[str, Group]) -> list[Any]:
  """Names that were assigned, replaced by what they were."""
  return [
    Group(_replaced(item.items, assigned))
    if isinstance(item, Group)
    else assigned.get(item.value.lower(), item)
    if item.kind in ("word", "name")
    else item
    for item in items
  ]


def _word(item: Any) -> str:
  return item.value.upper() if isinstance(item, Token) and item.kind == "word" else ""


def _is_text(item: Any) -> bool:
  return isinstance(item, Token) and item.kind == "text"


def _not_understood(item: Any) -> Refused:
  near = "(" if isinstance(item, Group) else str(item.value)
  return Refused(f"1064: You have an error in your SQL syntax near '{near[:80]}'")


def _unquoted(kind: str, text: str) -> str:
  if kind == "name":
    return text[1:-1].replace("``", "`")
  if kind != "text":
    return text
  quote = text[0]

  def character(found: re.Match[str]) -> str:
    return ESCAPES.get(found[1], found[1]) if found[1] else quote

  return re.sub(rf"\\(.)|{quote}{quote}", character, text[1:-1], flags=re.DOTALL)


def _quoted(text: str) -> str:
  return "'" + text.replace("'", "''") + "'"


def _plain_number(text: str) -> str:
  """A number as MySQL prints a literal: 007 as 7, .5 as 0.5, 7.50 as it is."""
  whole, point, fraction = text.partition(".")
  return (whole.lstrip("0") or "0") + (point + fraction if fraction else "")
