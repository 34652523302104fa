"""Database: a SQL query over two small tables, graded by its result set in SQLite.

"list the age of staff whose city is rome, bottom 5 by pay" asks for
`select age from staff where city='rome' order by pay limit 5`. The query is executed on several data sets, so that a
wrong one rarely gives the right rows.
"""

import dataclasses
import functools
import random
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources

from cqd_jax.tasks.execution import JSON, Harness
from cqd_jax.tasks.skills.grammar import SIZES, Grammar, Skill, pick
from cqd_jax.tasks.task import Split

NUM_DATA_SETS = 3
NUM_ROWS = 30

TEXTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
  "staff": {
    "city": ("rome", "oslo", "lima", "bern"),
    "team": ("ops", "dev", "law"),
  },
  "goods": {
    "kind": ("toy", "cup", "hat", "pen"),
    "color": ("red", "blue", "gray"),
  },
}
"""The values of each column of text by table; each table also has a unique `name`."""

NUMBERS: Mapping[str, tuple[str, ...]] = {"staff": ("age", "pay"), "goods": ("price", "stock")}
"""The columns of numbers from 10 to 89 by table; within a table each number occurs once, so no order has ties."""

BOUNDS = tuple(range(20, 90, 10))
AGGREGATES = ("sum", "avg", "min", "max")


@dataclasses.dataclass(frozen=True)
class Condition:
  """`column operator value`; an operator of "=", "<" and ">" (in near misses also "<=" and ">=")."""

  column: str
  operator: str
  value: str | int


@dataclasses.dataclass(frozen=True)
class Meaning:
  """A query.

  Attributes:
    table: of the query.
    column: what is selected; "" counts the rows.
    aggregate: one of `AGGREGATES`, or "" for one value a row.
    conditions: all of which hold, in the order of the table's columns.
    order: column by which the rows are ordered, or "".
    falling: whether the order is descending.
    limit: number of rows, or 0 for all.
  """

  table: str
  column: str = ""
  aggregate: str = ""
  conditions: tuple[Condition, ...] = ()
  order: str = ""
  falling: bool = False
  limit: int = 0


SELECT_WORDS = {
  "": ("list the {} of {}", "show the {} of {}", "the {} of all {}"),
  "sum": ("sum of the {} of {}", "total {} of {}"),
  "avg": ("average {} of {}", "mean of the {} of {}"),
  "min": ("lowest {} of {}", "smallest {} of {}"),
  "max": ("highest {} of {}", "largest {} of {}"),
}
COUNT_WORDS = ("how many {}", "count the {}", "number of {}")
JOIN_WORDS = (" whose ", " where ")
CONDITION_WORDS = {
  "=": ("{} is {}", "{} equals {}"),
  ">": ("{} above {}", "{} over {}"),
  "<": ("{} below {}", "{} under {}"),
}
ORDER_WORDS = {
  False: (" sorted by {}", " by {}"),
  True: (" reverse sorted by {}", " by {} reverse"),
}
LIMIT_WORDS = {
  False: (", bottom {} by {}", ", lowest {} by {}"),
  True: (", top {} by {}", ", highest {} by {}"),
}


def draw(rng: random.Random) -> Meaning:
  """A random query: rows, an aggregate of a column, or the number of rows."""
  table = pick(rng, tuple(TEXTS))
  kind = pick(rng, ("rows", "rows", "aggregate", "aggregate", "count"))
  conditions = _draw_conditions(table, pick(rng, (0, 1, 1, 1, 2, 2)), rng)
  constant = {condition.column for condition in conditions if condition.operator == "="}
  if kind == "count":
    return Meaning(table, conditions=conditions)
  if kind == "aggregate":
    return Meaning(table, pick(rng, NUMBERS[table]), pick(rng, AGGREGATES), conditions)
  columns = [c for c in ("name", *TEXTS[table], *NUMBERS[table]) if c not in constant]
  shape = pick(rng, ("all", "ordered", "limited", "limited"))
  order = pick(rng, NUMBERS[table]) if shape != "all" else ""
  falling = pick(rng, (False, True)) if order else False
  limit = pick(rng, range(1, 7)) if shape == "limited" else 0
  return Meaning(table, pick(rng, columns), "", conditions, order, falling, limit)


def _draw_conditions(table: str, number: int, rng: random.Random) -> tuple[Condition, ...]:
  columns = [*TEXTS[table], *NUMBERS[table]]
  chosen: set[str] = set()
  while len(chosen) < number:
    chosen.add(pick(rng, columns))
  conditions = []
  for column in columns:
    if column in chosen:
      if column in TEXTS[table]:
        conditions.append(Condition(column, "=", pick(rng, TEXTS[table][column])))
      else:
        conditions.append(Condition(column, pick(rng, "<>"), pick(rng, BOUNDS)))
  return tuple(conditions)


def prompt(meaning: Meaning, rng: random.Random) -> str:
  """The meaning in English."""
  if meaning.column:
    text = pick(rng, SELECT_WORDS[meaning.aggregate]).format(meaning.column, meaning.table)
  else:
    text = pick(rng, COUNT_WORDS).format(meaning.table)
  joiner = pick(rng, JOIN_WORDS)
  for condition in meaning.conditions:
    words = pick(rng, CONDITION_WORDS[condition.operator])
    text += joiner + words.format(condition.column, condition.value)
    joiner = " and "
  if meaning.limit:
    return text + pick(rng, LIMIT_WORDS[meaning.falling]).format(meaning.limit, meaning.order)
  if meaning.order:
    return text + pick(rng, ORDER_WORDS[meaning.falling]).format(meaning.order)
  return text


