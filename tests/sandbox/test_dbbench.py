"""DBBench on both databases: published statements, hostile ones, isolation, and replays that give what they gave."""

import collections
import dataclasses
import os

import pytest
from hostile_sql import EVERYWHERE, ON_MARIADB
from sql_cases import need, of_the_task, published

from cqd_jax.sandbox import mariadb
from cqd_jax.sandbox.dbbench import dbbench, executor
from cqd_jax.sandbox.on_demand import SandboxOnDemand
from cqd_jax.sandbox.sandbox import Limits
from cqd_jax.sandbox.sql_service import parse_dsn, sql_service
from cqd_jax.tasks import Job
from cqd_jax.tasks.dbbench import read_samples

HOSTILE_SECONDS = 0.3

NOT_AS_PUBLISHED = 225
"""The sample whose hash is not that of its table after its statement."""

Runs = collections.namedtuple("Runs", ["database", "run", "name"])


@pytest.fixture(scope="module", params=["sqlite", "mariadb"])
def runs(request):
  """What executes jobs on each database, with a short time for each statement."""
  need(request.param)
  harness = executor(request.param, HOSTILE_SECONDS)
  with SandboxOnDemand([harness], workers=2, limits=Limits(cpu_seconds=1)) as execute:
    yield Runs(request.param, execute, harness.name)


@pytest.fixture(scope="module")
def cases(request):
  return of_the_task(request.config.rootpath, "dbbench_cases")


@pytest.fixture(scope="module")
def policies(request):
  return of_the_task(request.config.rootpath, "dbbench_policies")


def payload(*statements, hashed=True, rows=40):
  table = [[f"a{number}", f"b{number}"] for number in range(rows)]
  return {"table": "t", "columns": ["a", "b"], "rows": table, "statements": list(statements), "hash": hashed}


def execute(runs, *payloads):
  return runs.run([Job(runs.name, each) for each in payloads])


def test_published_statements_leave_the_published_tables(runs, pytestconfig):
  samples = [sample for sample in read_samples(published(pytestconfig.rootpath)) if sample.modifies]
  jobs = []
  for sample in samples:
    table = {"table": sample.table.name, "columns": list(sample.table.columns)}
    rows = [list(row) for row in sample.table.rows]
    jobs.append({**table, "rows": rows, "statements": [sample.label[0]], "hash": True})
  outcomes = execute(runs, *jobs)
  wrong = [
    sample.index
    for sample, outcome in zip(samples, outcomes, strict=True)
    if outcome.status != "ok" or outcome.value["hash"] != sample.answer_md5
  ]
  assert len(samples) == 200
  assert wrong == [NOT_AS_PUBLISHED]


def test_statements_give_the_same_on_both(runs, cases):
  outcomes = execute(runs, *(cases.payload(statement) for statement in cases.RESULTS))
  for (statement, result), outcome in zip(cases.RESULTS.items(), outcomes, strict=True):
    observation = outcome.value["observation"]
    if result is None:
      assert not observation.startswith("["), statement
    else:
      assert observation == result, statement


def test_changes_hash_the_same_on_both(runs, cases):
  outcomes = execute(runs, *(cases.payload(statement, hashed=True) for statement in cases.CHANGES))
  for (statement, rows), outcome in zip(cases.CHANGES.items(), outcomes, strict=True):
    assert f"[('{outcome.value['hash']}',)]" == cases.hash_of(rows), statement


def test_hostile_statements_harm_nothing_and_end(runs):
  """Each is followed by a change of the table, which has to be what it is without it."""
  hostile = {**EVERYWHERE, **(ON_MARIADB if runs.database == "mariadb" else {})}
  change = "UPDATE t SET b = 'z' WHERE a = 'a1'"
  (changed,) = execute(runs, payload(change))
  outcomes = execute(runs, *(payload(statement, change) for statement in hostile.values()))
  for name, outcome in zip(hostile, outcomes, strict=True):
    if name == "prepared transaction":  # it holds a lock on its own row, until it is removed with its database
      assert outcome.value["observation"].startswith(("[]", "1317"))
    elif outcome.status == "ok":
      assert outcome.value == {"observation": "[]", "hash": changed.value["hash"]}, name
    else:  # it took the time or the memory of its own job
      assert name in ("slow pattern", "large texts", "long"), name
      assert runs.database == "sqlite"
  (last,) = execute(runs, payload(change, "SELECT 1"))
  assert last.value == {"observation": "[(1,)]", "hash": changed.value["hash"]}
  assert not os.path.exists("/tmp/cqd-hostile")


