"""Trains the miniature base model and its experts on the skills (no clocks, no files: pure but for a callback)."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import optax

from cqd_jax.models import Batch, DecoderConfig, TrainStep, init_params, make_optimizer, make_train_step, pack
from cqd_jax.tasks.skills.vocabulary import BEGIN, END, SEPARATOR, VOCABULARY_SIZE, encode
from cqd_jax.tasks.task import Example
from cqd_jax.types import Params, PRNGKey

MINIATURE = DecoderConfig(
  vocab_size=VOCABULARY_SIZE,
  hidden_size=128,
  intermediate_size=256,
  num_layers=2,
  num_heads=4,
  num_kv_heads=4,
  head_dim=32,
  rope_theta=1000.0,
)
"""The decoder of the miniature experts: 361,088 parameters."""

WARM_UP_STEPS = 20


def prompt_tokens(prompt: str) -> list[int]:
  """With what a model is asked: BEGIN, prompt, SEPARATOR."""
  return [BEGIN, *encode(prompt), SEPARATOR]


def pack_examples(examples: Sequence[Example], row_length: int) -> Batch:
  """Questions with their right answers as packed rows; only the answers and their ends are learnt."""
  asked = [prompt_tokens(example.prompt) for example in examples]
  answered = [[*encode(example.answer), END] for example in examples]
  sequences = [question + answer for question, answer in zip(asked, answered, strict=True)]
  masks = [[False] * len(question) + [True] * len(answer) for question, answer in zip(asked, answered, strict=True)]
  return pack(sequences, masks, row_length)


def shuffled_batches(rows: Batch, batch_size: int, seed: int) -> Iterator[Batch]:
  """Batches of packed rows for ever, every row once before any comes again."""
  generator = np.random.default_rng(seed)
  num_rows = len(rows.token_ids)
  if num_rows < batch_size:
    raise ValueError(f"rows: expected at least batch_size={batch_size} packed rows, got {num_rows}")
  while True:
    order = generator.permutation(num_rows)
    for start in range(0, num_rows - batch_size + 1, batch_size):
      chosen = order[start : start + batch_size]
      yield jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], rows)


def warm_up_cosine(peak: float, steps: int) -> Callable[[int], float]:
  """Learning rate by step: linear warm-up, then a cosine to zero at `steps`."""
  schedule = optax.warmup_cosine_decay_schedule(0.0, peak, min(WARM_UP_STEPS, steps - 1), steps)
  return lambda step: float(schedule(step + 1))


def train(
  params: Params,
  batches: Iterator[Batch],
  *,
  steps: int,
  learning_rate: Callable[[int], float],
  train_step: TrainStep,
  optimizer: optax.GradientTransformation,
  finished: Callable[[int, Params], bool],
) -> Params:
  """Takes up to `steps` steps of AdamW from `params`, which stay as they are.

  Args:
    params: where to start.
    batches: packed rows.
    steps: the most steps to take.
    learning_rate: by step.
    train_step: of `make_train_step`, shared so that it is compiled once.
    optimizer: what `train_step` was made with.
    finished: called after each step with the number of steps taken and the params; True ends training.
  """
  params = jax.tree.map(lambda leaf: leaf.copy(), params)  # the step donates what it is given
  state = optimizer.init(params)
  for step in range(steps):
    params, state, _ = train_step(params, state, next(batches), np.float32(learning_rate(step)))
    if finished(step + 1, params):
      break
  return params


class Trainer:
  """Trains models of one configuration with one compiled step.

  Args:
    config: the decoder.
    batch_size: packed rows per batch.
    row_length: tokens per row.
  """

  def __init__(self, config: DecoderConfig, *, batch_size: int, row_length: int):
    self._config = config
    self._batch_size = batch_size
    self._row_length = row_length
    self._optimizer = make_optimizer()
    self._step = make_train_step(config, self._optimizer)

  def init(self, key: PRNGKey) -> Params:
    """Random params."""
    return init_params(key, self._config)

  def fit(
    self,
    params: Params,
    examples: Sequence[Example],
    *,
    steps: int,
    schedule_steps: int,
    peak: float,
    seed: int,
    finished: Callable[[int, Params], bool] = lambda steps, params: False,
  ) -> Params:
    """Trains on examples; arguments as in `train`, the cosine reaching zero at `schedule_steps`."""
    rows = pack_examples(examples, self._row_length)
    return train(
      params,
      shuffled_batches(rows, self._batch_size, seed),
      steps=steps,
      learning_rate=warm_up_cosine(peak, schedule_steps),
      train_step=self._step,
      optimizer=self._optimizer,
      finished=finished,
    )
