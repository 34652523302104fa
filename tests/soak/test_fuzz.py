"""A thousand damaged files and configurations, seeded: each gives the right result, or one clear line that names it."""

import json
import random
import shutil
import sqlite3

import jax
import pytest
import yaml
from loop_cases import Plain
from script_cases import call

from cqd_jax.cli.main import main
from cqd_jax.config.settings import ExperimentSettings, check_settings, load_settings, settings_as_json
from cqd_jax.run.methods import methods_of
from cqd_jax.run.text_run import check_questions, tasks_of

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("qdax_ranks")]

ODD = [
  None, True, False, 0, -1, 1, 3.5, 1e308, -1e308, float("nan"), float("inf"), 10**30, "", "x", "../../x", "~",
  "/tmp/x", "yes", "1:30", "a\0b", "\ud800", "é☃" * 50, "x" * 5000, [], [1], [[]], ["coding"] * 9, {}, {"use": "x"},
  {"use": 3}, {"a": {"b": {}}}, "cqd_jax.cli.main:main", "os:system", "a.b:c", "no/such:thing", [None], [0.5] * 100,
]  # fmt: skip
"""Values in the place of others."""


def paths_in(content, path=()):
  """The places of all values in nested JSON."""
  yield path
  if isinstance(content, dict | list):
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
      yield from paths_in(value, (*path, key))


def put(content, path, value):
  """The content with another value at a place; `...` takes it away."""
  if not path:
    return value
  owner = content
  for key in path[:-1]:
    owner = owner[key]
  if value is ...:
    del owner[path[-1]]
  else:
    owner[path[-1]] = value
  return content


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  run_dir = tmp_path_factory.mktemp("fuzz") / "run"
  with jax.numpy_rank_promotion("allow"):
    call(run_dir, Plain(), methods=["cycleqd"])
  return run_dir


def one_line(error, run_dir):
  assert error.startswith("cqd: "), error
  assert error.count("\n") == 1, error
  assert str(run_dir) in error, error
  assert "unexpected" not in error, error
  assert len(error) < 2000, len(error)


@pytest.mark.parametrize("name", ["run.json", "scores.json"])
@pytest.mark.parametrize("part", range(4))
def test_values_of_json_files(finished, tmp_path, capsys, name, part):
  draw = random.Random(f"{name} {part}")
  whole = json.loads((finished / name).read_text())
  places = [path for path in paths_in(whole) if path[:1] != ("settings",)]
  run_dir = shutil.copytree(finished, tmp_path / "run")
  for _ in range(50):
    path, value = draw.choice(places), draw.choice([..., *ODD])
    if not path and value is ...:
      continue
    changed = put(json.loads(json.dumps(whole)), path, value)
    (run_dir / name).write_text(json.dumps(changed), encoding="utf-8", errors="surrogatepass")
    (run_dir / "report.html").unlink(missing_ok=True)
    code = main(["report", str(run_dir)])
    error = capsys.readouterr().err
    where = f"{name} {path} = {str(value)[:50]!r}"
    assert code in (0, 2), f"{where}: {error}"
    assert (run_dir / "report.html").is_file() == (code == 0), where
    if code:
      one_line(error, run_dir)


@pytest.mark.parametrize("part", range(4))
def test_bytes_of_every_file(finished, tmp_path, capsys, part):
  """Cut off, zeroed, or with bits flipped: what `cqd check` calls sound reads the same as before."""
  draw = random.Random(part)
  files = [path.relative_to(finished) for path in sorted(finished.rglob("*")) if path.is_file()]
  files = [path for path in files if path.name not in (".lock", "report.html", "archives.png", "table.md")]
  for number in range(30):
    run_dir = shutil.copytree(finished, tmp_path / f"run-{number}")
    path = run_dir / draw.choice(files)
    content = bytearray(path.read_bytes())
    how = draw.choice(["cut", "zero", "flip"])
    if not content:
      continue
    start = draw.randrange(len(content))
    if how == "cut":
      del content[start:]
    elif how == "zero":
      content[start : start + 64] = bytes(len(content[start : start + 64]))
    else:
      content[start] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    where = f"{path.relative_to(run_dir)} {how} at {start}"
    code = main(["check", str(run_dir)])
    error = capsys.readouterr().err
    assert code in (0, 2), f"{where}: {error}"
    if code:
      one_line(error, run_dir)
    code = main(["report", str(run_dir), "--out", str(tmp_path / "report.html")])
    error = capsys.readouterr().err
    assert code in (0, 2), f"{where}: {error}"
    if code:
      one_line(error, run_dir)
    shutil.rmtree(run_dir)


def refusal(file):
  """What is said of a configuration that cannot be used; None of one that can."""
  try:
    settings = load_settings(file)
    check_settings(settings, len(settings.tasks.names))
    check_questions(tasks_of(settings))
    methods_of(settings)
  except ValueError as error:
    return str(error)
  return None


@pytest.mark.parametrize("part", range(10))
def test_fields_of_the_configuration(tmp_path, monkeypatch, part):
  """What is accepted can be made; what is not is one line that names the file or the setting."""
  draw = random.Random(part)
  usual = settings_as_json(ExperimentSettings())
  places = [path for path in paths_in(usual) if path]
  monkeypatch.chdir(tmp_path)
  accepted = 0
  for _ in range(50):
    path, value = draw.choice(places), draw.choice([..., *ODD])
    content = put(json.loads(json.dumps(usual)), path, value)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8", errors="surrogatepass")
    where = f"{'.'.join(map(str, path))} = {str(value)[:50]!r}"
    said = refusal(file)
    accepted += said is None
    if said is not None:
      assert "\n" not in said, where
      assert 10 < len(said) < 1500, where
  assert accepted > 1
  assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


def test_the_history_row_by_row(finished, tmp_path, capsys):
  """A value in the place of another, in any column: refused by name, or it changes no identity, parent or score."""
  draw = random.Random(0)
  run_dir = shutil.copytree(finished, tmp_path / "run")
  whole = (finished / "history.sqlite").read_bytes()
  connection = sqlite3.connect(finished / "history.sqlite")
  columns = [row[1] for row in connection.execute("PRAGMA table_info(individuals)")]
  count = connection.execute("SELECT count(*) FROM individuals").fetchone()[0]
  connection.close()
  refused = 0
  for _ in range(100):
    (run_dir / "history.sqlite").write_bytes(whole)
    other = sqlite3.connect(run_dir / "history.sqlite")
    column, value = draw.choice(columns), draw.choice([None, -5, 10**6, 0.5, "x", "[", b"\xff"])
    try:
      other.execute(f'UPDATE individuals SET "{column}" = ? WHERE identity = ?', (value, draw.randrange(count)))
      other.commit()
    except sqlite3.IntegrityError:
      continue
    finally:
      other.close()
    code = main(["report", str(run_dir)])
    error = capsys.readouterr().err
    assert code in (0, 2), f"{column} {value!r}: {error}"
    if code:
      one_line(error, run_dir)
      refused += 1
  assert refused > 30
