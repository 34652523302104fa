"""SQLite with MySQL's words: statements give what MySQL's manual says, and tables hash as they do there."""

import contextlib
import random

import pytest
from dbbench_cases import CHANGES, RESULTS, ROWS, TABLE, hash_of, payload

from cqd_jax.tasks.dbbench.dialect import Refused, translate
from cqd_jax.tasks.dbbench.functions import fold, text
from cqd_jax.tasks.dbbench.harness import run


@pytest.mark.parametrize(("statement", "result"), RESULTS.items())
def test_results(statement, result):
  observation = run(payload(statement))["observation"]
  if result is None:
    assert observation
    assert not observation.startswith("[")
  else:
    assert observation == result


@pytest.mark.parametrize(("statement", "rows"), CHANGES.items())
def test_changes(statement, rows):
  outcome = run(payload(statement, hashed=True))
  assert outcome["observation"] == "[]"
  assert hash_of(rows) == f"[('{outcome['hash']}',)]"


def test_statements_follow_one_another():
  statements = [f"DELETE FROM `{TABLE}` WHERE Gold = 16", "SELECT nothing", f"SELECT COUNT(*) FROM `{TABLE}`"]
  outcome = run(payload(*statements, hashed=True))
  assert outcome["observation"] == f"[({len(ROWS) - 1},)]"
  assert hash_of(ROWS[1:]) == f"[('{outcome['hash']}',)]"
  assert run(payload(hashed=True)) == {"observation": "", "hash": hash_of(ROWS)[3:35]}


@pytest.mark.parametrize(
  "statement", [f"DROP TABLE `{TABLE}`", f"DELETE FROM `{TABLE}`", f"ALTER TABLE `{TABLE}` RENAME COLUMN Gold TO G"]
)
def test_a_table_that_is_gone_has_no_hash(statement):
  outcome = run(payload(statement, hashed=True))
  assert outcome == {"observation": "[]", "hash": None}


def test_tables_can_be_described():
  columns = "[('Nation', 'text', 'YES', '', None, ''), ('Gold', 'text', 'YES', '', None, '')"
  for statement in (f"DESCRIBE `{TABLE}`", f"DESC `{TABLE}`;", f"SHOW COLUMNS FROM `{TABLE}`"):
    assert run(payload(statement))["observation"].startswith(columns)
  assert run(payload("DESCRIBE nothing"))["observation"] == "1146: Table 'nothing' doesn't exist"
  assert run(payload("SHOW GRANTS"))["observation"].startswith("1064")


def test_long_results_are_given_as_far_as_they_are_shown():
  crossed = f"SELECT x.Nation FROM `{TABLE}` x, `{TABLE}` y, `{TABLE}` z, `{TABLE}` u, `{TABLE}` v"
  assert len(run(payload(crossed))["observation"]) == 1000


@pytest.mark.parametrize(
  ("value", "printed"),
  [(2.0, "2"), (2.5, "2.5"), (-0.1, "-0.1"), (1e20, "1e20"), (1 / 3, "0.3333333333333333"), (7, "7"), (None, None)],
)
def test_numbers_as_mysql_prints_them(value, printed):
  assert text(value) == printed


def test_neither_case_nor_accents_count():
  assert fold("Đakovo ÉTÉ") == fold("Đakovo été")
  assert fold("Ångström") == "angstrom"


def test_any_text_is_translated_or_refused():
  """Whatever a model writes, no other error comes out; the pieces are drawn by a fixed seed."""
  rng = random.Random(0)
  words = """SELECT UPDATE SET WHERE INSERT VALUES CAST AS FROM NOT GROUP_CONCAT TRIM SUBSTRING LIMIT BETWEEN DELETE
    POSITION IN ORDER SEPARATOR t"""
  pieces = [*"()'\"`,;=<>/*-#.\\ 1x", *words.split()]
  told = set()
  for _ in range(800):
    statement = " ".join(rng.choices(pieces, k=rng.randint(1, 12)))
    with contextlib.suppress(Refused):
      told.add(translate(statement, "t"))
  assert len(told) > 200
