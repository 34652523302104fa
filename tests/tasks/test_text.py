"""Text problems: answers come back in their places, dialogues go round by round, scores know what they depend on."""

import dataclasses
import importlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.engines.local import LocalEngine
from cqd_jax.engines.text_interface import TextInterface
from cqd_jax.genotypes.space import dense_space
from cqd_jax.models import DecoderConfig, greedy_decode, init_params
from cqd_jax.tasks import (
  Episode,
  Example,
  Harness,
  Job,
  Message,
  Outcome,
  Request,
  TextProblem,
  TrainingSignal,
  Verified,
)
from cqd_jax.tasks import episode as episode_module
from cqd_jax.tasks.text import harnesses_of

CONFIG = DecoderConfig(
  vocab_size=11, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4
)
END, PAD = 1, 0
LETTERS = "abcdefghijk"
ECHO = Harness("echo", "run = str")


def encode(messages):
  return [LETTERS.index(letter) for message in messages for letter in message.content]


def decode(tokens):
  return "".join(LETTERS[token] for token in tokens)


INTERFACE = TextInterface(CONFIG, encode, decode, (END,), PAD, {"tokenizer.json": "{}"})


class Echo:
  """Questions are rows of letters; an answer passes if it begins with the question's first letter."""

  harness = ECHO

  def __init__(self, name, seed, size=5):
    self.name = name
    generator = np.random.default_rng(seed)
    self.prompts = ["".join(generator.choice(list("cdefghi"), generator.integers(1, 7))) for _ in range(size)]

  def examples(self, split):
    return [Example(prompt, prompt[0], expected=split) for prompt in self.prompts]

  def job(self, example, answer):
    return Job("echo", answer)

  def passed(self, example, outcome):
    return outcome.status == "ok" and str(outcome.value).startswith(example.answer)


class Chatter:
  """A dialogue ends with the first answer that holds a k, which is worth the less the later it comes, or fails."""

  name = "chatter"
  harness = ECHO
  max_turns = 3

  def __init__(self, prompts=("c", "ddf", "kcig", "fe")):
    self.prompts = prompts

  def examples(self, split):
    return [Example(prompt, "k") for prompt in self.prompts]

  def opening(self, example):
    return (Message("user", example.prompt),)

  def job(self, example, answers):
    return Job("echo", answers[-1])

  def reply(self, example, answers, outcome):
    if "k" in outcome.value:
      return 1.0 / len(answers)
    return Message("user", "gh"[len(answers) % 2] + example.prompt[0])


def echo(jobs):
  return [Outcome("ok", job.payload) for job in jobs]


class Recorded:
  """An `Execute` that keeps what it was asked."""

  def __init__(self, execute=echo):
    self.execute = execute
    self.calls = []

  def __call__(self, jobs):
    self.calls.append([job.payload for job in jobs])
    return self.execute(jobs)


class Scripted:
  """An engine whose answers are a function of the candidate's number and the dialogue; keeps what it was asked."""

  def __init__(self, answer, fingerprint="scripted-1"):
    self.answer = answer
    self.fingerprint = fingerprint
    self.calls = []

  def generate(self, individuals, requests):
    numbers = np.asarray(individuals.params_of(range(individuals.size))["w"])[:, 0]
    assert len(requests) == len(numbers)
    self.calls.append([list(own) for own in requests])
    return [
      [self.answer(int(number), request) for request in own] for number, own in zip(numbers, requests, strict=True)
    ]


def numbered(*numbers):
  """Individuals that are told apart by a number, and their space."""
  experts = {"w": jnp.asarray(numbers, jnp.float32)[:, None]}
  return experts, dense_space({"w": jnp.zeros(1)}, experts)


@pytest.fixture(scope="module")
def decoders():
  """Four random decoders as task vectors of zeros, and their space."""
  keys = jax.random.split(jax.random.key(0), 4)
  # Larger than at initialization, so that the models disagree.
  population = jax.tree.map(lambda leaf: leaf * 6, jax.vmap(lambda key: init_params(key, CONFIG))(keys))
  return population, dense_space(jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), population), population)


