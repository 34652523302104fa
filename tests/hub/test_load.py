"""Models of transformers, read by us: the same logits and the same tokens as PyTorch's."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_cases import (
  CASES,
  both_logits,
  largest_error,
  make_model,
  random_tokens,
  run,
  save_model,
  tokens_and_mask,
  torch_logits,
  torch_tokens,
)

from cqd_jax.hub.load import load_pretrained, open_pretrained
from cqd_jax.models import bucket_prompts, decode_population
from cqd_jax.models.hf_layout import placements

SHARDED = ("llama_grouped_scaled_tied", "qwen3")


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_pytorch(tmp_path, name):
  error = largest_error(name, tmp_path / "model", "30KB" if name in SHARDED else "5GB")
  assert error < 1e-4
  assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (name in SHARDED)


@pytest.mark.parametrize("name", ["llama_grouped_scaled_tied", "mistral_window", "qwen2", "qwen3_biases_window_tied"])
def test_greedy_tokens_are_those_of_pytorch(tmp_path, name):
  model = make_model(name)
  loaded = load_pretrained(save_model(model, tmp_path / "model"))
  prompts = [random_tokens(length, seed=length) for length in (9, 1, 14, 6)]
  population = jax.tree.map(lambda leaf: leaf[None], loaded.params)
  buckets = bucket_prompts(prompts, num_buckets=1)
  decode = functools.partial(decode_population, population, loaded.config, buckets, max_new_tokens=64, pad_id=0)
  expected = torch_tokens(model, prompts, 64)
  assert len(np.unique(expected)) > 15  # they do say something
  unsaid = np.setdiff1d(np.arange(loaded.config.vocab_size), expected)
  tokens, lengths = decode(end_ids=unsaid[:2].tolist())
  np.testing.assert_array_equal(tokens[0], expected)
  np.testing.assert_array_equal(lengths[0], [64] * 4)
  # ends that rows reach at different steps, or never
  end_ids = [int(expected[0, 5]), int(expected[2, 20])]
  expected = torch_tokens(model, prompts, 64, eos_token_id=end_ids)
  tokens, lengths = decode(end_ids=end_ids)
  np.testing.assert_array_equal(tokens[0][:, : expected.shape[1]], expected)
  assert len(np.unique(lengths)) > 1


@pytest.mark.parametrize("name", CASES)
def test_positions_far_beyond_the_original_context(tmp_path, name):
  model = make_model(name)
  loaded = load_pretrained(save_model(model, tmp_path / "model"))
  token_ids = random_tokens(1, 400)
  found, expected = np.asarray(run(loaded.params, loaded.config, token_ids)), torch_logits(model, token_ids)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
  np.testing.assert_array_equal(found.argmax(axis=-1), expected.argmax(axis=-1))
  token_ids, _ = tokens_and_mask()
  positions = np.arange(token_ids.shape[1], dtype=np.int32) + np.array([[0], [5000], [32_760], [70_000]], np.int32)
  found = np.asarray(run(loaded.params, loaded.config, token_ids, positions=positions))
  np.testing.assert_allclose(found, torch_logits(model, token_ids, positions=positions), rtol=0, atol=1e-4)


def as_torch(array):
  """An array of ours as a tensor, bit by bit."""
  array = np.asarray(array)
  if array.dtype == jnp.bfloat16:
    return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
  return torch.from_numpy(array.copy())


def assert_same_weights(model, params, config):
  """Every parameter of a model of transformers is, bit by bit, where it belongs in params."""
  seen = dict(model.named_parameters())
  for placement in placements(config):
    leaf = params
    for name in placement.path:
      leaf = leaf[name]
    for name, matrix in zip(placement.names, leaf if placement.stacked else [leaf], strict=True):
      tensor = as_torch(matrix)
      assert torch.equal(seen.pop(name), tensor.T if placement.transposed else tensor), name
  assert not seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_files_in_half_precision(tmp_path, dtype):
  name = "qwen3"
  model = make_model(name, dtype)
  folder = save_model(model, tmp_path / "model")
  loaded = load_pretrained(folder)
  wanted = {torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}[dtype]
  assert open_pretrained(folder).dtype == wanted
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(wanted)}
  assert_same_weights(model, loaded.params, loaded.config)
  # the same file, computed in float32 by both
  wide = load_pretrained(folder, jnp.float32)
  model = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
  assert_same_weights(model, wide.params, wide.config)
  expected, found = both_logits(model, wide.params, wide.config)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
  # computed in half precision the logits, of scale 5, are off by what activations are rounded by
  expected, found = both_logits(model, loaded.params, loaded.config)
  assert np.abs(found - expected).max() < {torch.bfloat16: 0.8, torch.float16: 0.1}[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16], ids=str)
def test_float32_files_are_rounded_to_the_dtype_that_is_asked_for(tmp_path, dtype):
  folder = save_model(make_model("llama_biases"), tmp_path / "model")
  loaded = load_pretrained(folder, dtype)
  rounded = make_model("llama_biases", {"bfloat16": torch.bfloat16}.get(dtype, torch.float16))
  assert_same_weights(rounded, loaded.params, loaded.config)


def test_weights_of_several_dtypes(tmp_path):
  """The one in which most of the weights are is that of all."""
  model = make_model("qwen3", torch.bfloat16)
  model.model.norm.float()
  loaded = load_pretrained(save_model(model, tmp_path / "model"))
  assert loaded.source.dtype == jnp.bfloat16
  model.model.norm.bfloat16()
  assert_same_weights(model, loaded.params, loaded.config)


def test_what_a_folder_says_of_itself(tmp_path):
  model = make_model("mistral_window")
  folder = save_model(model, tmp_path / "model", "20KB")
  counted = []
  loaded = load_pretrained(folder, on_read=counted.append)
  opened = loaded.source
  assert opened.folder == folder
  assert opened.num_bytes == sum(counted) == 4 * sum(parameter.numel() for parameter in model.parameters())
  assert opened.content == json.loads((folder / "config.json").read_text())
  assert opened.generation == json.loads((folder / "generation_config.json").read_text())
  assert opened.tokenizer is loaded.tokenizer is None
  assert opened.end_ids == ()
  assert load_pretrained(str(folder)).config == loaded.config


@pytest.mark.parametrize(
  ("generation", "config", "expected"),
  [
    ({"eos_token_id": [3, 5]}, {"eos_token_id": 7}, (3, 5)),
    ({"eos_token_id": 3}, {}, (3,)),
    ({"eos_token_id": None}, {"eos_token_id": 7}, (7,)),
    (None, {"eos_token_id": [7, 60]}, (7, 60)),
    (None, {"eos_token_id": None}, ()),
    (None, {}, ()),
  ],
)
def test_end_ids_are_of_the_first_file_that_says(tmp_path, generation, config, expected):
  folder = save_model(make_model("llama"), tmp_path / "model")
  content = json.loads((folder / "config.json").read_text())
  content.pop("eos_token_id", None)
  (folder / "config.json").write_text(json.dumps(content | config))
  (folder / "generation_config.json").unlink()
  if generation is not None:
    (folder / "generation_config.json").write_text(json.dumps(generation))
  assert open_pretrained(folder).end_ids == expected


def test_tensors_that_are_no_weights_are_left_out(tmp_path):
  """Files of older versions hold the wavelengths of the rotation, and a tied head as a copy."""
  from safetensors.torch import load_file, save_file

  model = make_model("llama_grouped_scaled_tied")
  folder = save_model(model, tmp_path / "model")
  tensors = load_file(folder / "model.safetensors")
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
  save_file(tensors, folder / "model.safetensors")
  loaded = load_pretrained(folder)
  assert_same_weights(model, loaded.params, loaded.config)
