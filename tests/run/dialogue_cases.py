"""Small episodes of several turns with long prompts, and a random Llama of Hugging Face's files to play them."""

import json

import jax
import numpy as np
import tokenizers
import transformers

from cqd_jax.hub.save import save_pretrained
from cqd_jax.models import DecoderConfig, init_params
from cqd_jax.tasks import Example, Harness, Job, Message

TEMPLATE = (
  "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["</s>", "<|system|>", "<|user|>", "<|assistant|>"]


class Talk:
  """Any answer is executed and shown, until the last turn; a number of letters is asked for."""

  def __init__(self, name, turns, words, sizes):
    self.name, self.max_turns, self.words, self.sizes = name, turns, words, sizes
    self.harness = Harness(f"talk_{name}", "def run(payload):\n  return [len(text) for text in payload]")

  def examples(self, split):
    begin = {"train": 0, "validation": 1000, "test": 2000}[split]
    # the last of each split is longer than the context
    lengths = [self.words] * (self.sizes[split] - 1) + [1500]
    return [Example(f"{self.name} {begin + n}: " + "say something " * length, "a") for n, length in enumerate(lengths)]

  def opening(self, example):
    return (Message("system", f"You are {self.name}."), Message("user", example.prompt))

  def job(self, example, answers):
    return Job(self.harness.name, list(answers)) if answers[-1] else None

  def action(self, example, answers):
    return f"count {len(answers)}"

  def reply(self, example, answers, outcome):
    return 0.25 if len(answers) == self.max_turns else Message("user", f"letters so far: {outcome.value}")


def one_turn(*, sizes, seed):
  """A plug."""
  return Talk("one", 1, 10, sizes)


def two_turns(*, sizes, seed):
  """A plug."""
  return Talk("two", 2, 5, sizes)


def write_tokenizer(folder, texts=("a few words",)):
  """A byte-level tokenizer with a chat template, trained on texts, which it writes with few tokens."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=3000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
  )
  backend.train_from_iterator(texts, trainer)
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
  )
  tokenizer.save_pretrained(folder)
  return tokenizer


def write_models(folder, texts, experts=2, context=512):
  """A base and experts, all random."""
  tokenizer = write_tokenizer(folder / "tokenizer", texts)
  files = {path.name: path.read_text() for path in (folder / "tokenizer").iterdir()}
  config = DecoderConfig(len(tokenizer), 16, 16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
  settings = {"eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": context}
  shapes = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
  names = ["base", *(f"expert-{number}" for number in range(experts))]
  base = None
  for seed, name in enumerate(names):
    chance = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda leaf: chance.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)  # noqa: B023
    base = drawn if base is None else base
    params = drawn if seed == 0 else jax.tree.map(lambda own, other: own + 0.5 * other, base, drawn)
    save_pretrained(folder / name, params, config, files, settings=settings, generation=settings)
  assert json.loads((folder / "base" / "config.json").read_text())["max_position_embeddings"] == context
  return folder / "base", tuple(folder / name for name in names[1:])