def answer_of(population, candidate, messages, max_new_tokens=6):
  """What one candidate says, by `greedy_decode` of the one dialogue."""
  params = jax.tree.map(lambda leaf: leaf[candidate], population)
  asked = encode(messages)
  prompt = np.zeros((1, 48), np.int32)
  prompt[0, : len(asked)] = asked
  tokens, lengths = greedy_decode(
    params, CONFIG, jnp.asarray(prompt), jnp.array([len(asked)]), max_new_tokens=max_new_tokens, end_ids=(END,)
  )
  return decode(np.asarray(tokens)[0, : int(lengths[0])].tolist())


@pytest.mark.parametrize(("group_size", "num_buckets"), [(1, 1), (1, 3), (8, 2), (3, 2)])
def test_answers_come_back_in_their_places(decoders, group_size, num_buckets):
  population, space = decoders
  tasks = [Echo("a", 0), Echo("b", 1)]
  engine = LocalEngine(INTERFACE, group_size=group_size, num_buckets=num_buckets)
  problem = TextProblem(tasks, engine, echo, max_new_tokens=6)
  expected = [
    [[answer_of(population, p, [Message("user", prompt)]) for prompt in task.prompts] for task in tasks]
    for p in range(4)
  ]
  assert len({text for candidate in expected for texts in candidate for text in texts}) > 8
  dialogues = problem.play("validation", population, space)
  assert [[[own.answers for own in task] for task in candidate] for candidate in dialogues] == [
    [[[text] for text in texts] for texts in candidate] for candidate in expected
  ]
  scored = problem.score("validation", population, space)
  assert scored.values.dtype == np.float32
  assert scored.values.shape == (4, 2, 5)
  for p, k, b in np.ndindex(4, 2, 5):
    assert scored.values[p, k, b] == expected[p][k][b].startswith(tasks[k].prompts[b][0])
  assert 0 < scored.values.sum() < scored.values.size
  assert scored.seconds > 0
  assert problem.task_names == ("a", "b")
  assert min(problem.decode_seconds, problem.grade_seconds) > 0


@pytest.mark.parametrize("group_size", [1, 3])
def test_a_decoder_plays_each_dialogue_as_it_would_by_itself(decoders, group_size):
  population, space = decoders
  task = Chatter()
  expected = []
  for candidate in range(4):
    for prompt in task.prompts:
      messages, score = [Message("user", prompt)], None
      for turn in (1, 2, 3):
        answer = answer_of(population, candidate, messages)
        if "k" in answer:
          score = 1 / turn
          messages.append(Message("assistant", answer))
          break
        messages += [Message("assistant", answer), Message("user", "gh"[turn % 2] + prompt[0])]
      if score is None:
        score = 0.0
        messages.pop()
      expected.append((candidate, tuple(messages), score))
  assert {(len(messages), score) for _, messages, score in expected} == {(2, 1), (4, 1 / 2), (6, 1 / 3), (6, 0)}

  problem = TextProblem([task], LocalEngine(INTERFACE, group_size=group_size, num_buckets=2), echo, max_new_tokens=6)
  played = [
    (candidate, dialogue.messages, dialogue.score)
    for candidate, (own,) in enumerate(problem.play("validation", population, space))
    for dialogue in own
  ]
  assert played == expected
  scored = problem.score("validation", population, space)
  np.testing.assert_array_equal(scored.values.reshape(-1), np.array([score for *_, score in expected], np.float32))


@pytest.fixture
def guessing():
  """The episode that the module's docstring shows to users."""
  [source] = re.findall(r"```python\n(.*?)```", episode_module.__doc__, re.DOTALL)
  scope = {"Harness": Harness, "Job": Job, "Example": Example, "Message": Message}
  exec(source, scope)
  return scope["Guessing"]()


