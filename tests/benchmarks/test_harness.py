import importlib
import io
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import jax.numpy as jnp
import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks.harness import Case, Ceiling, Samples, measure, summarize

ROOT = Path(__file__).parents[2]

FIELDS = {
  "module": str,
  "name": str,
  "labels": dict,
  "machine": dict,
  "compile_s": (float, type(None)),
  "run_s": float,
  "run_s_range": list,
  "rounds": int,
  "items_per_s": (float, type(None)),
  "item": (str, type(None)),
  "gb_per_s": (float, type(None)),
  "gflop_per_s": (float, type(None)),
  "ceiling_gb_per_s": (float, type(None)),
  "ceiling_gflop_per_s": (float, type(None)),
  "bound": (str, type(None)),
  "fraction": (float, type(None)),
  "peer": (str, type(None)),
  "peer_s": (float, type(None)),
  "ratio": (float, type(None)),
}


def make_case(**settings):
  return Case(name="case", function=lambda x: x, arguments=lambda: (jnp.ones(4),), **settings)


def check_schema(line):
  row = json.loads(line)
  assert row.keys() == FIELDS.keys()
  for name, kind in FIELDS.items():
    assert isinstance(row[name], kind), name
  assert row["machine"].keys() == {"platform", "device", "num_devices", "jax"}
  return row


def test_a_case_bound_by_memory_is_compared_with_the_copies_of_its_own_rounds():
  samples = Samples(run=[2.0, 4.0, 1.0], stream=[3.0, 2.0, 3.0], peer=[6.0, 4.0, 8.0])
  row = summarize(
    "m",
    make_case(bytes_moved=4e9, items=8, item="children", peer_name="loop"),
    samples,
    0.5,
    stream_bytes=8e9,
    matmul_flops=1,
  )
  assert (row.module, row.name, row.compile_s, row.rounds) == ("m", "case", 0.5, 3)
  assert (row.run_s, row.run_s_range) == (2.0, (1.0, 4.0))
  assert row.gb_per_s == 2.0
  assert (row.items_per_s, row.item) == (4.0, "children")
  assert row.ceiling_gb_per_s == pytest.approx(8 / 3)
  # half a copy takes 1.5, 1 and 1.5 s: fractions .75, .25 and 1.5
  assert (row.bound, row.fraction) == ("memory", 0.75)
  # 6/2, 4/4, 8/1
  assert (row.peer, row.peer_s, row.ratio) == ("loop", 6.0, 3.0)
  assert row.gflop_per_s is None
  assert row.ceiling_gflop_per_s is None


def test_the_slower_of_the_two_ceilings_counts():
  samples = Samples(run=[10.0], stream=[1.0], matmul=[4.0])
  row = summarize("m", make_case(bytes_moved=2e9, flops=6e9), samples, None, stream_bytes=1e9, matmul_flops=3e9)
  assert (row.bound, row.fraction) == ("arithmetic", 0.8)  # 8 s of matmul against 2 s of copies
  assert row.gflop_per_s == 0.6
  assert row.ceiling_gflop_per_s == 0.75


def test_without_counts_there_are_times_alone():
  row = summarize("m", make_case(), Samples(run=[3.0]), None, stream_bytes=1, matmul_flops=1)
  assert row.run_s == 3.0
  for name in ("gb_per_s", "gflop_per_s", "bound", "fraction", "peer", "peer_s", "ratio"):
    assert getattr(row, name) is None
  check_schema(row.to_json())


def test_a_recycled_argument_is_the_result_of_the_run_before():
  seen = []

  def peer(x, step):
    seen.append(float(x[0]))

  case = Case(
    name="count",
    function=lambda x, step: x + step,
    arguments=lambda: (jnp.zeros(3), jnp.ones(())),
    bytes_moved=24,
    flops=3,
    recycle=0,
    peer=peer,
  )
  row = measure("m", case, Ceiling(quick=True), rounds=2)
  assert seen == sorted(seen)
  assert 1.0 < seen[0] < seen[-1]  # each round goes on where the one before ended
  assert row.rounds == 2
  assert row.compile_s > 0
  assert row.fraction > 0
  check_schema(row.to_json())