def test_what_an_answer_did_to_its_database_is_its_own(runs):
  drop = payload("DROP TABLE t", "CREATE TABLE t (x INT)", "SELECT * FROM t")
  outcomes = execute(runs, drop, payload("SELECT COUNT(*) FROM t"), drop, payload("SELECT COUNT(*) FROM t", rows=3))
  assert [outcome.value["hash"] is None for outcome in outcomes] == [True, False, True, False]
  assert [outcome.value["observation"] for outcome in outcomes] == ["[]", "[(40,)]", "[]", "[(3,)]"]


def test_a_dialogue_replayed_gives_what_it_gave(runs):
  statements = [
    "SELECT a FROM t ORDER BY b LIMIT 2",
    "UPDATE t SET b = CONCAT(b, '!') WHERE a < 'a2'",
    "SELECT NOW(), RAND() FROM nowhere",
    "SELECT COUNT(*), MAX(b) FROM t WHERE b LIKE '%!'",
    "DELETE FROM t WHERE b LIKE '%!'",
  ]
  prefixes = [payload(*statements[:count]) for count in range(1, 6)]
  live = [execute(runs, prefix)[0].value for prefix in prefixes]
  harness = executor(runs.database)
  with SandboxOnDemand([harness], workers=1) as fresh:
    again = fresh.run([Job(harness.name, prefix) for prefix in reversed(prefixes)])
  assert live == [outcome.value for outcome in reversed(again)]
  assert live[3]["observation"].startswith("[(")


def test_each_policy_scores_what_it_must(runs, cases, policies, tmp_path):
  sizes = {"train": 0, "validation": 0, "test": len(cases.ENTRIES)}
  path = str(cases.write(tmp_path / "data.jsonl"))
  task = dbbench(sizes=sizes, seed=0, data=path, database=runs.database)
  assert policies.score_policies(task, runs.run) == policies.SCORES


def test_policies_on_published_samples(runs, policies, pytestconfig):
  sizes = {"train": 0, "validation": 0, "test": 12}
  data = str(published(pytestconfig.rootpath))
  task = dbbench(sizes=sizes, seed=3, data=data, database=runs.database)
  examples = task.examples("test")
  assert {example.expected["kind"] for example in examples} > {"INSERT", "UPDATE"}
  right = [example.expected["index"] != NOT_AS_PUBLISHED for example in examples]
  scores = policies.score_policies(task, runs.run)
  assert {name: scores[name] for name in ("gold", "empty", "always wrong", "tells the hash")} == {
    "gold": pytest.approx(sum(right) / len(right)),
    "empty": 0.0,
    "always wrong": 0.0,
    "tells the hash": 0.0,
  }


def test_an_answer_sees_no_other_database(runs):
  if runs.database == "sqlite":
    pytest.skip("there is no other database to see")
  (outcome,) = execute(runs, payload("SELECT schema_name FROM information_schema.schemata ORDER BY 1"))
  assert outcome.value["observation"] == "[('database',), ('information_schema',)]"
  (outcome,) = execute(runs, payload("SELECT COUNT(DISTINCT user) FROM information_schema.processlist"))
  assert outcome.value["observation"] == "[(1,)]"


def test_databases_that_are_none():
  with pytest.raises(ValueError, match=r"expected sqlite, mariadb, or mysql://USER:PASSWORD@HOST:PORT.*'postgres'"):
    parse_dsn("postgres://me:secret@host")
  with pytest.raises(ValueError, match="expected no option but unix_socket, got 'ssl'"):
    parse_dsn("mysql://me@host?ssl=1")
  with pytest.raises(ValueError, match="Port") as caught:
    parse_dsn("mysql://me:secret@host:99999999")
  assert "secret" not in str(caught.value)
  assert parse_dsn("mysql://me:se%40cret@host").options == {
    "host": "host",
    "port": 3306,
    "user": "me",
    "password": "se@cret",
  }
  with pytest.raises(ValueError, match=r"seconds: expected 0.05 <= seconds <= 3600, got 0"):
    sql_service("x", seconds=0.0)


def test_what_is_not_installed_is_named(monkeypatch):
  monkeypatch.setattr(mariadb.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(mariadb.MariaDBUnavailable, match=r"PyMySQL: pip install 'cqd_jax\[mariadb\]'"):
    executor("mariadb")
  monkeypatch.undo()
  monkeypatch.setattr(mariadb, "PATH", "/nowhere")
  monkeypatch.setattr(mariadb.importlib.util, "find_spec", lambda name: "found")
  with pytest.raises(mariadb.MariaDBUnavailable, match=r"mariadb is not installed.*sqlite needs nothing"):
    executor("mariadb")


def test_services_know_what_outcomes_depend_on():
  quick, slow = sql_service("x", seconds=1.0), sql_service("x", seconds=2.0)
  assert quick.fingerprint != slow.fingerprint
  assert dataclasses.replace(quick) == sql_service("x", seconds=1.0)