def test_the_documented_episode_is_played_round_by_round(guessing, in_process):
  """Candidate w comes to the number from w below in steps of 1, and has three guesses."""
  assert isinstance(guessing, Episode)

  def guess(number, request):
    turn = len(request.messages) // 2
    seen = [message.content for message in request.messages[1:]]
    assert seen == [text for past in range(turn) for text in (asked(number, past), "no, guess again")]
    assert [message.role for message in request.messages] == ["user", *["assistant", "user"] * turn]
    return asked(number, turn)

  def asked(number, turn):
    return f"50 - {number} + {turn}"

  one = type(guessing)()
  one.examples = lambda split: guessing.examples(split)[:1]  # 50
  engine, execute = Scripted(guess), Recorded(in_process(guessing.harness))
  problem = TextProblem([one], engine, execute, max_new_tokens=9)
  individuals, space = numbered(0, 1, 2, 3, 1)
  scored = problem.score("validation", individuals, space)
  np.testing.assert_array_equal(scored.values, [[[1]], [[1]], [[1]], [[0]], [[1]]])
  # One call of either a round, of those alone who are still at it; equal answers are executed once.
  assert [[len(own) for own in call] for call in engine.calls] == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 0]]
  assert execute.calls == [
    ["50 - 0 + 0", "50 - 1 + 0", "50 - 2 + 0", "50 - 3 + 0"],
    ["50 - 1 + 1", "50 - 2 + 1", "50 - 3 + 1"],
    ["50 - 2 + 2", "50 - 3 + 2"],
  ]
  assert all(request.max_new_tokens == 9 for call in engine.calls for own in call for request in own)


def test_tasks_of_one_turn_and_dialogues_share_the_rounds(guessing, in_process):
  """The single question is asked in the first round only, together with the beginnings of the dialogues."""
  numbers = Echo("echo", 0, size=2)
  run = {"echo": echo, "guessing": in_process(guessing.harness)}
  execute = Recorded(lambda jobs: [run[job.harness]([job])[0] for job in jobs])
  engine = Scripted(lambda number, request: "59")
  problem = TextProblem([numbers, guessing], engine, execute, max_new_tokens=1)
  individuals, space = numbered(0)
  values = problem.score("validation", individuals, space).values
  assert values.shape == (1, 2, 10)
  np.testing.assert_array_equal(values[0, 1], [0] * 9 + [1])  # 50 to 59
  assert [len(call[0]) for call in engine.calls] == [2 + 10, 9, 9]
  assert execute.calls == [["59", "59"], ["59"], ["59"]]  # of two harnesses, so these are two jobs


def test_a_dialogue_that_does_not_end_in_time_has_failed():
  class Endless(Chatter):
    name = "endless"

    def job(self, example, answers):
      return None  # there is nothing to execute, so nothing is

    def reply(self, example, answers, outcome):
      assert outcome == Outcome("ok")
      return Message("user", "h")

  engine, execute = Scripted(lambda number, request: "c"), Recorded()
  problem = TextProblem([Endless()], engine, execute, max_new_tokens=1)
  individuals, space = numbered(0, 1)
  np.testing.assert_array_equal(problem.score("test", individuals, space).values, np.zeros((2, 1, 4)))
  assert len(engine.calls) == 3
  assert execute.calls == []


def test_a_score_is_any_number():
  class Graded(Chatter):
    def reply(self, example, answers, outcome):
      return -2.5 if outcome.value == "c" else True

  problem = TextProblem([Graded()], Scripted(lambda number, request: "cd"[number]), echo, max_new_tokens=1)
  individuals, space = numbered(0, 1)
  np.testing.assert_array_equal(problem.score("test", individuals, space).values[:, 0], [[-2.5] * 4, [1.0] * 4])


