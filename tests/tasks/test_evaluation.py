"""A population's answers are those of each model to each question, whatever the buckets and groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.models import DecoderConfig, greedy_decode, init_params
from cqd_jax.tasks import Example, Harness, Job, Outcome
from cqd_jax.tasks.evaluation import Evaluation

CONFIG = DecoderConfig(
  vocab_size=11, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4
)
END, PAD = 1, 0


class Echo:
  """Questions are rows of digits; an answer passes if it begins with the question's first digit."""

  harness = Harness("echo", "run = str")

  def __init__(self, name, seed):
    self.name = name
    generator = np.random.default_rng(seed)
    self._prompts = ["".join(map(str, generator.integers(2, 9, generator.integers(1, 7)))) for _ in range(5)]

  def examples(self, split):
    assert split == "validation"
    return [Example(prompt, prompt[0]) for prompt in self._prompts]

  def job(self, example, answer):
    return Job("echo", answer)

  def passed(self, example, outcome):
    return outcome.status == "ok" and str(outcome.value).startswith(example.answer)


def encode(text):
  return [int(digit) + 2 for digit in text]


def decode(tokens):
  return "".join(f"{token}," for token in tokens)


def execute(jobs):
  return [Outcome("ok", job.payload) for job in jobs]


@pytest.fixture(scope="module")
def population():
  keys = jax.random.split(jax.random.key(0), 4)
  # Larger than at initialization, so that the models disagree.
  return jax.tree.map(lambda leaf: leaf * 6, jax.vmap(lambda key: init_params(key, CONFIG))(keys))


def expected_answers(population, tasks):
  answers = []
  for candidate in range(4):
    params = jax.tree.map(lambda leaf, i=candidate: leaf[i], population)
    by_task = []
    for task in tasks:
      texts = []
      for example in task.examples("validation"):
        prompt = np.zeros((1, 8), np.int32)
        prompt[0, : len(example.prompt)] = encode(example.prompt)
        tokens, lengths = greedy_decode(
          params, CONFIG, jnp.asarray(prompt), jnp.array([len(example.prompt)]), max_new_tokens=6, end_ids=(END,)
        )
        texts.append(decode(np.asarray(tokens)[0, : int(lengths[0])].tolist()))
      by_task.append(texts)
    answers.append(by_task)
  return answers


@pytest.mark.parametrize(("group_size", "num_buckets"), [(1, 1), (1, 3), (8, 2)])
def test_answers_come_back_in_their_places(population, group_size, num_buckets):
  tasks = [Echo("a", 0), Echo("b", 1)]
  evaluation = Evaluation(
    tasks,
    "validation",
    encode=encode,
    decode=decode,
    config=CONFIG,
    execute=execute,
    max_new_tokens=6,
    end_ids=(END,),
    pad_id=PAD,
    group_size=group_size,
    num_buckets=num_buckets,
  )
  expected = expected_answers(population, tasks)
  assert len({text for candidate in expected for texts in candidate for text in texts}) > 8
  assert evaluation.answer(population) == expected
  passed = evaluation(population)
  assert passed.shape == (4, 2, 5)
  for p, k, b in np.ndindex(4, 2, 5):
    prompt = tasks[k].examples("validation")[b].prompt
    assert passed[p, k, b] == expected[p][k][b].startswith(prompt[0])
  assert evaluation.task_names == ["a", "b"]
