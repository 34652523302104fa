"""The examples of docs/ run as they stand."""

import json
import re
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from cqd_jax import operators
from cqd_jax.cli.main import main
from cqd_jax.config.plugs import KINDS, Plug, resolve
from cqd_jax.config.settings import parse_settings
from cqd_jax.genotypes.space import Candidates, dense_space
from cqd_jax.run import run
from cqd_jax.run.text_run import tasks_of
from cqd_jax.sandbox.sandbox import Sandbox, probe
from cqd_jax.tasks import Message, Outcome, Request, TextProblem, TracedProblem, grade
from cqd_jax.tasks.dbbench import gold_turns

PAGES = (
  *("script", "task", "operator", "method", "engine"),
  *("benchmarks", "dbbench", "os_interaction", "lm_eval"),
  *("merging", "recipes", "distill"),
)


def blocks(pytestconfig, page, kind):
  text = (pytestconfig.rootpath / "docs" / f"{page}.md").read_text(encoding="utf-8")
  return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def as_module(pytestconfig, tmp_path, monkeypatch):
  """Writes the Python of a page as the file that it names."""

  def write(page, name):
    (tmp_path / f"{name}.py").write_text("\n".join(blocks(pytestconfig, page, "python")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return blocks(pytestconfig, page, "yaml")

  return write


def toy(**data):
  return TracedProblem(
    lambda params, goals: jnp.exp(-((params["w"][None] - goals) ** 2).mean(axis=(1, 2)))[:, None],
    {"validation": jnp.stack([jnp.ones((2, 2)), -jnp.ones((2, 2))])} | {"test": jnp.zeros((2, 2, 2))} | data,
    task_names=("up", "down"),
  )


def test_every_page_is_listed(pytestconfig):
  listed = re.findall(r"\]\((\w+)\.md\)", (pytestconfig.rootpath / "docs" / "README.md").read_text(encoding="utf-8"))
  assert tuple(listed) == PAGES
  assert {path.stem for path in (pytestconfig.rootpath / "docs").glob("*.md")} == {"README", *PAGES}


@pytest.mark.usefixtures("qdax_ranks")  # users add biases as they like
def test_a_script(pytestconfig, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (example,) = blocks(pytestconfig, "script", "python")
  exec(compile(example, "script.md", "exec"), {})
  assert "CycleQD, best elite" in capsys.readouterr().out
  assert (tmp_path / "runs" / "likeness" / "report.html").is_file()


@pytest.mark.usefixtures("qdax_ranks")
def test_one_model_is_taught(pytestconfig, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (example,) = blocks(pytestconfig, "distill", "python")
  found = {}
  exec(compile(example, "distill.md", "exec"), found)
  means = {row.name: row.mean for row in found["result"].rows}
  assert means["distill"] > max(mean for name, mean in means.items() if name != "distill" and mean is not None)
  (named,) = blocks(pytestconfig, "distill", "yaml")
  settings = parse_settings(yaml.safe_load(named), "distill.md")
  assert settings.tasks.labels == 1000
  assert [plug.use for plug in settings.methods] == ["distill", "distill"]
  for plug in settings.methods:
    own = {name: value for name, value in plug.settings.items() if name != "name"}
    resolve("methods", Plug(plug.use, own), "methods")


def test_a_task(as_module):
  if probe() is not None:
    pytest.skip(f"nothing isolates answers here: {probe()}")
  (named,) = as_module("task", "my_tasks")
  settings = parse_settings({**yaml.safe_load(named), "seed": 1}, "task.md")
  _, task = tasks_of(settings)
  examples = task.examples("validation")
  assert len(examples) == settings.tasks.validation
  with Sandbox([task.harness], workers=1) as sandbox:
    assert grade(task, examples[:2], [examples[0].answer, "1"], sandbox).tolist() == [True, False]
  import my_tasks

  guesses = iter(["3", "7"])

  class Guesser:
    fingerprint = "guesser"

    def generate(self, individuals, requests):
      return [[next(guesses) for _ in own] for own in requests]

  def execute(jobs):
    return [Outcome("ok", int(job.payload)) for job in jobs]

  problem = TextProblem([my_tasks.Guessing()], Guesser(), execute, max_new_tokens=4)
  space = dense_space(jnp.zeros(1), jnp.zeros((1, 1)))
  assert problem.score("test", space.experts, space).values.tolist() == [[[1.0]]]


def test_benchmarks(pytestconfig, tmp_path, monkeypatch):
  if probe() is not None:
    pytest.skip(f"nothing isolates answers here: {probe()}")
  monkeypatch.chdir(tmp_path)
  names = ("questions", "mbpp", "answers")
  for name, lines in zip(names, blocks(pytestconfig, "benchmarks", "jsonl"), strict=True):
    (tmp_path / f"{name}.jsonl").write_text(lines)
  (named,) = blocks(pytestconfig, "benchmarks", "yaml")
  coding, numbers = tasks_of(parse_settings(yaml.safe_load(named), "benchmarks.md"))
  assert [task.name for task in (coding, numbers)] == ["mbpp", "questions"]
  for task in (coding, numbers):
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [1, 1, 1]
  assert [numbers.reply(each, ["It is 1234."], Outcome("ok")) for each in numbers.samples()] == [0.0, 0.0, 1.0]
  with Sandbox([coding.harness], workers=1) as sandbox:
    assert grade(coding, coding.samples(), [each.answer for each in coding.samples()], sandbox).all()
  commands = blocks(pytestconfig, "benchmarks", "sh")[0].splitlines()
  assert [main(shlex.split(command)[1:]) for command in commands] == [0, 0]
  (shown,) = blocks(pytestconfig, "benchmarks", "json")
  assert json.loads((tmp_path / "grades.json").read_text()) == json.loads(shown)
  assert json.loads((tmp_path / "numbers.json").read_text())["score"] == 0.0


def test_benchmarks_of_others_are_named_by_settings_that_there_are(pytestconfig):
  (named,) = blocks(pytestconfig, "lm_eval", "yaml")
  settings = parse_settings(yaml.safe_load(named), "lm_eval.md")
  assert [resolve("tasks", plug, "tasks").keywords["task"] for plug in settings.tasks.names] == ["gsm8k", "mine"]


def test_a_published_benchmark(pytestconfig, tmp_path, monkeypatch):
  (sample,) = blocks(pytestconfig, "dbbench", "json")
  monkeypatch.chdir(tmp_path)
  (tmp_path / "standard.jsonl").write_text(sample * 3)
  (named,) = blocks(pytestconfig, "dbbench", "yaml")
  settings = parse_settings({**yaml.safe_load(named), "seed": 1}, "dbbench.md")
  (task,) = tasks_of(settings)
  assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [0, 1, 2]
  example = task.examples("test")[0]
  turns = gold_turns(example)
  assert task.reply(example, turns[:1], Outcome("ok", {"observation": "[]"})) == Message("user", "[]")
  if probe() is not None:
    pytest.skip(f"nothing isolates answers here: {probe()}")
  with Sandbox([task.harness], workers=1) as sandbox:
    (outcome,) = sandbox.run([task.job(example, turns)])
  assert task.reply(example, turns, outcome) == 1.0
  given = [{"index": 1, "turns": turns}, {"index": 0, "turns": turns[1:]}]
  (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))
  assert (
    main(["grade", "dbbench", "--data", "standard.jsonl", "--answers", "answers.jsonl", "--json", "grades.json"]) == 0
  )
  assert json.loads((tmp_path / "grades.json").read_text())["passed"] == [True, False]


def test_an_operator(as_module):
  (named,) = as_module("operator", "my_operators")
  plug = Plug.parse(yaml.safe_load(named)["evolution"]["crossover"])
  swap = resolve("crossover", plug, "crossover")
  assert swap.keywords == {"share": 0.3}
  first, second = ({"a": jnp.full(2, value), "b": jnp.full(3, value)} for value in (1.0, 2.0))
  child, note = swap(jax.random.key(0), first, second)
  values = [float(leaf[0]) for leaf in jax.tree.leaves(child)]
  assert set(values) <= {1.0, 2.0}
  assert float(note["from_first"]) == values.count(1.0) / 2


def test_a_merge(pytestconfig):
  (example,) = blocks(pytestconfig, "merging", "python")
  (named,) = blocks(pytestconfig, "merging", "yaml")
  found = {}
  exec(compile(example, "merging.md", "exec"), found)
  # All entries are equal, so none is trimmed: the weighted mean of 1 and 2, times 0.9.
  assert [float(leaf.ravel()[0]) for leaf in jax.tree.leaves(found["model"])] == pytest.approx([1.5, 1.5])
  assert found["model"]["kernel"].shape == (6, 4)
  crossover = resolve("crossover", Plug.parse(yaml.safe_load(named)["evolution"]["crossover"]), "crossover")
  assert crossover.keywords == {"density": 0.8, "gamma": 0.02, "std": 0.1}


def test_the_table_of_merges_names_every_operator_with_its_frame(pytestconfig):
  text = (pytestconfig.rootpath / "docs" / "merging.md").read_text(encoding="utf-8")
  rows = [row.split("|")[1:-1] for row in text.splitlines() if row.startswith("| `")]
  table = {name: row[1].strip() for row in rows for name in re.findall(r"`(\w+)`", row[0])}
  assert {name: operators.frame_of(getattr(operators, name)) for name in table} == table
  crossovers = set(KINDS["crossover"].table) - {"split_slerp", "line", "dare"}
  assert crossovers <= set(table)


def test_a_recipe(pytestconfig, tmp_path, monkeypatch):
  (text,) = blocks(pytestconfig, "recipes", "yaml")
  monkeypatch.chdir(tmp_path)
  name = "model.layers.0.mlp.up_proj"
  for value, folder in enumerate(("base", "math")):
    Path("models", folder).mkdir(parents=True)
    save_file({f"{name}.weight": np.full((2, 4), float(value), np.float32)}, f"models/{folder}/model.safetensors")
  Path("models/code-lora").mkdir()
  factors = {"lora_A": np.ones((1, 4), np.float32), "lora_B": np.ones((2, 1), np.float32)}
  of_module = {f"base_model.model.{name}.{key}.weight": factor for key, factor in factors.items()}
  save_file(of_module, "models/code-lora/adapter_model.safetensors")
  Path("models/code-lora/adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
  Path("recipe.yml").write_text(text)
  assert main(["merge", "recipe.yml", "merged", "--dry-run"]) == 0
  assert main(["merge", "recipe.yml", "merged"]) == 0
  merged = load_file("merged/model.safetensors")[f"{name}.weight"]
  # Equal magnitudes at the cut are all kept; the mean of 1 and 1 with any weights is 1.
  np.testing.assert_allclose(merged.astype(np.float32), np.ones((2, 4)))
  assert text.strip() in Path("merged/README.md").read_text()


@pytest.mark.usefixtures("qdax_ranks")
def test_a_method(as_module, tmp_path):
  (named,) = as_module("method", "my_methods")
  experts = [{"w": jnp.full((2, 2), value)} for value in (0.5, -0.5)]
  result = run(
    problem=toy(),
    base={"w": jnp.zeros((2, 2))},
    experts=experts,
    methods=yaml.safe_load(named)["methods"],
    budget=8,
    run_dir=tmp_path / "run",
    seed=0,
  )
  assert result.rows[-1].name == "hill climbing"
  assert result.rows[-1].evaluations == 8


def test_an_engine(as_module):
  (named,) = as_module("engine", "my_engines")
  engine = resolve("engine", Plug.parse(yaml.safe_load(named)["engine"]), "engine")(None)

  space = dense_space(jnp.zeros(1), jnp.zeros((2, 1)))
  asked = [[Request((Message("user", "hello"),), 5)]] * 2
  assert engine.generate(Candidates(space.experts, space), asked) == [["HELLO"], ["HELLO"]]


def test_a_shell_of_ones_own(pytestconfig, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (named,) = blocks(pytestconfig, "os_interaction", "yaml")
  settings = parse_settings(yaml.safe_load(named), "os_interaction.md")
  (plug,) = settings.tasks.names
  group = tmp_path / plug.settings["data"] / "data/1"
  group.mkdir(parents=True)
  asked = [{"description": f"say {n}", "evaluation": {"match": f"{n}"}} for n in range(150)]
  (group / "own.json").write_text(json.dumps(asked))
  (task,) = tasks_of(settings)
  assert task.max_turns == plug.settings["rounds"]
  assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [96, 24, 24]
