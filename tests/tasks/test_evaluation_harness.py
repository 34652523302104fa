"""Tasks of lm-evaluation-harness: its prompts, filters and metrics, as the harness itself gives them."""

import collections
import importlib.util
import json

import numpy as np
import pytest

from cqd_jax.config.plugs import Plug, resolve
from cqd_jax.tasks import Episode, Outcome
from cqd_jax.tasks.episode import Choosing
from cqd_jax.tasks.evaluation_harness import SOURCES, drawn, lm_eval

SIZES = {"train": 3, "validation": 4, "test": 5}
needs_harness = pytest.mark.skipif(
  importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (the extra lm-eval)"
)


@pytest.mark.parametrize(
  ("available", "sizes", "expected"),
  [
    ({"train": 9, "validation": 9, "test": 9}, (3, 4, 5), (("train", 3), ("validation", 4), ("test", 5))),
    ({"train": 9, "test": 2}, (3, 4, 5), (("train", 3), ("train", 4), ("test", 2))),
    ({"train": 7, "test": 9}, (6, 8, 5), (("train", 3), ("train", 4), ("test", 5))),  # in proportion
    ({"validation": 3, "train": 0}, (1, 1, 1), (("validation", 1),) * 3),
    ({"test": 4}, (1000, 1, 1), (("test", 2), ("test", 1), ("test", 1))),
  ],
)
def test_questions_are_shared_out_by_seed_and_none_twice(available, sizes, expected):
  wanted = dict(zip(("train", "validation", "test"), sizes, strict=True))
  found = drawn(available, wanted, 0)
  for split, (source, count) in zip(wanted, expected, strict=True):
    assert {own for own, _ in found[split]} == {source}
    assert len(found[split]) == count
  every = [each for own in found.values() for each in own]
  assert len(set(every)) == len(every)
  assert all(place < available[source] for source, place in every)
  assert drawn(available, wanted, 0) == found
  assert set(SOURCES) == set(wanted)


def test_too_few_questions_are_refused():
  with pytest.raises(ValueError, match="expected questions for test, got none in any split"):
    drawn({}, SIZES, 0)
  with pytest.raises(
    ValueError, match="lm_eval: test: expected at least one sample for each of train, validation, test, got 2"
  ):
    drawn({"test": 2}, SIZES, 0)
  assert drawn({"train": 40}, SIZES, 0) != drawn({"train": 40}, SIZES, 1)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the harness is installed")
def test_where_the_harness_is_missing_it_says_what_to_install():
  with pytest.raises(ValueError, match=r"pip install 'cqd_jax\[lm-eval\]'"):
    lm_eval(sizes=SIZES, seed=0, task="gsm8k")


