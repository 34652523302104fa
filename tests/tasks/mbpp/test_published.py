"""All published solutions, and solutions that were changed, graded in the sandbox."""

import ast
import json
import random
import warnings

import pytest

from cqd_jax.sandbox.sandbox import Sandbox, probe
from cqd_jax.tasks import Harness, Job
from cqd_jax.tasks.mbpp import mbpp
from cqd_jax.tasks.mbpp.checks import checks_of

pytestmark = pytest.mark.skipif(probe() is not None, reason=f"{probe()}")

FAILING = {123: "sums over all numbers below 9,999 for each of these: 7 s of CPU time, and 3 are allowed"}
"""Published solutions that do not pass, by task_id."""

SPLITS = {"train": 374, "validation": 90, "test": 500}

# As evaluation harnesses commonly do: whatever the process says of its own asserts is the verdict.
COMMON = Harness(
  "common",
  """
def run(payload):
  scope = {"__name__": "answer"}
  for part in payload:
    exec(part, scope)
  return True
""",
  cpu_seconds=1,
)


@pytest.fixture(scope="module")
def data(shared_data):
  return str(shared_data("mbpp/mbpp.jsonl"))


@pytest.fixture(scope="module")
def task(data):
  return mbpp(sizes=dict.fromkeys(SPLITS, 1000), seed=0, data=data, challenge=True, seconds=1)


@pytest.fixture(scope="module")
def sandbox(task):
  with Sandbox([task.harness, COMMON], workers=2) as opened:
    yield opened


def grade(task, sandbox, answers):
  """The verdicts on answers, by the place of their question in the file."""
  samples = task.samples()
  outcomes = sandbox([task.job(samples[place], answer) for place, answer in answers])
  return [task.passed(samples[place], outcome) for (place, _), outcome in zip(answers, outcomes, strict=True)]


def test_all_published_solutions_pass_but_those_with_a_reason(task, sandbox):
  samples = task.samples()
  assert {split: len(task.examples(split)) for split in SPLITS} == SPLITS
  passed = grade(task, sandbox, [(place, sample.answer) for place, sample in enumerate(samples)])
  assert len(passed) == 974
  failed = [sample.expected["number"] for sample, right in zip(samples, passed, strict=True) if not right]
  assert failed == list(FAILING)


def test_every_published_test_is_judged_outside(task):
  for sample in task.samples():
    asked = sample.expected
    checks = [check for test in (*asked["tests"], *asked["hidden"]) for check in checks_of(test, asked["functions"])]
    assert len(checks) >= 3
    assert all(check.expressions and not check.claimed for check in checks)


def test_the_sanitized_form_of_the_same_problems(data, sandbox, task, tmp_path):
  with open(data, encoding="utf-8") as file:
    full = [json.loads(line) for line in file][:200:8]
  lines = [
    {"prompt": each["text"], "test_imports": [], **{name: each[name] for name in ("task_id", "code", "test_list")}}
    for each in full
  ]
  path = tmp_path / "sanitized-mbpp.json"
  path.write_text(json.dumps(lines))
  own = mbpp(sizes={"train": 5, "validation": 5, "test": 15}, seed=0, data=str(path), seconds=1)
  assert all(grade(own, sandbox, [(place, sample.answer) for place, sample in enumerate(own.samples())]))


def changed(code, source):
  """A solution with one operator or number changed; None where there is nothing to change."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of odd escapes
    tree = ast.parse(code)
  swaps = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Eq: ast.NotEq, ast.Lt: ast.GtE, ast.Gt: ast.LtE}
  places = [
    node
    for node in ast.walk(tree)
    if (isinstance(node, ast.BinOp) and type(node.op) in swaps)
    or (isinstance(node, ast.Compare) and type(node.ops[0]) in swaps)
    or (isinstance(node, ast.Constant) and type(node.value) is int)
  ]
  if not places:
    return None
  node = source.choice(places)
  if isinstance(node, ast.BinOp):
    node.op = swaps[type(node.op)]()
  elif isinstance(node, ast.Compare):
    node.ops[0] = swaps[type(node.ops[0])]()
  else:
    node.value += 1
  return ast.unparse(tree)


def agreement(task, sandbox, places):
  """Verdicts on changed solutions, here and by the common way."""
  source, samples = random.Random(0), task.samples()
  answers = [
    (place, code) for place in places if (code := changed(samples[place].expected["code"], source)) is not None
  ]
  ours = grade(task, sandbox, answers)
  asked = [samples[place].expected for place, _ in answers]
  jobs = [
    Job("common", [code, own["after"], *own["tests"], *own["hidden"]])
    for (_, code), own in zip(answers, asked, strict=True)
  ]
  return ours, [outcome.value is True for outcome in sandbox(jobs)]


def test_changed_solutions_get_the_verdict_that_running_the_asserts_gives(task, sandbox):
  ours, common = agreement(task, sandbox, range(10, 974, 12))
  assert ours == common
  assert len(ours) > 60
  assert ours.count(False) > 40


@pytest.mark.parametrize("wrap", ["return ({!r}, {})", "return None", "raise ValueError"])
def test_solutions_that_return_something_else_fail(task, sandbox, wrap):
  answers = []
  for place, sample in list(enumerate(task.samples()))[::40]:
    tree = ast.parse(sample.expected["code"])
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef) and node.name in sample.expected["functions"]:
        value = ast.unparse(node.body[-1].value) if isinstance(node.body[-1], ast.Return) else "0"
        node.body = ast.parse(f"def f():\n  {wrap.format('wrong', value)}").body[0].body
    answers.append((place, ast.unparse(tree)))
  assert not any(grade(task, sandbox, answers))


@pytest.mark.soak
def test_every_solution_changed_in_several_ways(task, sandbox):
  for _ in range(3):
    ours, common = agreement(task, sandbox, range(974))
    assert ours == common


@pytest.mark.soak
def test_with_more_seconds_all_pass(data):
  patient = mbpp(sizes=dict.fromkeys(SPLITS, 1000), seed=0, data=data, challenge=True, seconds=300)
  places = [place for place, sample in enumerate(patient.samples()) if sample.expected["number"] in FAILING]
  with Sandbox([patient.harness], workers=1) as opened:
    assert all(grade(patient, opened, [(place, patient.samples()[place].answer) for place in places]))