def test_a_host_function_gets_its_arguments_untouched():
  taken = []
  case = Case(name="host", function=taken.append, arguments=lambda: ("text",), host=True)
  row = measure("m", case, Ceiling(quick=True), rounds=1)
  assert set(taken) == {"text"}
  assert row.compile_s is None


@pytest.mark.parametrize("seconds", [0.03, 0.0])
def test_what_is_quick_is_run_several_times_in_a_row(seconds):
  calls = []

  def wait():
    calls.append(None)
    time.sleep(seconds)

  case = Case(name="wait", function=wait, arguments=tuple, host=True)
  row = measure("m", case, Ceiling(quick=True), rounds=2)
  if seconds:  # more than 20 ms: once a round, and twice to see how long it takes
    assert len(calls) == 4
    assert row.run_s >= seconds
  else:
    assert len(calls) > 4


def test_the_ratio_to_a_peer_that_makes_fewer_items_is_by_the_item():
  case = make_case(items=32, peer=lambda: None, peer_items=2)
  row = summarize("m", case, Samples(run=[0.1], peer=[0.5]), None, stream_bytes=1, matmul_flops=1)
  assert row.ratio == pytest.approx(80.0)  # .25 s an item against 1/320


def test_all_modules_are_found_and_run(monkeypatch):
  module = types.SimpleNamespace(
    cases=lambda quick: [make_case(labels={"full": 0, "size": "quick" if quick else "full"})]
  )
  monkeypatch.setattr(command, "discover", lambda: ["fake"])
  monkeypatch.setattr(importlib, "import_module", {"benchmarks.bench_fake": module}.__getitem__)
  out = io.StringIO()
  rows = list(command.run(command.discover(), quick=True, console=Console(file=out)))
  assert out.getvalue() == "[1/1] fake: case full=0 quick\n"
  assert [(row.module, row.labels) for row in rows] == [("fake", {"full": 0, "size": "quick"})]


def test_an_unknown_module_is_refused_with_the_known_ones(capsys):
  with pytest.raises(SystemExit):
    command.main(["nonsense"])
  message = capsys.readouterr().err
  assert "nonsense" in message
  for name in command.discover():
    assert name in message


def test_seconds_are_printed_in_a_unit_that_fits():
  row = summarize("m", make_case(), Samples(run=[2.5e-3]), 1.5, stream_bytes=1, matmul_flops=1)
  console = Console(width=200, record=True, file=io.StringIO())
  console.print(command.table([row]))
  text = console.export_text()
  assert "2.5 ms" in text
  assert "1.5 s" in text


@pytest.mark.parametrize(
  "module",
  ["hf", *(pytest.param(name, marks=[pytest.mark.soak, pytest.mark.long]) for name in ("operators", "sandbox"))],
)
def test_the_command_line_gives_a_json_line_a_measurement_and_a_table(tmp_path, module):
  figures = tmp_path / "figures.jsonl"
  command_line = [sys.executable, "-m", "benchmarks", "--quick", "--json", str(figures), module]
  done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=True)
  assert done.stdout == ""
  rows = [check_schema(line) for line in figures.read_text().splitlines()]
  assert {row["module"] for row in rows} == {module}
  names = {row["name"] for row in rows}
  if module == "operators":
    assert {"linear_merge, model", "svd_mutation", "expert_svd_mutation", "gaussian_mutation"} <= names
  for name in names:
    assert f"{module}: {name}" in done.stderr
  for row in rows:
    assert row["run_s_range"][0] <= row["run_s"] <= row["run_s_range"][1]
    assert row["peer"] is None or row["ratio"] > 0
