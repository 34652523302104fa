"""Small random models of transformers, one for each mix of features, and what PyTorch computes with them."""

import functools
import shlex
import subprocess
import sys

import jax
import numpy as np
import tokenizers
import torch
import transformers

from cqd_jax.hub.load import load_pretrained
from cqd_jax.models import forward

# Of few equal sizes, or a tensor in a wrong place could have the right shape.
SIZES = {
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 44,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "max_position_embeddings": 100_000,
}

LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}

GROUPED = {"num_key_value_heads": 2}
TIED = {"tie_word_embeddings": True}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}


def rope(theta, scaling=None):
  return {"rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})}}


CASES = {
  "llama": ("Llama", rope(10_000.0)),
  "llama_grouped_scaled_tied": ("Llama", GROUPED | TIED | {"head_dim": 12} | rope(5000.0, LLAMA3)),
  "llama_biases": ("Llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True} | rope(500.0)),
  "llama_mlp_bias": ("Llama", {"mlp_bias": True, "rms_norm_eps": 1e-3}),
  "llama_attention_bias_scaled": ("Llama", {"attention_bias": True} | rope(500_000.0, LLAMA3)),
  "mistral": ("Mistral", {"sliding_window": None} | TIED | rope(1e6)),
  "mistral_window": ("Mistral", GROUPED | {"sliding_window": 5, "head_dim": 6} | rope(300.0)),
  "mistral_window_scaled": ("Mistral", {"sliding_window": 9} | rope(5000.0, LLAMA3)),
  "qwen2": ("Qwen2", GROUPED | TIED | rope(1e6)),
  "qwen2_window_scaled": ("Qwen2", SLIDING | rope(5000.0, LLAMA3)),
  "qwen3": ("Qwen3", GROUPED | {"head_dim": 12} | rope(1e6)),
  "qwen3_biases_window_tied": ("Qwen3", SLIDING | TIED | {"head_dim": 8, "attention_bias": True}),
  "qwen3_scaled": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 10} | rope(5000.0, LLAMA3)),
}
"""The family, and its settings beside `SIZES`."""

torch.set_num_threads(1)  # more would wait for one another: the models are tiny
transformers.utils.logging.disable_progress_bar()
run = jax.jit(forward, static_argnums=1)


def follow(message):
  """Runs the command that a message advises, as a shell would."""
  program = shlex.split(message.partition("installed: ")[2])
  assert program[:2] == ["python", "-c"]
  subprocess.run([sys.executable, *program[1:]], check=True, capture_output=True)


def make_model(name, dtype=torch.float32, **changes):
  """A model in which no norm is 1 and no bias 0, and whose logits are of scale 5."""
  family, settings = CASES[name]
  config_class, model_class = (getattr(transformers, family + kind) for kind in ("Config", "ForCausalLM"))
  unending = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
  config = config_class(**(SIZES | unending | settings | changes), attn_implementation="eager")
  model = model_class(config).eval()
  source = np.random.default_rng(list(CASES).index(name))
  # A tied model whose layers do not outweigh its embedding says what it has just read.
  louder = 10 if config.tie_word_embeddings else 1
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      values = source.standard_normal(parameter.shape)
      if "norm" in key:
        values = (1 + 0.3 * values) * (louder if key == "model.norm.weight" else 1)
      elif key.endswith("bias"):
        values *= 0.3
      elif "embed_tokens" in key or "lm_head" in key:
        values *= 5 / louder / np.sqrt(config.hidden_size)
      else:
        values *= 1.2 / np.sqrt(parameter.shape[1])
      parameter.copy_(torch.from_numpy(values))
  return model.to(dtype)


def save_model(model, folder, max_shard_size="5GB"):
  """Written by transformers; returns the folder."""
  model.save_pretrained(folder, max_shard_size=max_shard_size)
  return folder


def random_tokens(*shape, seed=0, vocab_size=SIZES["vocab_size"]):
  return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)


def ragged_mask(length=24):
  """`[4, length]`: no padding, padding on the left, on the right, and on the left of a single token."""
  mask = np.ones((4, length), np.int32)
  mask[1, : length // 3] = 0
  mask[2, -length // 2 :] = 0
  mask[3, :-1] = 0
  return mask


def torch_logits(model, token_ids, mask=None, positions=None):
  """`[B, T, V]`; positions are counted without the padding."""
  mask = np.ones(token_ids.shape, np.int32) if mask is None else mask
  positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0) if positions is None else positions
  with torch.no_grad():
    return model(
      input_ids=torch.from_numpy(token_ids.astype(np.int64)),
      attention_mask=torch.from_numpy(mask.astype(np.int64)),
      position_ids=torch.from_numpy(positions.astype(np.int64)),
      use_cache=False,
    ).logits.numpy()


@functools.cache
def tokens_and_mask():
  mask = ragged_mask()
  return random_tokens(*mask.shape), mask


def both_logits(model, params, config):
  """Logits of PyTorch and of `forward` at every token of ragged rows, `[tokens, V]`."""
  token_ids, mask = tokens_and_mask()
  found = np.asarray(run(params, config, token_ids, attention_mask=mask))
  assert np.isfinite(found).all()
  return torch_logits(model, token_ids, mask)[mask == 1], found[mask == 1]


def largest_error(name, folder, max_shard_size="5GB"):
  """The largest difference of a logit of a case to PyTorch's; raises if they choose another token anywhere."""
  model = make_model(name)
  loaded = load_pretrained(save_model(model, folder, max_shard_size))
  expected, found = both_logits(model, loaded.params, loaded.config)
  assert 3 < expected.std() < 10
  np.testing.assert_array_equal(found.argmax(axis=-1), expected.argmax(axis=-1))
  return float(np.abs(found - expected).max())


def torch_tokens(model, prompts, max_new_tokens, **settings):
  """Greedy tokens `[B, max_new_tokens]` of PyTorch, for prompts that are padded on the left."""
  width = max(map(len, prompts))
  token_ids, mask = np.zeros((2, len(prompts), width), np.int64)
  for row, prompt in enumerate(prompts):
    token_ids[row, width - len(prompt) :] = prompt
    mask[row, width - len(prompt) :] = 1
  answers = model.generate(
    torch.from_numpy(token_ids),
    attention_mask=torch.from_numpy(mask),
    do_sample=False,
    max_new_tokens=max_new_tokens,
    **settings,
  )
  return answers[:, width:].numpy()


def make_tokenizer():
  """A byte-level tokenizer of a few merges, with a chat template; "</s>" (1) ends an answer."""
  letters = {letter: number for number, letter in enumerate(["<s>", "</s>", *"abcdefgh", "\u0120", "ab", "abc"])}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[("a", "b"), ("ab", "c")]))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  template = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
  )