SUMS = """
task: sums
dataset_path: none
output_type: generate_until
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n", "Q:"], max_gen_toks: 11}
num_fewshot: 2
filter_list:
  - {name: strict, filter: [{function: regex, regex_pattern: "#### ([0-9]+)"}, {function: take_first}]}
  - {name: last, filter: [{function: regex, group_select: -1, regex_pattern: "([0-9]+)"}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: ["(?s).*#### "]}
metadata: {version: 1}
"""
CITIES = """
task: cities
dataset_path: none
output_type: multiple_choice
validation_split: validation
doc_to_text: "The capital of {{land}} is"
doc_to_target: "{{right}}"
doc_to_choice: "{{cities}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Two tasks of our own and their data."""
  datasets = pytest.importorskip("datasets")
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  (tmp_path / "tasks").mkdir()
  for name, text in (("sums", SUMS), ("cities", CITIES)):
    (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
  sums = [{"question": f"{n} + {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(30)]
  cities = [{"land": f"land {n}", "right": n % 3, "cities": [f"A{n}", "B" * 9, "C"]} for n in range(9)]
  for name, docs in (("train", sums[:20]), ("test", sums[20:]), ("cities", cities)):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
  return tmp_path


def make(folder, task, **settings):
  if task == "sums":
    data = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
  else:
    data = {"validation": str(folder / "cities.jsonl")}
  plug = Plug("lm_eval", {"task": task, "include": str(folder / "tasks"), "data": data, **settings})
  return resolve("tasks", plug, "tasks.names")(sizes=SIZES, seed=settings.pop("seed", 0))


@needs_harness
def test_a_task_that_is_written_has_the_harness_s_prompts_and_verdicts(folder):
  episode = make(folder, "sums")
  assert isinstance(episode, Episode)
  assert not isinstance(episode, Choosing)
  assert (episode.name, episode.max_turns, episode.max_new_tokens) == ("sums", 1, 11)
  splits = {split: episode.examples(split) for split in SIZES}
  assert {split: len(own) for split, own in splits.items()} == SIZES
  asked = [example.expected["question"] for own in splits.values() for example in own]
  assert len(set(asked)) == sum(SIZES.values())
  for example in splits["test"]:
    (message,) = episode.opening(example)
    assert message.role == "user"
    assert message.content.endswith(f"\n\nQ: {example.expected['question']}\nA:")
    assert message.content.count("Q: ") == 3
    assert episode.job(example, ["x"]) is None
    gold = example.answer.rpartition(" ")[2]
    for text, right in {
      example.answer: 1.0,
      f"it is #### {gold}": 1.0,
      f"it is {gold}": 0.0,  # not in the form that the filter wants
      f"#### {gold}1": 0.0,
      f"it is\n\n#### {gold}": 0.0,  # after a stop
      f"Q: #### {gold}": 0.0,
      "": 0.0,
    }.items():
      assert episode.reply(example, [text], Outcome("ok")) == right, text
  again = make(folder, "sums")
  assert [each.prompt for each in again.examples("test")] == [each.prompt for each in splits["test"]]


@needs_harness
def test_filter_shots_and_name_can_be_chosen(folder):
  episode = make(folder, "sums", answer_filter="last", num_fewshot=0, name="other")
  assert episode.name == "other"
  for example in episode.examples("validation"):
    assert example.prompt == f"Q: {example.expected['question']}\nA:"
    gold = example.answer.rpartition(" ")[2]
    assert episode.reply(example, [f"1 and then {gold}"], Outcome("ok")) == 1.0
    assert episode.reply(example, [f"{gold} and then 999"], Outcome("ok")) == 0.0


@needs_harness
@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_a_task_with_choices_chooses_and_judges_as_the_harness_does(folder, metric):
  episode = make(folder, "cities", metric=metric)
  assert isinstance(episode, Episode)
  assert isinstance(episode, Choosing)
  chance = np.random.default_rng(0)
  verdicts = collections.Counter()
  for split in SIZES:
    for example in episode.examples(split):
      doc = example.expected
      assert example.prompt == f"The capital of {doc['land']} is"
      assert episode.choices(example) == [f" {city}" for city in doc["cities"]]
      assert example.answer == f" {doc['cities'][doc['right']]}"
      for _ in range(20):
        values = chance.normal(-5, 3, 3)
        lengths = [len(city) for city in doc["cities"]] if metric == "acc_norm" else [1, 1, 1]
        answer = episode.choose(example, values.tolist())
        best = int(np.argmax(values / lengths))
        assert answer == f" {doc['cities'][best]}"
        score = episode.reply(example, [answer], Outcome("ok"))
        assert score == float(best == doc["right"])
        verdicts[score] += 1
      assert episode.reply(example, ["neither"], Outcome("ok")) == 0.0
  assert min(verdicts.values()) > 20


@needs_harness
@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"metric": "bleu"}, r"expected a metric of 'sums' among \['exact_match'\], got bleu"),
    ({"answer_filter": "first"}, r"expected a filter of 'sums' among \['strict', 'last'\], got 'first'"),
    ({"data": {"train": "nowhere.jsonl"}}, "nowhere.jsonl: no such file or folder"),
    ({"include": "nowhere"}, "nowhere: no such file or folder"),
    ({"data": {"train": __file__}}, "'sums' cannot be loaded"),
  ],
)
def test_what_cannot_be_used_is_named(folder, settings, message):
  with pytest.raises(ValueError, match=message):
    make(folder, "sums", **settings)
