import itertools
import random
import sqlite3
import statistics

import pytest

from cqd_jax.tasks.execution import Job, Outcome
from cqd_jax.tasks.skills import database as make_database
from cqd_jax.tasks.skills.database import (
  BOUNDS,
  NUM_DATA_SETS,
  NUMBERS,
  TEXTS,
  Condition,
  Meaning,
  answer,
  draw,
  expected,
  given,
  scripts,
)
from cqd_jax.tasks.task import Example, grade


@pytest.fixture(scope="module")
def task():
  return make_database(sizes={"train": 0, "validation": 0, "test": 0})


@pytest.fixture
def execute(task, in_process):
  return in_process(task.harness)


@pytest.fixture(scope="module")
def tables():
  """Each data set as {table: [row as a dict]}."""
  data_sets = []
  for script in scripts():
    connection = sqlite3.connect(":memory:")
    connection.executescript(script)
    connection.row_factory = sqlite3.Row
    data_sets.append({t: [dict(row) for row in connection.execute(f"select * from {t}")] for t in TEXTS})
    connection.close()
  return data_sets


def evaluate(meaning, rows):
  """The meaning in plain Python, with no SQL."""
  compare = {"=": lambda a, b: a == b, "<": lambda a, b: a < b, ">": lambda a, b: a > b}
  rows = [r for r in rows if all(compare[c.operator](r[c.column], c.value) for c in meaning.conditions)]
  if not meaning.column:
    return [[len(rows)]]
  if meaning.order:
    rows = sorted(rows, key=lambda row: row[meaning.order], reverse=meaning.falling)
  values = [row[meaning.column] for row in rows][: meaning.limit or None]
  if not meaning.aggregate:
    return [[value] for value in values]
  if not values:
    return [[None]]
  return [[{"sum": sum, "min": min, "max": max, "avg": statistics.fmean}[meaning.aggregate](values)]]


def passes(task, execute, meaning, query):
  return bool(grade(task, [Example("", answer(meaning), expected(meaning))], [query], execute)[0])


def test_rows_agree_with_plain_python(tables):
  rng = random.Random(1)
  for _ in range(600):
    meaning = draw(rng)
    for rows, data_set in zip(given(meaning), tables, strict=True):
      ours = evaluate(meaning, data_set[meaning.table])
      if meaning.order or meaning.aggregate:
        assert rows == ours
      else:
        assert sorted(rows) == sorted(ours)


def test_the_documented_example(tables):
  meaning = Meaning("staff", "age", "", (Condition("city", "=", "rome"),), "pay", False, 5)
  assert answer(meaning) == "select age from staff where city='rome' order by pay limit 5"
  for rows, data_set in zip(given(meaning), tables, strict=True):
    romans = sorted((row["pay"], row["age"]) for row in data_set["staff"] if row["city"] == "rome")
    assert rows == [[age] for _, age in romans[:5]]


def test_data_are_30_rows_without_ties_on_every_bound(tables):
  assert len(tables) == NUM_DATA_SETS
  for data_set, (table, texts) in itertools.product(tables, TEXTS.items()):
    rows = data_set[table]
    assert len(rows) == len({row["name"] for row in rows}) == 30
    for column in NUMBERS[table]:
      numbers = {row[column] for row in rows}
      assert len(numbers) == 30
      assert set(BOUNDS) <= numbers <= set(range(10, 90))
    for column, values in texts.items():
      assert {row[column] for row in rows} == set(values)


@pytest.mark.parametrize(
  ("query", "right"),
  [
    ("select count(*) from staff where age>50", True),
    ("SELECT COUNT(age) FROM staff WHERE age > 50;", True),
    ("select sum(age>50) from staff", True),
    ("select total(age>50) from staff", True),  # a float of the same value
    ("select 1.0*count(*) from staff where age>50", True),
    ("select cast(count(*) as text) from staff where age>50", False),
    ("select count(*), 1 from staff where age>50", False),
    ("select count(*) from staff where age>=50", False),
    ("select count(*) from staff where age>50 union all select 1", False),
    ("select age from staff where age>50", False),
    ("select count(*) from staff where age>", False),
    ("select count(*) from nothing", False),
    ("select 1; select 2", False),
    ("", False),
    ("select null", False),
    ("select x'00'", False),
    ("select count(*) from staff where age>50\0", False),
  ],
)
def test_counts(task, execute, query, right):
  assert passes(task, execute, Meaning("staff", conditions=(Condition("age", ">", 50),)), query) is right


