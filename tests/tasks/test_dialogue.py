"""What dialogues take is counted, what they were is kept in bounds, and what cannot go on has failed with a reason."""

import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.genotypes.space import dense_space
from cqd_jax.tasks import Answer, Example, Harness, Job, Message, Outcome, TextProblem, Transcript, Usage
from cqd_jax.tasks.dialogue import LONGEST_TEXT, MOST_TURNS
from cqd_jax.tasks.problem import Transcribed


class Counting:
  """A number is right if it is that of the question; answers of "run N" give N, and "stop" is a wrong end.

  An answer that cannot be executed ends the dialogue.
  """

  name = "counting"
  harness = Harness("counting", "run = int")
  max_turns = 3

  def __init__(self, numbers=(1, 2, 3, 4)):
    self.numbers = numbers

  def examples(self, split):
    return [Example(f"say {number}", f"{number}", expected=number) for number in self.numbers]

  def opening(self, example):
    shot = (Message("user", "say 0"), Message("assistant", "0"))
    return (Message("system", "count"), *shot, Message("user", example.prompt))

  def job(self, example, answers):
    return Job("counting", answers[-1].removeprefix("run ")) if answers[-1] != "stop" else None

  def action(self, example, answers):
    return answers[-1].removeprefix("run ").upper()

  def reply(self, example, answers, outcome):
    if outcome.status != "ok" or answers[-1] == "stop":
      return 0.0
    if answers[-1].startswith("run "):
      return Message("user", f"it is {outcome.value}")
    return float(outcome.value == example.expected)


def execute(jobs):
  return [
    Outcome("ok", int(job.payload)) if job.payload.isdigit() else Outcome("error", detail="no number") for job in jobs
  ]