def test_tasks_of_different_sizes_are_padded_with_nan_and_scored_by_what_is_there():
  tasks = [Echo("a", 0, size=5), Echo("b", 1, size=2), Echo("c", 2, size=1)]
  problem = TextProblem(
    tasks, Scripted(lambda number, request: request.messages[0].content[number:]), echo, max_new_tokens=1
  )
  individuals, space = numbered(0, 1)
  scored = problem.score("validation", individuals, space)
  assert scored.values.shape == (2, 3, 5)
  expected = np.full((2, 3, 5), np.nan)
  for p, k in np.ndindex(2, 3):
    for b, prompt in enumerate(tasks[k].prompts):
      expected[p, k, b] = prompt[p:].startswith(prompt[0])
  np.testing.assert_array_equal(scored.values, expected)
  scores = scored.with_scores().scores
  for p, k in np.ndindex(2, 3):
    assert scores[p, k] == np.mean(expected[p, k, : len(tasks[k].prompts)])


def test_two_tasks_may_share_a_harness_and_then_equal_jobs():
  tasks = [Echo("a", 0), Echo("b", 0)]
  assert harnesses_of(tasks) == [ECHO]
  assert harnesses_of([*tasks, Chatter()]) == [ECHO]
  execute = Recorded()
  problem = TextProblem(tasks, Scripted(lambda number, request: request.messages[0].content), execute, max_new_tokens=1)
  individuals, space = numbered(0, 1)
  assert problem.score("test", individuals, space).values.all()
  (jobs,) = execute.calls
  assert sorted(jobs) == sorted(set(tasks[0].prompts))


@pytest.mark.parametrize("change", [{"source": "run = repr"}, {"setup": {"a": 1}}])
def test_harnesses_that_clash_are_refused_by_the_names_of_their_tasks(change):
  other = Echo("b", 1)
  other.harness = dataclasses.replace(ECHO, **change)
  message = "tasks: a and b have different harnesses named 'echo'"
  with pytest.raises(ValueError, match=message):
    harnesses_of([Echo("a", 0), other])
  with pytest.raises(ValueError, match=message):
    TextProblem([Echo("a", 0), other], Scripted(lambda *_: ""), echo, max_new_tokens=1)


def test_names_must_differ():
  with pytest.raises(ValueError, match="tasks: expected names that differ, got a, a"):
    TextProblem([Echo("a", 0), Echo("a", 1)], Scripted(lambda *_: ""), echo, max_new_tokens=1)


def test_lost_answers_and_outcomes_are_errors_and_not_shifts():
  individuals, space = numbered(0, 1)

  class Losing(Scripted):
    def generate(self, individuals, requests):
      first, second = super().generate(individuals, requests)
      return [first, second[1:]]

  problem = TextProblem([Echo("a", 0)], Losing(lambda *_: "c"), echo, max_new_tokens=1)
  with pytest.raises(ValueError, match="engine: expected one answer to each request"):
    problem.score("test", individuals, space)
  problem = TextProblem(
    [Echo("a", 0)],
    Scripted(lambda number, request: request.messages[0].content),
    lambda jobs: echo(jobs)[1:],
    max_new_tokens=1,
  )
  with pytest.raises(ValueError, match="execute: expected 5 outcomes, got 4"):
    problem.score("test", individuals, space)


def test_samples_are_half_failures_as_far_as_there_are_any():
  tasks = [Echo("a", 0), Echo("b", 0), Chatter(("ck", "cf", "kf"))]
  tasks[0].prompts, tasks[1].prompts = ["cd", "ce", "cf", "cg", "ch"], ["dc", "de", "df", "dg"]

  def answer(number, request):
    prompt = request.messages[0].content
    return "h" if prompt in ("cf", "ch", "de", "df", "dg") else prompt

  problem = TextProblem(tasks, Scripted(answer), echo, max_new_tokens=1)
  individuals, space = numbered(0)
  found = problem.samples("test", jax.tree.map(lambda leaf: leaf[0], individuals), space, 4)
  assert [(sample.task, sample.prompt, sample.gold, sample.score) for sample in found] == [
    ("a", "cf", "c", 0.0),
    ("a", "ch", "c", 0.0),
    ("a", "cd", "c", 1.0),
    ("a", "ce", "c", 1.0),
    ("b", "de", "d", 0.0),  # one is right, so there is room for three
    ("b", "df", "d", 0.0),
    ("b", "dg", "d", 0.0),
    ("b", "dc", "d", 1.0),
    ("chatter", "cf", "k", 0.0),
    ("chatter", "ck", "k", 1.0),
    ("chatter", "kf", "k", 1.0),
  ]
  assert [sample.answer for sample in found[:4]] == ["h", "h", "cd", "ce"]
  assert not any(sample.turns for sample in found[:8])
  assert found[8].answer == "h"
  said = [("user", "cf"), ("assistant", "h"), ("user", "hc"), ("assistant", "h"), ("user", "gc"), ("assistant", "h")]
  assert found[8].turns == tuple(said)
  assert found[8].reason == "no end after 3 turns"


