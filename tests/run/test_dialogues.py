"""Evolution on tasks of several turns, with a random Llama that has a real tokenizer: all is counted."""

import dataclasses
import sqlite3
import warnings
from pathlib import Path

import pytest
import transformers
from dialogue_cases import write_models
from experiment_cases import needs_sandbox, tiny_evolution, tiny_settings
from rich.console import Console

from cqd_jax.config.plugs import Plug
from cqd_jax.config.settings import OutputSettings, TaskSettings
from cqd_jax.run.experiment import run_experiment
from cqd_jax.run.files import open_run
from cqd_jax.run.plan import dry_run
from cqd_jax.run.read_run import read_record
from cqd_jax.run.text_run import tasks_of
from cqd_jax.sandbox.machine import find_mode
from cqd_jax.store.history import History
from cqd_jax.tasks.episode import as_episode

SCRIPTED = ("one", "two")
SIZES = {"train": 8, "validation": 8, "test": 8}


def evolve(folder, names, **changes):
  """A run of two children, what it printed, and its settings."""
  tasks = TaskSettings(names=tuple(names), labels=8, **SIZES)
  settings = tiny_settings(
    folder,
    tasks=tasks,
    max_new_tokens=6,
    evolution=tiny_evolution(children=2, batch_size=2),
    methods=(),
    swarm_sizes=(),
    engine=Plug("local", {"prompt_buckets": 1, "candidates_per_batch": 2}),
    output=OutputSettings(elites="none", tensorboard=False, samples=8, transcripts=2),
    **changes,
  )
  episodes = [as_episode(task) for task in tasks_of(settings)]
  texts = [message.content for each in episodes for one in each.examples("test") for message in each.opening(one)]
  base, experts = write_models(folder / "models", [text[:3000] for text in texts])
  settings = dataclasses.replace(settings, base=base, experts=experts)
  with warnings.catch_warnings(), (folder / "log").open("w") as log:
    warnings.filterwarnings("ignore", message="task .* all experts score 0")
    result = run_experiment(settings, Console(file=log, width=160))
  return result, (folder / "log").read_text(), settings


def counted(run_dir):
  """Of all individuals on validation: samples, turns, tokens read and decoded."""
  connection = sqlite3.connect(run_dir / "history.sqlite")
  query = "SELECT samples, turns, prompt_tokens, answer_tokens FROM evaluations WHERE split = 'validation'"
  rows = connection.execute(query).fetchall()
  connection.close()
  return rows


def published(folder):
  """The paper's three tasks, as far as their data are here; and why they are not."""
  found = {
    "mbpp": {"data": str(folder / "mbpp" / "mbpp.jsonl")},
    "dbbench": {"data": str(folder / "dbbench" / "standard.jsonl")},
    "os_interaction": {"data": str(folder / "os_interaction"), "rounds": 2},
  }
  if missing := [own["data"] for own in found.values() if not Path(own["data"]).exists()]:
    return [], f"the published data are not here: {missing[0]}"
  mode, reason = find_mode()
  if mode is None:
    return [], reason
  return [Plug(name, settings) for name, settings in found.items()], ""


@pytest.fixture(scope="module")
def talked(tmp_path_factory, pytestconfig):
  """One run of all tasks: to compile its programs takes longer than to run them."""
  names = [Plug(f"dialogue_cases:{name}_turn{'s' * (name != 'one')}") for name in SCRIPTED]
  others, _ = published(pytestconfig.rootpath.parent / "shared" / "data")
  return evolve(tmp_path_factory.mktemp("talked"), [*names, *others])


@needs_sandbox
def test_the_paper_s_three_tasks_are_evolved(talked, pytestconfig):
  """A model that answers at random solves nothing of them; it is asked, executed and judged."""
  plugs, reason = published(pytestconfig.rootpath.parent / "shared" / "data")
  if not plugs:
    pytest.skip(reason)
  result, *_ = talked
  record = read_record(open_run(result.run_dir))
  names = [plug.use for plug in plugs]
  assert list(record.task_names) == [*SCRIPTED, *names]
  for name in names:
    own = [sample for sample in record.samples if sample.task == name]
    assert len(own) == 8
    assert all(sample.score in (0.0, 1.0) for sample in own)
    answered = [sample for sample in own if "the context" not in sample.reason]
    assert answered
    assert all(sample.prompt for sample in own)
  assert all(set(row.scores) == set(record.task_names) for row in result.rows if row.scores)