def answer(meaning: Meaning) -> str:
  """The meaning in SQL."""
  selected = meaning.column or "count(*)"
  if meaning.aggregate:
    selected = f"{meaning.aggregate}({selected})"
  text = f"select {selected} from {meaning.table}"
  joiner = " where "
  for condition in meaning.conditions:
    value = f"'{condition.value}'" if type(condition.value) is str else condition.value
    text += f"{joiner}{condition.column}{condition.operator}{value}"
    joiner = " and "
  if meaning.order:
    text += f" order by {meaning.order}" + (" desc" if meaning.falling else "")
  return text + (f" limit {meaning.limit}" if meaning.limit else "")


def near_misses(meaning: Meaning) -> Iterator[Meaning]:
  """A condition less or changed, another aggregate, the other order or none, a limit off by one or none."""
  for i, condition in enumerate(meaning.conditions):
    before, after = meaning.conditions[:i], meaning.conditions[i + 1 :]
    yield dataclasses.replace(meaning, conditions=before + after)
    for operator in {"=": "", ">": ("<", ">="), "<": (">", "<=")}[condition.operator]:
      changed = dataclasses.replace(condition, operator=operator)
      yield dataclasses.replace(meaning, conditions=(*before, changed, *after))
  if meaning.aggregate:
    for aggregate in AGGREGATES:
      if aggregate != meaning.aggregate:
        yield dataclasses.replace(meaning, aggregate=aggregate)
  if meaning.order:
    yield dataclasses.replace(meaning, falling=not meaning.falling)
    yield dataclasses.replace(meaning, order="", falling=False)
  if meaning.limit:
    yield dataclasses.replace(meaning, limit=meaning.limit + 1)
    yield dataclasses.replace(meaning, limit=meaning.limit - 1)


@functools.cache
def given(meaning: Meaning) -> JSON:
  """The rows on each data set, from a SQLite of the parent's own."""
  query = answer(meaning)
  return [[list(row) for row in connection.execute(query)] for connection in _connections()]


def expected(meaning: Meaning) -> JSON:
  """Whether the order of rows matters, and the normal form of the rows on each data set.

  None where a data set has no such rows, which many other queries would get right.
  """
  results, ordered = given(meaning), bool(meaning.order)
  if any(rows in ([], [[None]], [[0]]) for rows in results):
    return None
  return {"ordered": ordered, "results": [_normal_form(rows, ordered) for rows in results]}


def database(*, sizes: Mapping[Split, int] = SIZES, seed: int = 0) -> Skill[Meaning]:
  """The database task; `sizes` examples per split, drawn by `seed`.

  An answer passes if it gives the expected rows on every data set: in the expected order where the question asks for
  one, else in any; each as often as expected. Integers and floats are compared by value, as SQL does.
  """
  source = resources.files(__package__).joinpath("harness_database.py").read_text(encoding="utf-8")
  return Skill(
    name="database",
    harness=Harness("database", source, list(scripts())),
    grammar=Grammar(draw, prompt, answer, given, expected, near_misses),
    verdict=_same,
    sizes=sizes,
    seed=seed,
  )


@functools.cache
def scripts() -> tuple[str, ...]:
  """The SQL that builds each data set; the data are fixed for good."""
  return tuple(_script(random.Random(f"database {index}")) for index in range(NUM_DATA_SETS))


def _script(rng: random.Random) -> str:
  statements = []
  for table, texts in TEXTS.items():
    numbers = NUMBERS[table]
    columns = ["name text", *(f"{c} text" for c in texts), *(f"{c} integer" for c in numbers)]
    statements.append(f"create table {table} ({', '.join(columns)});")
    values = [
      [f"{table[0]}{row}" for row in _shuffled(range(10, 10 + NUM_ROWS), rng)],
      *([pick(rng, options) for _ in range(NUM_ROWS)] for options in texts.values()),
      *(_draw_numbers(rng) for _ in numbers),
    ]
    for row in zip(*values, strict=True):
      statements.append(f"insert into {table} values ({', '.join(map(repr, row))});")
  return "\n".join(statements)


def _draw_numbers(rng: random.Random) -> list[int]:
  # every bound is among them, so that "above" differs from "at least"
  others = [n for n in range(10, 90) if n not in BOUNDS]
  return _shuffled([*BOUNDS, *_shuffled(others, rng)[: NUM_ROWS - len(BOUNDS)]], rng)


def _shuffled(items: Iterable[int], rng: random.Random) -> list[int]:
  return sorted(items, key=lambda _: rng.random())


@functools.cache
def _connections() -> tuple[sqlite3.Connection, ...]:
  connections = []
  for script in scripts():
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    connection.executescript(script)
    connections.append(connection)
  return tuple(connections)


# How a value of SQLite compares: by kind first, so that rows of any values can be sorted. No bool comes from SQLite.
KINDS: Mapping[type, int] = {type(None): 0, int: 1, float: 1, str: 2}


def _normal_form(rows: JSON, ordered: bool) -> JSON:
  """Rows of [kind, value] cells, sorted unless `ordered`; None if `rows` are not rows of SQLite's values."""
  if not isinstance(rows, list):
    return None
  normal = []
  for row in rows:
    if not isinstance(row, list) or any(type(cell) not in KINDS for cell in row):
      return None
    normal.append([[KINDS[type(cell)], 0 if cell is None else cell] for cell in row])
  return normal if ordered else sorted(normal)


def _same(expected: JSON, value: JSON) -> bool:
  if not isinstance(value, list):
    return False
  return [_normal_form(rows, expected["ordered"]) for rows in value] == expected["results"]