GRADER = """
from cqd_jax.tasks import Example, Harness, Job

class Own:
  name = "own"
  harness = Harness("own", "run = str")
  def __init__(self, questions):
    self._questions = questions
  def examples(self, split):
    return [Example(text, "x") for text in self._questions[split]]
  def job(self, example, answer):
    return Job("own", answer)
  def passed(self, example, outcome):
    return outcome.value == example.answer
"""
QUESTIONS = {"validation": ["a", "b"], "test": ["c"]}


@pytest.fixture
def own_task(tmp_path, monkeypatch):
  """Makes the task `Own` from a source, as a later session would import it."""
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(sys, "dont_write_bytecode", True)

  def make(source=GRADER, questions=QUESTIONS):
    (tmp_path / "own_grader.py").write_text(source)
    sys.modules.pop("own_grader", None)
    importlib.invalidate_caches()
    return importlib.import_module("own_grader").Own(questions)

  yield make
  sys.modules.pop("own_grader", None)


def fingerprint_of(task, split="validation", engine="engine-1", max_new_tokens=3, others=()):
  problem = TextProblem([task, *others], Scripted(lambda *_: "", engine), echo, max_new_tokens=max_new_tokens)
  return problem.fingerprint(split)


def test_a_fingerprint_names_what_a_score_depends_on(own_task):
  before = fingerprint_of(own_task())
  parts = dict(part.split("=") for part in before.split())
  assert list(parts) == ["own", "decoding"]
  assert "engine-1" in parts["decoding"]
  assert fingerprint_of(own_task()) == before


@pytest.mark.parametrize(
  "changed",
  [
    {"source": GRADER.replace("==", "!=")},
    {"source": GRADER.replace("run = str", "run = repr")},
    {"source": GRADER.replace('"run = str"', '"run = str", {"a": 1}')},
    {"source": GRADER.replace('Example(text, "x")', 'Example(text, "y")')},
    {"source": GRADER.replace('Example(text, "x")', 'Example(text, "x", expected=1)')},
    {"questions": QUESTIONS | {"validation": ["a", "c"]}},
    {"questions": QUESTIONS | {"validation": ["b", "a"]}},
    {"questions": QUESTIONS | {"validation": ["a"]}},
  ],
)
def test_a_fingerprint_changes_with_questions_grader_and_harness(own_task, changed):
  before = dict(part.split("=") for part in fingerprint_of(own_task()).split())
  now = dict(part.split("=") for part in fingerprint_of(own_task(**changed)).split())
  assert now["own"] != before["own"]
  assert now["decoding"] == before["decoding"]


@pytest.mark.parametrize("changed", [{"engine": "engine-2"}, {"max_new_tokens": 4}])
def test_a_fingerprint_changes_with_what_decoding_depends_on(own_task, changed):
  before = dict(part.split("=") for part in fingerprint_of(own_task()).split())
  now = dict(part.split("=") for part in fingerprint_of(own_task(), **changed).split())
  assert now["own"] == before["own"]
  assert now["decoding"] != before["decoding"]


