"""The decoder in this process as an engine: who is asked what, groups that are filled up, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.engines import Candidates, Engine, LocalEngine, local
from cqd_jax.engines.text_interface import TextInterface, miniature_interface
from cqd_jax.genotypes.space import dense_space
from cqd_jax.models import DecoderConfig, forward, greedy_decode, init_params
from cqd_jax.tasks import Answer, Message, Request
from cqd_jax.tasks.episode import Likelihoods
from cqd_jax.tasks.skills.training import prompt_tokens
from cqd_jax.tasks.skills.vocabulary import SEPARATOR
from cqd_jax.tasks.skills.vocabulary import encode as encode_text

CONFIG = DecoderConfig(
  vocab_size=11, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4
)
END, PAD = 1, 0
LETTERS = "abcdefghijk"


def encode(messages):
  return [LETTERS.index(letter) for message in messages for letter in message.content]


def decode(tokens):
  return "".join(LETTERS[token] for token in tokens)


INTERFACE = TextInterface(CONFIG, encode, decode, (END,), PAD, {"tokenizer.json": "{}"})


run = jax.jit(forward, static_argnums=1)


def ask(text, max_new_tokens=6):
  return Request((Message("user", text),), max_new_tokens)


@pytest.fixture(scope="module")
def candidates():
  keys = jax.random.split(jax.random.key(0), 4)
  # Larger than at initialization, so that the models disagree.
  population = jax.tree.map(lambda leaf: leaf * 6, jax.vmap(lambda key: init_params(key, CONFIG))(keys))
  return Candidates(population, dense_space(jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), population), population))


@pytest.fixture(scope="module")
def answer(candidates):
  """What `greedy_decode` of the one request gives."""

  def one(candidate, request):
    params = jax.tree.map(lambda leaf: leaf[candidate], candidates.genotypes)
    asked = encode(request.messages)
    prompt = np.zeros((1, 8), np.int32)
    prompt[0, : len(asked)] = asked
    tokens, lengths = greedy_decode(
      params, CONFIG, jnp.asarray(prompt), jnp.array([len(asked)]), max_new_tokens=6, end_ids=(END,)
    )
    return decode(np.asarray(tokens)[0, : min(int(lengths[0]), request.max_new_tokens)].tolist())

  return one


REQUESTS = {
  "none of one": [[ask("c"), ask("ddf")], [], [ask("c")], [ask("ji"), ask("e"), ask("kcig")]],
  "as many, but others": [[ask("c")], [ask("d")], [ask("eeee")], [ask("f")]],
  "the same": [[ask("c"), ask("ddf"), ask("kcig")]] * 4,
  "of different lengths": [[ask("c", 1), ask("ddf", 6), ask("kcig", 3)]] * 4,
  "of different lengths by candidate": [[ask("c", size)] for size in (1, 6, 3, 6)],
}


@pytest.mark.parametrize(("name", "group_size"), [("none of one", 1), *((name, 3) for name in REQUESTS)])
def test_each_request_is_answered_as_if_it_were_the_only_one(candidates, answer, name, group_size):
  requests = REQUESTS[name]
  engine = LocalEngine(INTERFACE, group_size=group_size, num_buckets=2)
  expected = [[answer(candidate, request) for request in own] for candidate, own in enumerate(requests)]
  assert engine.generate(candidates, requests) == expected


def test_tokens_are_counted_with_the_end(candidates, answer):
  requests = [[ask("c"), ask("ddf", 3)], [ask("kcig")], [], [ask("e", 1)]]
  found = LocalEngine(INTERFACE, group_size=2).respond(candidates, requests)
  for candidate, (own, given) in enumerate(zip(requests, found, strict=True)):
    for request, each in zip(own, given, strict=True):
      text = answer(candidate, request)
      ended = len(text) < request.max_new_tokens  # by an end token, which was decoded as well
      assert each == Answer(text, len(request.messages[0].content), len(text) + ended)


@pytest.mark.parametrize("context", [4, 7, 1])
def test_a_dialogue_that_fills_the_context_is_refused_and_the_others_answered(candidates, answer, context):
  requests = [[ask("c"), ask("ddfeig"), ask("kcig", 2), ask("ddf")], [ask("kcig")], [], [ask("e")]]
  engine = LocalEngine(INTERFACE, group_size=2, context=context)
  for candidate, (own, given) in enumerate(zip(requests, engine.respond(candidates, requests), strict=True)):
    assert len(given) == len(own)
    for request, each in zip(own, given, strict=True):
      length = len(request.messages[0].content)
      if length >= context:
        assert each == Answer("", refused=f"the dialogue has {length} tokens, and the context {context}")
      else:
        assert each.text == answer(candidate, request)[: context - length]
        assert each.answer_tokens <= context - length
        assert not each.refused


def test_the_context_is_that_of_the_model_unless_another_is_set():
  limited = dataclasses.replace(INTERFACE, context=5)
  assert LocalEngine(limited).fingerprint == LocalEngine(INTERFACE, context=5).fingerprint
  assert LocalEngine(limited, context=9).fingerprint == LocalEngine(INTERFACE, context=9).fingerprint
  assert len({LocalEngine(INTERFACE, context=size).fingerprint for size in (None, 5, 9)}) == 3


def test_the_likelihood_of_a_choice_is_the_sum_over_its_tokens(candidates):
  interface = dataclasses.replace(INTERFACE, encode_answer=lambda messages, text: [*encode([Message("", text)]), END])
  many = tuple("cdefghij"[n % 8] * (1 + n // 8) for n in range(40))  # more than are read at a time
  asked = [[("ddf", ("c", "kk", "ddddd")), ("c", many)], [("kcig", ("e",))], [], [("ddf", ("kk", "c", "c"))]]
  requests = [[Request((Message("user", text),), 1, choices) for text, choices in own] for own in asked]
  engine = LocalEngine(interface, group_size=3, context=9)
  found = engine.likelihoods(candidates, requests)
  assert [len(own) for own in found] == [2, 1, 0, 1]
  for candidate, (own, given) in enumerate(zip(asked, found, strict=True)):
    for (text, choices), each in zip(own, given, strict=True):
      expected = [log_likelihood(candidates, candidate, text, one) for one in choices]
      np.testing.assert_allclose(each.values, expected, rtol=1e-4)
      assert each.prompt_tokens == sum(len(text) + len(one) for one in choices)
  (refused,), *_ = LocalEngine(interface, context=6).likelihoods(candidates, [[requests[0][0]], [], [], []])
  assert refused == Likelihoods((), refused="dialogue and choice have 8 tokens, and the context 6")
  with pytest.raises(ValueError, match="interface: expected `encode_answer`"):
    LocalEngine(INTERFACE).likelihoods(candidates, requests)


def log_likelihood(candidates, candidate, question, choice):
  params = jax.tree.map(lambda leaf: leaf[candidate], candidates.genotypes)
  before, after = (encode([Message("", text)]) for text in (question, choice))
  row = np.zeros((1, 10), np.int32)  # of one length, for which one program is compiled
  row[0, : len(before) + len(after)] = [*before, *after]
  logits = np.asarray(run(params, CONFIG, row), np.float64)[0]
  logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  return sum(logs[len(before) + index - 1, token] for index, token in enumerate(after))


def test_who_is_asked_nothing_says_nothing(candidates):
  engine = LocalEngine(INTERFACE)
  assert engine.generate(candidates, [[], [], [], []]) == [[], [], [], []]


def test_what_cannot_be_is_refused_by_name(candidates):
  for setting in ("candidates_per_batch", "prompt_buckets", "context"):
    with pytest.raises(ValueError, match=f"{setting}: expected at least 1, got 0"):
      local(INTERFACE, **{setting: 0})
  with pytest.raises(ValueError, match="requests: expected one list for each of 4 individuals, got 3"):
    LocalEngine(INTERFACE).generate(candidates, [[ask("c")]] * 3)


def test_it_is_an_engine_whose_settings_change_no_answer():
  engine = local(INTERFACE, candidates_per_batch=2, prompt_buckets=3)
  assert isinstance(engine, Engine)
  assert engine.fingerprint == local(INTERFACE).fingerprint


def test_a_dialogue_with_a_miniature_model_is_its_messages_each_with_a_separator():
  encode_dialogue = miniature_interface().encode
  one = encode_dialogue((Message("user", "add 1 to x"),))
  assert one == prompt_tokens("add 1 to x")
  assert one[-1] == SEPARATOR
  longer = encode_dialogue((Message("user", "add 1 to x"), Message("assistant", "x + 1"), Message("user", "x")))
  assert longer == [*one, *encode_text("x + 1"), SEPARATOR, *encode_text("x"), SEPARATOR]


def test_the_training_signal_is_the_cross_entropy_of_answers_task_by_task(candidates):
  interface = dataclasses.replace(INTERFACE, encode_answer=lambda messages, text: [*encode([Message("", text)]), END])
  talks = {
    "one": [[("user", "cd"), ("assistant", "e")], [("user", "k"), ("assistant", "ghi")]],
    "two": [[("user", "d"), ("assistant", "a"), ("user", "hd"), ("assistant", "kk")]],
  }
  dialogues = [[tuple(Message(*turn) for turn in talk) for talk in own] for own in talks.values()]
  signal = LocalEngine(interface).training_signal(dialogues)
  rows, counts = signal.data
  assert counts.tolist() == [1, 1]  # so that any batch holds just these rows
  params = jax.tree.map(lambda leaf: leaf[1], candidates.genotypes)
  losses = signal.loss(params, signal.draw(jax.random.key(0), signal.data))

  def cross_entropy(asked, answer):
    ids = [*encode([Message("", asked)]), *encode([Message("", answer)]), END]
    logits = np.asarray(forward(params, CONFIG, jnp.asarray([ids])), np.float64)[0]
    log = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return [-log[index - 1, ids[index]] for index in range(len(asked), len(ids))]

  expected = [
    np.mean(cross_entropy("cd", "e") + cross_entropy("k", "ghi")),
    np.mean(cross_entropy("d", "a") + cross_entropy("dahd", "kk")),
  ]
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  assert rows.loss_mask.sum() == 2 + 4 + 2 + 3