def test_order_matters_only_where_it_is_asked_for(task, execute):
  unordered = Meaning("goods", "price", "", (Condition("kind", "=", "toy"),))
  ordered = Meaning("goods", "price", "", (Condition("kind", "=", "toy"),), "stock")
  plain = "select price from goods where kind='toy'"
  for query in (plain, plain + " order by stock", plain + " order by stock desc"):
    assert passes(task, execute, unordered, query)
    assert passes(task, execute, ordered, query) is (query == plain + " order by stock")
  repeated = "select a.price from goods a, (select 1 union select 2) where kind='toy'"
  assert not passes(task, execute, unordered, repeated)
  texts = Meaning("goods", "color", "", (Condition("kind", "=", "toy"),))
  assert passes(task, execute, texts, "select color from goods where kind='toy'")
  assert not passes(task, execute, texts, "select distinct color from goods where kind='toy'")


@pytest.mark.parametrize(
  "query",
  [
    "delete from staff",
    "drop table staff",
    "update staff set age=0",
    "insert into staff select * from staff",
    "create table more as select * from staff",
    "create temp table more (a)",
    "attach ':memory:' as other",
    "attach '/etc/passwd' as other",
    "vacuum into '/tmp/copy.db'",
    "pragma writable_schema=1",
    "pragma table_info(staff)",
    "select * from pragma_database_list",
    "select load_extension('x')",
    "begin",
    "with recursive t(n) as (select 1 union all select n+1 from t) select n from t where n<0",
    "select count(*) from staff a, staff b, staff c, staff d, staff e",
    "select zeroblob(100000000)",
  ],
)
def test_what_writes_or_takes_for_ever_is_refused_and_changes_nothing(task, execute, query):
  every_row = "select * from staff"
  [before, outcome, after] = execute([Job("database", text) for text in (every_row, query, every_row)])
  assert [list(result) for result in outcome.value] == [["raises"]] * NUM_DATA_SETS
  assert after == before
  example = Example("", "", expected(Meaning("staff")))
  assert task.passed(example, outcome) is False


def test_rows_are_bounded(execute):
  [outcome] = execute([Job("database", "select a.name from staff a, staff b")])
  assert [len(rows) for rows in outcome.value] == [40] * NUM_DATA_SETS


@pytest.mark.parametrize("cell", [True, "30", [30], {"bytes": "00"}, None, 30.5, float("nan")])
def test_only_the_number_itself_is_the_number(task, cell):
  example = Example("", "", expected(Meaning("staff")))
  assert task.passed(example, Outcome("ok", [[[30]]] * NUM_DATA_SETS))
  assert task.passed(example, Outcome("ok", [[[30.0]]] * NUM_DATA_SETS))
  assert task.passed(example, Outcome("ok", [[[cell]]] * NUM_DATA_SETS)) is False
  assert task.passed(example, Outcome("ok", [[[30]]] * (NUM_DATA_SETS - 1))) is False


def test_true_is_not_one(task):
  example = Example("", "", {"ordered": False, "results": [[[[1, 1]]]] * NUM_DATA_SETS})
  assert task.passed(example, Outcome("ok", [[[1]]] * NUM_DATA_SETS))
  assert task.passed(example, Outcome("ok", [[[True]]] * NUM_DATA_SETS)) is False


def test_a_question_that_nothing_answers_is_not_asked():
  nobody = (Condition("age", "<", 20), Condition("age", ">", 80))
  assert given(Meaning("staff", conditions=nobody)) == [[[0]]] * NUM_DATA_SETS
  assert expected(Meaning("staff", conditions=nobody)) is None
  assert expected(Meaning("staff", "age", "sum", nobody)) is None
  assert expected(Meaning("staff", "age", "", nobody)) is None
