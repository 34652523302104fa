"""The decoder in this process: candidates decoded group by group, greedily, with one program whatever their number."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cqd_jax.engines.text_interface import TextInterface
from cqd_jax.genotypes.placement import over_population
from cqd_jax.genotypes.space import Candidates
from cqd_jax.low_rank import combine_shared, partition_shared
from cqd_jax.models import Batch, PromptBucket, bucket_population_prompts, bucket_prompts, decode_population, pack
from cqd_jax.models.likelihood import continuation_likelihoods
from cqd_jax.models.training import losses_of_groups
from cqd_jax.tasks.episode import Answer, Engine, Likelihoods, Message, Request
from cqd_jax.tasks.problem import TrainingSignal
from cqd_jax.types import Params, PRNGKey

LEAST_ROW, ROWS_PER_TASK = 96, 6
"""Of what gradients follow: tokens that a packed row has at least, and rows of each task in a batch."""

ROWS_READ = 32
"""Choices that are read at a time, to say how likely they are."""

ROWS_ROUNDED_TO, TOKENS_ROUNDED_TO = 8, 16
"""Of prompts that differ by candidate: shapes are rounded up so far, so that few programs are compiled."""


def local(
  interface: TextInterface,
  *,
  candidates_per_batch: int = 1,
  prompt_buckets: int = 6,
  context: int | None = None,
  mesh: Mesh | None = None,
) -> Engine:
  """The decoder in this process.

  Args:
    interface: tokenizer and decoder of all models.
    candidates_per_batch: candidates decoded together. 1 is fastest on a CPU for models that fit its cache; more pay on
      an accelerator, and where candidates share the base's weights.
    prompt_buckets: buckets of similar length into which questions are divided, so that short ones do not pay for long
      ones.
    context: tokens that a dialogue and its next answer may have together. A longer dialogue has failed, and an answer
      ends where it is full. Not given: what the model's config.json calls `max_position_embeddings`.
    mesh: the devices of the run.
  """
  return LocalEngine(interface, group_size=candidates_per_batch, num_buckets=prompt_buckets, context=context, mesh=mesh)


class _Prompt(NamedTuple):
  """A request as tokens.

  Attributes:
    tokens: of the dialogue so far.
    wanted: tokens that the answer may have.
    room: of these, what the context has room for; below 1: none.
  """

  tokens: tuple[int, ...]
  wanted: int
  room: int


class _Continuation(NamedTuple):
  """A choice as tokens, and the dialogue before it."""

  before: tuple[int, ...]
  after: tuple[int, ...]


class LocalEngine:
  """Greedy decoding with all candidates' prompts in one batch; see `cqd_jax.models.decoding`.

  Only `group_size` candidates are written out at a time. The last group is filled up with a candidate that it has, so
  that any number of them runs the same compiled program.

  Args:
    interface: tokenizer and decoder of all models.
    group_size: candidates decoded together.
    num_buckets: buckets of prompts of similar length.
    context: tokens of prompt and answer together; None: the interface's.
    mesh: divides a group over its `population` axis; None: one device.

  Raises:
    ValueError: naming the argument that is below 1, or a group that the mesh does not divide.
  """

  def __init__(
    self,
    interface: TextInterface,
    *,
    group_size: int = 1,
    num_buckets: int = 1,
    context: int | None = None,
    mesh: Mesh | None = None,
  ):
    for name, value in (
      ("candidates_per_batch", group_size),
      ("prompt_buckets", num_buckets),
      ("context", context),
    ):
      if value is not None and value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    if mesh is not None and group_size % mesh.shape["population"]:
      raise ValueError(
        f"candidates_per_batch: expected a multiple of mesh.population={mesh.shape['population']}, got {group_size}; "
        "devices would repeat each other's work"
      )
    self._interface = interface
    self._group_size = group_size
    self._num_buckets = num_buckets
    self._mesh = mesh
    self._shared_buckets = functools.lru_cache(maxsize=16)(self._bucket)
    self._encoded: dict[tuple[Message, ...], tuple[int, ...]] = {}
    self._context = interface.context if context is None else context
    self.fingerprint = interface.fingerprint if self._context is None else f"{interface.fingerprint}-{self._context}"

  def generate(self, individuals: Candidates, requests: Sequence[Sequence[Request]]) -> list[list[str]]:
    """See `Engine`; raises as `respond`."""
    return [[answer.text for answer in own] for own in self.respond(individuals, requests)]

  def respond(self, individuals: Candidates, requests: Sequence[Sequence[Request]]) -> list[list[Answer]]:
    """See `CountingEngine`: a prompt that fills the context is refused.

    Raises:
      ValueError: if there is not one list of requests for each individual, or a dialogue cannot be written as tokens.
    """
    if len(requests) != individuals.size:
      raise ValueError(f"requests: expected one list for each of {individuals.size} individuals, got {len(requests)}")
    prompts = [[self._prompt(request) for request in own] for own in requests]
    asked = [[prompt for prompt in own if prompt.room > 0] for own in prompts]
    given = [iter(own) for own in self._decode(individuals, asked)]
    return [
      [next(answers) if prompt.room > 0 else self._refused(prompt) for prompt in own]
      for own, answers in zip(prompts, given, strict=True)
    ]

  def _prompt(self, request: Request) -> "_Prompt":
    tokens = self._encode(request.messages)
    wanted = request.max_new_tokens
    return _Prompt(tokens, wanted, wanted if self._context is None else min(wanted, self._context - len(tokens)))

  def _refused(self, prompt: "_Prompt") -> Answer:
    return Answer("", refused=f"the dialogue has {len(prompt.tokens)} tokens, and the context {self._context}")

  def _decode(self, individuals: Candidates, asked: Sequence[Sequence["_Prompt"]]) -> list[list[Answer]]:
    """Group by group."""
    same = all(own == asked[0] for own in asked[1:])
    answers: list[list[Answer]] = []
    for start in range(0, individuals.size, self._group_size):
      group = range(start, min(start + self._group_size, individuals.size))
      if not any(asked[index] for index in group):  # all that these were asked is answered
        answers += [[] for _ in group]
        continue
      filled = [*group, *[group[0]] * (self._group_size - len(group))]
      params = self._place(individuals.params_of(filled))
      answers += self._answer(params, [asked[index] for index in filled], shared=same)[: len(group)]
    return answers

  def likelihoods(self, individuals: Candidates, requests: Sequence[Sequence[Request]]) -> list[list[Likelihoods]]:
    """See `ChoosingEngine`. What ends an answer does not count; of a chat template the model's turn does.

    Raises:
      ValueError: as `respond`; if answers cannot be written as tokens.
    """
    if len(requests) != individuals.size:
      raise ValueError(f"requests: expected one list for each of {individuals.size} individuals, got {len(requests)}")
    asked = [[self._continuations(request) for request in own] for own in requests]
    found: list[list[Likelihoods]] = []
    for start in range(0, individuals.size, self._group_size):
      group = range(start, min(start + self._group_size, individuals.size))
      params = individuals.params_of([*group, *[group[0]] * (self._group_size - len(group))])
      distinct = list(dict.fromkeys(row for index in group for own in asked[index] for row in own if self._fits(row)))
      known = [dict(zip(distinct, own, strict=True)) for own in self._likelihoods(self._place(params), distinct)]
      found += [
        [self._likelihood(continuations, known[place]) for continuations in asked[index]]
        for place, index in enumerate(group)
      ]
    return found

  def _continuations(self, request: Request) -> "list[_Continuation]":
    encode_answer = self._interface.encode_answer
    if encode_answer is None:
      raise ValueError("interface: expected `encode_answer`, by which answers become tokens")
    tokens = self._encode(request.messages)
    ends = [tuple(encode_answer(request.messages, choice)) for choice in request.choices]
    return [_Continuation(tokens, end[:-1] if end and end[-1] in self._interface.end_ids else end) for end in ends]

  def _fits(self, row: "_Continuation") -> bool:
    return self._context is None or len(row.before) + len(row.after) <= self._context

  def _likelihood(self, continuations: "list[_Continuation]", known: "dict[_Continuation, float]") -> Likelihoods:
    longest = max(len(row.before) + len(row.after) for row in continuations)
    if not all(map(self._fits, continuations)):
      return Likelihoods((), refused=f"dialogue and choice have {longest} tokens, and the context {self._context}")
    read = sum(len(row.before) + len(row.after) for row in continuations)
    return Likelihoods(tuple(known[row] for row in continuations), read)

  def _likelihoods(self, params: Params, rows: "list[_Continuation]") -> list[list[float]]:
    """Of each candidate of a group those of all rows, which are read in batches of like length."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].before) + len(rows[index].after))
    found: list[list[float]] = [[0.0] * len(rows) for _ in range(self._group_size)]
    for start in range(0, len(rows), ROWS_READ):
      chosen = order[start : start + ROWS_READ]
      filled = [rows[index] for index in [*chosen, *[chosen[0]] * (ROWS_READ - len(chosen))]]
      begins = np.array([len(row.before) for row in filled], np.int32)
      ends = begins + np.array([len(row.after) for row in filled], np.int32)
      width, longest = (
        -(-int(size) // TOKENS_ROUNDED_TO) * TOKENS_ROUNDED_TO for size in (ends.max(), (ends - begins).max())
      )
      token_ids = np.full((ROWS_READ, width), self._interface.pad_id, np.int32)
      for place, row in enumerate(filled):
        token_ids[place, : ends[place]] = [*row.before, *row.after]
      values = continuation_likelihoods(params, self._interface.config, token_ids, begins, ends, longest=longest)
      for own, theirs in zip(found, np.asarray(values).tolist(), strict=True):
        for index, value in zip(chosen, theirs, strict=False):  # rows beyond those chosen are filling
          own[index] = value
    return found

  def training_signal(self, dialogues: Sequence[Sequence[tuple[Message, ...]]]) -> TrainingSignal:
    """See `TrainableEngine`: cross-entropy of the assistant's turns, in packed rows drawn at random.

    Raises:
      ValueError: if a dialogue cannot be written as tokens.
    """
    if self._interface.encode_answer is None:
      raise ValueError("interface: expected `encode_answer`, by which answers become tokens to be learned")
    sequences = [[self._turns(dialogue) for dialogue in own] for own in dialogues]
    flat = [[turn for turns in own for turn in turns] for own in sequences]
    longest = max(len(asked) + len(answer) for own in flat for asked, answer in own)
    row_length = max(-(-longest // TOKENS_ROUNDED_TO) * TOKENS_ROUNDED_TO, LEAST_ROW)
    packed = [
      pack(
        [[*asked, *answer] for asked, answer in own],
        [[False] * len(asked) + [True] * len(answer) for asked, answer in own],
        row_length,
      )
      for own in flat
    ]
    rows = jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)), *packed)
    sizes = [len(own.token_ids) for own in packed]
    config = self._interface.config

    def draw(key: PRNGKey, data: tuple[Batch, jax.Array]) -> Batch:
      rows, counts = data
      drawn = jax.random.randint(key, (len(sizes), ROWS_PER_TASK), 0, counts[:, None])
      chosen = (drawn + (jnp.cumsum(counts) - counts)[:, None]).reshape(-1)
      batch: Batch = jax.tree.map(lambda leaf: leaf[chosen], rows)
      return batch

    def loss(params: Params, batch: Batch) -> jax.Array:
      return losses_of_groups(params, config, batch, len(sizes))

    return TrainingSignal((rows, jnp.asarray(sizes)), draw, loss)

  def _turns(self, dialogue: tuple[Message, ...]) -> list[tuple[list[int], list[int]]]:
    """For each of the assistant's turns the tokens before it and its own."""
    encode, encode_answer = self._interface.encode, self._interface.encode_answer
    assert encode_answer is not None
    return [
      (encode(dialogue[:index]), encode_answer(dialogue[:index], message.content))
      for index, message in enumerate(dialogue)
      if message.role == "assistant"
    ]

  def _answer(self, params: Params, asked: Sequence[Sequence["_Prompt"]], *, shared: bool) -> list[list[Answer]]:
    if shared:
      buckets = self._shared_buckets(tuple(prompt.tokens for prompt in asked[0]))
    else:
      buckets = self._own_buckets([[prompt.tokens for prompt in own] for own in asked])
    tokens, lengths = decode_population(
      params,
      self._interface.config,
      buckets,
      max_new_tokens=max(prompt.wanted for own in asked for prompt in own),
      end_ids=self._interface.end_ids,
      pad_id=self._interface.pad_id,
      group_size=len(asked),
    )
    rows, ends = np.asarray(tokens).tolist(), np.asarray(lengths).tolist()
    return [
      [
        Answer(self._interface.decode(row[: min(end, prompt.room)]), len(prompt.tokens), min(end + 1, prompt.room))
        for row, end, prompt in zip(own, own_ends, prompts, strict=False)  # rows beyond the requests are filling
      ]
      for own, own_ends, prompts in zip(rows, ends, asked, strict=True)
    ]

  def _bucket(self, prompts: tuple[tuple[int, ...], ...]) -> list[PromptBucket]:
    return bucket_prompts(prompts, num_buckets=self._num_buckets, pad_id=self._interface.pad_id)

  def _own_buckets(self, prompts: list[list[tuple[int, ...]]]) -> list[PromptBucket]:
    """Buckets of prompts that differ by candidate; who has fewer than others repeats the shortest of all."""
    most = max(map(len, prompts))
    rows = -(-most // ROWS_ROUNDED_TO) * ROWS_ROUNDED_TO
    shortest = min((prompt for own in prompts for prompt in own), key=len)
    filled = [[*own, *[shortest] * (rows - len(own))] for own in prompts]

    return bucket_population_prompts(
      filled, num_buckets=1, pad_id=self._interface.pad_id, multiple_of=TOKENS_ROUNDED_TO
    )

  def _encode(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
    if messages not in self._encoded:
      if len(self._encoded) > 100_000:
        self._encoded.clear()
      self._encoded[messages] = tuple(self._interface.encode(messages))
    return self._encoded[messages]

  def _place(self, params: Params) -> Params:
    """The group over the mesh, if there is one; what candidates share stays where it is."""
    if self._mesh is None:
      return params
    own, shared = partition_shared(params)
    placed: Any = jax.device_put(own, over_population(self._mesh))
    return combine_shared(placed, shared)