def test_a_fingerprint_does_not_change_with_comments_other_splits_or_other_tasks(own_task):
  before = fingerprint_of(own_task())
  spaced = GRADER.replace("\nclass", "\n# a comment\n\n\nclass").replace(
    "outcome.value ==", "outcome.value  ==  # !\\\n"
  )
  assert spaced != GRADER
  assert fingerprint_of(own_task(spaced.replace("# !\\\n", ""))) == before
  assert fingerprint_of(own_task(questions=QUESTIONS | {"test": ["d", "e"]})) == before
  with_another = dict(part.split("=") for part in fingerprint_of(own_task(), others=[Echo("a b=c", 0)]).split())
  assert with_another["own"] == dict(part.split("=") for part in before.split())["own"]
  assert set(with_another) == {"own", "a_b_c", "decoding"}


def test_the_fingerprint_of_the_decoder_is_that_of_tokenizer_and_ends():
  before = LocalEngine(INTERFACE).fingerprint
  assert LocalEngine(INTERFACE, group_size=4, num_buckets=3).fingerprint == before
  for change in ({"end_ids": (2,)}, {"tokenizer": {"tokenizer.json": "{ }"}}):
    assert LocalEngine(dataclasses.replace(INTERFACE, **change)).fingerprint != before
  bigger = dataclasses.replace(CONFIG, rope_theta=CONFIG.rope_theta * 2)
  assert LocalEngine(dataclasses.replace(INTERFACE, config=bigger)).fingerprint != before


def test_requests_hold_what_was_said():
  request = Request((Message("user", "a"),), 3)
  assert (request.messages[0].role, request.messages[0].content, request.max_new_tokens) == ("user", "a", 3)


def test_answers_that_passed_come_back_with_the_scores():
  engine = Scripted(lambda number, request: request.messages[0].content[0] if number else "x")
  problem = TextProblem([Echo("one", 0), Echo("two", 1)], engine, echo, max_new_tokens=4, num_labels=3)
  individuals, space = numbered(0, 1)
  scored = problem.score("labels", individuals, space)
  assert scored.values.shape == (2, 2, 3)
  nothing, everything = scored.verified
  prompts = [[example.prompt for example in own] for own in problem.examples("labels")]
  assert nothing == []
  assert [(answer.task, answer.sample) for answer in everything] == [(k, b) for k in range(2) for b in range(3)]
  assert all(answer.turns == (prompts[answer.task][answer.sample][0],) for answer in everything)
  assert problem.fingerprint("labels") != problem.fingerprint("train")
  assert [len(own) for own in problem.examples("train")] == [5, 5]


def test_references_are_the_answers_that_came_with_the_questions():
  problem = TextProblem([Echo("one", 0), Chatter()], Scripted(lambda *_: ""), echo, max_new_tokens=4, num_labels=2)
  answers = [example.answer for example in problem.examples("labels")[0]]
  assert [(each.task, each.turns[0]) for each in problem.references("labels")] == [(0, answer) for answer in answers]


def test_what_cannot_be_learned_is_named():
  scripted = TextProblem([Echo("one", 0)], Scripted(lambda *_: ""), echo, max_new_tokens=4)
  with pytest.raises(ValueError, match="engine: Scripted has no gradients"):
    scripted.training_signal([Verified(0, 0, ("c",))])
  silent = TextProblem([Echo("one", 0)], LocalEngine(INTERFACE), echo, max_new_tokens=4)
  with pytest.raises(ValueError, match="no verified answer to any question of one"):
    silent.training_signal([])
  with pytest.raises(ValueError, match="interface: expected `encode_answer`"):
    silent.training_signal([Verified(0, 0, ("c",))])


def test_every_turn_of_a_dialogue_is_learned_after_what_was_said_before_it():
  learned = []

  class Listening(LocalEngine):
    def training_signal(self, dialogues):
      learned.extend(dialogues)
      return TrainingSignal((), lambda key, data: data, lambda params, batch: batch)

  problem = TextProblem([Chatter()], Listening(INTERFACE), echo, max_new_tokens=4)
  problem.training_signal([Verified(0, 1, ("a", "k"))])
  said = [("user", "ddf"), ("assistant", "a"), ("user", "hd"), ("assistant", "k")]
  assert learned == [[tuple(Message(*turn) for turn in said)]]