class Counted:
  """Answers by the number of the question and the turn, counts letters as tokens, and has room for some."""

  fingerprint = "counted"

  def __init__(self, answers, room=10**9):
    self.answers, self.room, self.asked = answers, room, []

  def generate(self, individuals, requests):
    raise AssertionError("it can do more")

  def respond(self, individuals, requests):
    self.asked.append(requests)
    return [[self.one(request) for request in own] for own in requests]

  def one(self, request):
    length = sum(len(message.content) for message in request.messages)
    if length > self.room:
      return Answer("", refused="too long")
    number = int(request.messages[3].content.removeprefix("say "))
    text = self.answers[number][(len(request.messages) - 4) // 2]
    return Answer(text, length, len(text))


def score(engine, episode, count=4, size=1):
  experts = {"w": jnp.zeros((size, 1))}
  problem = TextProblem([episode], engine, execute, max_new_tokens=7, transcripts={"test": count})
  return problem, problem.score("test", experts, dense_space({"w": jnp.zeros(1)}, experts))


OPENING = (("system", "count"), ("user", "say 0"), ("assistant", "0"))
SAID = {1: ["run 5", "1"], 2: ["run x"], 3: ["stop"], 4: ["run 1", "run 2", "run 3"]}
TALKS = [
  (1, "say 2", "M run x", "E X\nerror: no number"),
  (2, "say 3", "M stop"),
  (3, "say 4", "M run 1", "E 1", "it is 1", "M run 2", "E 2", "it is 2", "M run 3", "E 3"),
  (0, "say 1", "M run 5", "E 5", "it is 5", "M 1", "E 1"),
]
ROLES = {"M": "assistant", "E": "executed"}


def turn_of(text):
  marked = text[:2] in ("M ", "E ")
  return (ROLES[text[0]], text[2:]) if marked else ("user", text)


EXPECTED = [
  Transcript(0, sample, (*OPENING, *map(turn_of, talk)), float(sample == 0), reason)
  for (sample, *talk), reason in zip(TALKS, ("error: no number", "", "no end after 3 turns", ""), strict=True)
]


def test_a_transcript_has_what_was_said_executed_and_heard_and_why_it_failed():
  problem, scored = score(Counted(SAID), Counting(), size=2)
  assert list(scored.transcripts) == [EXPECTED, EXPECTED]
  assert isinstance(problem, Transcribed)
  samples = problem.shown("test", EXPECTED, 4)
  assert [sample.turns for sample in samples] == [each.turns for each in EXPECTED]
  assert [(sample.prompt, sample.gold, sample.answer, sample.reason) for sample in samples[1:3]] == [
    ("say 3", "3", "stop", ""),
    ("say 4", "4", "run 3", "no end after 3 turns"),
  ]
  assert problem.shown("test", EXPECTED[:3], 4) is None
  assert problem.shown("test", EXPECTED, 9) is not None  # of four questions there are no more


@pytest.mark.parametrize(("count", "chosen"), [(0, []), (1, [0]), (2, [1, 0]), (3, [1, 2, 0]), (9, [1, 2, 3, 0])])
def test_as_many_are_kept_as_are_wanted_half_of_them_failures(count, chosen):
  _, scored = score(Counted(SAID), Counting(), count)
  assert [each.sample for own in scored.transcripts for each in own] == chosen


def test_turns_and_tokens_are_counted():
  _, scored = score(Counted(SAID), Counting(), size=2)
  opening = len("count") + len("say 0") + 1 + len("say 1")
  again = opening + len("run 5") + len("it is 5")
  reads = [opening, again, opening, opening, opening, again, again + len("run 5") + len("it is 5")]
  assert list(scored.usage) == [Usage(7, sum(reads), 5 + 1 + 5 + 4 + 15)] * 2
  problem, scored = score(Uncounted(), Counting(), size=1)
  assert list(scored.usage) == [Usage(4, 0, 0)]
  assert problem.decoded_tokens == 0


class Uncounted:
  fingerprint = "uncounted"

  def generate(self, individuals, requests):
    return [["1" for _ in own] for own in requests]


def test_a_dialogue_that_the_engine_refuses_has_failed_and_the_others_go_on():
  engine = Counted({**SAID, 1: ["run 5", "1"]}, room=len("countsay 00say 1"))
  _, scored = score(engine, Counting())
  np.testing.assert_array_equal(scored.values[0, 0], [0, 0, 0, 0])
  reasons = {each.sample: each.reason for each in scored.transcripts[0]}
  assert reasons == {0: "too long", 1: "error: no number", 2: "", 3: "too long"}
  by_sample = {each.sample: each for each in scored.transcripts[0]}
  assert by_sample[0].turns[-1] == ("user", "it is 5")
  assert scored.usage[0].turns == 4
  assert scored.verified == [[]]
  _, scored = score(Counted(SAID, room=3), Counting())
  assert [(each.turns[-1], each.reason) for each in scored.transcripts[0]] == [
    (("user", f"say {number}"), "too long") for number in (1, 2, 3, 4)
  ]
  assert scored.usage[0] == Usage(0, 0, 0)


def test_an_episode_may_say_how_long_its_answers_are():
  class Short(Counting):
    max_new_tokens = 3

  limits = set()
  for episode in (Counting(), Short()):
    engine = Counted(SAID)
    problem, _ = score(engine, episode)
    limits |= {(problem.fingerprint("test"), request.max_new_tokens) for own in engine.asked[0] for request in own}
  assert sorted(limit for _, limit in limits) == [3, 7]
  assert len({fingerprint for fingerprint, _ in limits}) == 2


def test_what_is_kept_is_bounded():
  class Endless(Counting):
    max_turns = 100

    def reply(self, example, answers, outcome):
      return Message("user", "y" * 10**5)

  _, scored = score(Counted({7: [f"{turn} " + "x" * 10**6 for turn in range(100)]}), Endless((7,)))
  ((kept,),) = scored.transcripts
  assert len(kept.turns) == MOST_TURNS + 1
  assert kept.turns[MOST_TURNS // 2] == ("", f"[{4 + 100 + 99 + 100 - MOST_TURNS} left out]")
  assert max(len(text) for _, text in kept.turns) < LONGEST_TEXT + 50
  assert kept.turns[4][1].startswith("0 xxx")
  assert "characters left out" in kept.turns[4][1]