@needs_sandbox
def test_dialogues_of_several_turns_are_evolved_and_all_they_take_is_counted(talked):
  result, printed, _ = talked
  (row,) = [row for row in result.rows if row.name == "CycleQD, best elite"]
  assert all(row.scores[name] <= 7 / 8 * 0.25 for name in SCRIPTED)  # one of eight does not fit the context
  rows = counted(result.run_dir)
  assert len(rows) == 2 + 2
  for samples, turns, read, decoded in rows:
    assert samples == 8 * len(row.scores)
    assert 14 <= turns <= samples * 5
    assert 0 < decoded <= 6 * turns
    assert read > turns
  costs = {cost.name: cost for cost in read_record(open_run(result.run_dir)).costs}
  assert costs["the experts"].turns == sum(turns for _, turns, _, _ in rows[:2])
  assert (costs["CycleQD"].individuals, costs["CycleQD"].samples) == (2, 2 * 8 * len(row.scores))
  assert costs["test questions"].answer_tokens > 0
  for text in ("What scoring took", "tokens decoded", f"{costs['CycleQD'].turns:,}"):
    assert text in printed


@needs_sandbox
def test_the_report_has_the_dialogues_of_the_best_and_why_they_failed(talked):
  result, *_ = talked
  samples = [sample for sample in read_record(open_run(result.run_dir)).samples if sample.task in SCRIPTED]
  assert len(samples) == 16
  too_long = [sample for sample in samples if "the context 512" in sample.reason]
  assert [sample.task for sample in too_long] == ["one", "two"]
  for sample in samples:
    assert sample.turns[0] == ("system", f"You are {sample.task}.")
    if sample in too_long:
      assert (sample.score, sample.answer, len(sample.turns)) == (0.0, "", 2)
      continue
    roles = [role for role, _ in sample.turns]
    assert roles.count("assistant") == {"one": 1, "two": 2}[sample.task]
    executed = [text for role, text in sample.turns if role == "executed"]
    assert executed == [f"count {turn + 1}" for turn in range(len(roles)) if said(sample, turn)]


def said(sample, turn):
  """Whether the model's answer of a turn, if there is one, had any text."""
  answers = [text for role, text in sample.turns if role == "assistant"]
  return turn < len(answers) and bool(answers[turn])


@needs_sandbox
def test_the_best_is_not_asked_again_for_the_report(talked):
  """Its samples are those of its test, which the history keeps."""
  result, *_ = talked
  kept = {tuple(sample.turns) for sample in read_record(open_run(result.run_dir)).samples if sample.turns}
  with History(result.run_dir / "history.sqlite") as history:
    problem = history._connection.execute("SELECT DISTINCT problem FROM evaluations WHERE split = 'test'").fetchone()[0]
    names = [name for (name,) in history._connection.execute("SELECT individual FROM evaluations WHERE split = 'test'")]
    found = [history.transcripts("test", problem, name) for name in names]
  assert any(kept <= {each.turns for each in own} for own in found)


@needs_sandbox
def test_the_plan_counts_every_turn(talked, tmp_path):
  *_, settings = talked
  names = tuple(plug for plug in settings.tasks.names if ":" in plug.use)
  settings = dataclasses.replace(settings, tasks=dataclasses.replace(settings.tasks, names=names))
  with (tmp_path / "log").open("w") as log:
    dry_run(settings, Console(file=log, width=160))
  (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if "evolving" in line]
  _, models, answers, read, written, *_ = [cell.strip().replace(",", "") for cell in line.strip("│").split("│")]
  assert (models, answers, written) == ("4", f"{4 * 8 * (1 + 2)}", f"{4 * 8 * (1 + 2) * 6}")
  tokenizer = transformers.AutoTokenizer.from_pretrained(settings.base)
  expected = 0
  for episode in map(as_episode, tasks_of(settings)):
    for example in episode.examples("validation"):
      said = [message._asdict() for message in episode.opening(example)]
      chat = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
      tokens = len(tokenizer(chat, add_special_tokens=False)["input_ids"])
      expected += sum(tokens + turn * 6 for turn in range(episode.max_turns))
  assert int(read) == 4 * expected
