"""Models that we write, read by transformers: the same weights, config, generation config and tokenizer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hf_cases import (
  CASES,
  make_model,
  make_tokenizer,
  random_tokens,
  run,
  save_model,
  tokens_and_mask,
  torch_logits,
)

from cqd_jax.genotypes import CoreBasis
from cqd_jax.hub.load import load_pretrained, save_pretrained
from cqd_jax.models import DecoderConfig, init_params
from cqd_jax.models.hf_layout import placements
from cqd_jax.trees import leaf_path

TINY = DecoderConfig(
  vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
)


def read_by_transformers(folder, dtype="auto"):
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def random_params(config=TINY, dtype=jnp.float32, seed=0):
  source = np.random.default_rng(seed)
  params = init_params(jax.random.key(seed), config)
  return jax.tree.map(lambda leaf: (leaf + 0.3 * source.standard_normal(leaf.shape)).astype(dtype), params)


def files_of(folder):
  return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("name", CASES)
def test_what_was_read_and_written_is_the_same_model(tmp_path, name):
  original = make_model(name)
  loaded = load_pretrained(save_model(original, tmp_path / "original"))
  save_pretrained(tmp_path / "copy", loaded.params, loaded.config, settings=loaded.source.content)
  copy = read_by_transformers(tmp_path / "copy")
  assert type(copy) is type(original)
  assert copy.dtype == torch.float32
  expected, found = dict(original.named_parameters()), dict(copy.named_parameters())
  assert found.keys() == expected.keys()
  assert all(torch.equal(found[key], expected[key]) for key in expected)
  assert torch.equal(copy.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)
  token_ids, mask = tokens_and_mask()
  assert np.array_equal(torch_logits(copy, token_ids, mask), torch_logits(original, token_ids, mask))
  # All that its config says, but where it came from, and what follows from the rest: a width of heads that transformers
  # leaves out, the first layer of no window.
  left_out = dict.fromkeys(("_name_or_path", "head_dim", "max_window_layers"))
  ours, theirs = (model.config.to_dict() | left_out for model in (copy, original))
  assert ours == theirs
  again = load_pretrained(tmp_path / "copy")
  assert again.config == loaded.config
  jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_of_our_own_in_shards(tmp_path, dtype):
  config = dataclasses.replace(TINY, qkv_bias=True)
  params = random_params(config, dtype)
  generation = {"eos_token_id": [3, 1], "max_new_tokens": 7, "do_sample": False}
  settings = {"eos_token_id": 3, "pad_token_id": 0, "max_position_embeddings": 99}
  save_pretrained(
    tmp_path / "model",
    params,
    config,
    make_tokenizer(),
    settings=settings,
    generation=generation,
    card="# A model\n",
    max_shard_bytes=700,
  )
  index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
  shards = sorted(set(index["weight_map"].values()))
  assert shards == [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
  assert len(shards) > 2
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert index["metadata"]["total_size"] == size
  held = dict.fromkeys(shards, 0)
  model = read_by_transformers(tmp_path / "model")
  for name, parameter in model.named_parameters():
    held[index["weight_map"][name]] += 2 * parameter.numel()
  assert sum(held.values()) == size
  assert max(held.values()) <= 700
  rest = [name for name in files_of(tmp_path / "model") if not name.startswith("model")]
  expected = ["README.md", "chat_template.jinja", "config.json", "generation_config.json"]
  assert rest == [*expected, "tokenizer.json", "tokenizer_config.json"]
  assert (tmp_path / "model" / "README.md").read_text() == "# A model\n"
  assert model.dtype == getattr(torch, dtype)
  assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == dtype
  assert model.config.max_position_embeddings == 99
  assert model.config.eos_token_id == 3
  assert model.generation_config.eos_token_id == [3, 1]
  assert model.generation_config.max_new_tokens == 7
  wide = read_by_transformers(tmp_path / "model", torch.float32)
  ours = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
  loaded = load_pretrained(tmp_path / "model")
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
  token_ids = random_tokens(2, 9, vocab_size=11)
  np.testing.assert_allclose(run(ours, config, token_ids), torch_logits(wide, token_ids), rtol=0, atol=1e-4)
  assert loaded.source.end_ids == (3, 1)


def test_a_tensor_that_is_larger_than_a_shard_has_one_of_its_own(tmp_path):
  save_pretrained(tmp_path / "model", random_params(), TINY, max_shard_bytes=1)
  index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
  count = sum(len(placement.names) for placement in placements(TINY))
  assert len(set(index["weight_map"].values())) == len(index["weight_map"]) == count
  jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "model").params, random_params())


@pytest.mark.parametrize("source", ["object", "folder", "path"])
def test_tokenizers_are_saved_or_copied(tmp_path, source):
  tokenizer = make_tokenizer()
  tokenizer.save_pretrained(tmp_path / "tokenizer")
  (tmp_path / "tokenizer" / "model.safetensors").write_text("is not copied")
  given = {"object": tokenizer, "folder": str(tmp_path / "tokenizer"), "path": tmp_path / "tokenizer"}[source]
  save_pretrained(tmp_path / "model", random_params(), TINY, given)
  for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
    assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "tokenizer" / name).read_bytes()
  found = load_pretrained(tmp_path / "model").tokenizer
  assert found.encode("abc ab hab") == tokenizer.encode("abc ab hab") != []
  assert found.chat_template == tokenizer.chat_template
  assert found.eos_token_id == 1


def test_all_files_of_a_tokenizer_arrive(tmp_path):
  tokenizer = make_tokenizer()
  tokenizer.chat_template = {"default": "D {{messages[0]['content']}}", "tool_use": "T {{messages[0]['content']}}"}
  tokenizer.save_pretrained(tmp_path / "tokenizer")
  for name in ("spiece.model", "vocab.txt", "tekken.json"):
    (tmp_path / "tokenizer" / name).write_text(name)
  save_pretrained(tmp_path / "model", random_params(), TINY, tmp_path / "tokenizer")
  for path in (tmp_path / "tokenizer").rglob("*"):
    if path.is_file():
      assert (tmp_path / "model" / path.relative_to(tmp_path / "tokenizer")).read_bytes() == path.read_bytes()
  assert list((tmp_path / "model" / "additional_chat_templates").iterdir())
  found = load_pretrained(tmp_path / "model").tokenizer
  assert found.chat_template == tokenizer.chat_template


def test_of_no_tokenizer_and_no_card_nothing_is_written(tmp_path):
  save_pretrained(tmp_path / "deep" / "er", random_params(), TINY, generation={})
  assert files_of(tmp_path / "deep" / "er") == ["config.json", "model.safetensors"]
  assert files_of(tmp_path / "deep") == ["er"]


def test_leaves_one_by_one_as_core_space_gives_them(tmp_path):
  base = random_params(dtype=jnp.bfloat16)
  expert = jax.tree.map(lambda leaf: None, base)
  expert["layers"]["mlp"]["up"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), (2, 8, 12))
  expert["final_norm"]["scale"] = jnp.full(8, 0.25)
  basis = CoreBasis.from_experts(base, [expert], rank=3)
  genotype = jax.tree.map(lambda leaf: leaf[0], basis.experts)
  save_pretrained(tmp_path / "model", basis.materialize_leaves(genotype), TINY)
  jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "model").params, basis.materialize(genotype))


@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_leaves_of_any_memory_layout(tmp_path, order):
  params = jax.tree.map(lambda leaf: np.asarray(leaf, order=order), random_params())
  save_pretrained(tmp_path / "model", params, TINY)
  jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "model").params, params)


def leaves_with(change, at=("layers", "mlp", "up", "kernel"), late=True):
  """All leaves; the one at a path is changed. The others come first, or last."""
  params = random_params()
  listed = {leaf_path(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
  own = [(at, changed)] if (changed := change(listed.pop(at))) is not None else []
  return [*listed.items(), *own] if late else [*own, *listed.items()]


MLP = "layers/mlp/up/kernel"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
  ("change", "named"),
  [
    (lambda leaf: leaf.at[1, 2, 3].set(jnp.nan), f"{MLP}: holds NaN"),
    (lambda leaf: leaf.at[0, 0, 0].set(-jnp.inf), f"{MLP}: holds NaN"),
    (lambda leaf: None, f"misses {MLP}"),
    (lambda leaf: leaf[:, :-1], rf"{MLP}: expected shape \(2, 8, 12\), got \(2, 7, 12\)"),
    (lambda leaf: leaf.mT, f"{MLP}: expected shape"),
    (lambda leaf: leaf[0], f"{MLP}: expected shape"),
    (lambda leaf: leaf.astype(jnp.int32), f"{MLP}: expected bfloat16, float16 or float32, got int32"),
    (lambda leaf: np.asarray(leaf, np.float64), f"{MLP}: expected bfloat16, float16 or float32, got float64"),
    (lambda leaf: 3.0, f"{MLP}: expected bfloat16, float16 or float32, got 3.0"),
    (lambda leaf: leaf.tolist(), f"{MLP}: expected bfloat16"),
  ],
)
def test_a_leaf_that_cannot_be_written_leaves_nothing_behind(tmp_path, change, named, late):
  with pytest.raises(ValueError, match=f"params.* {named}"):
    save_pretrained(tmp_path / "model", iter(leaves_with(change, late=late)), TINY, max_shard_bytes=300)
  assert files_of(tmp_path) == []


@pytest.mark.parametrize(
  ("extra", "named"),
  [(("layers", "mlp", "up", "bias"), "layers/mlp/up/bias"), (("layers", "mlp", "up", "kernel"), f"{MLP}, which")],
)
def test_a_leaf_too_many_leaves_nothing_behind(tmp_path, extra, named):
  leaves = [*leaves_with(lambda leaf: leaf), (extra, jnp.zeros((2, 8, 12)))]
  with pytest.raises(ValueError, match=f"params: has {named}"):
    save_pretrained(tmp_path / "model", leaves, TINY)
  assert files_of(tmp_path) == []


def test_an_error_of_whoever_gives_the_leaves_leaves_nothing_behind(tmp_path):
  def leaves():
    yield from leaves_with(lambda leaf: leaf)[:9]
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    save_pretrained(tmp_path / "model", leaves(), TINY, max_shard_bytes=300)
  assert files_of(tmp_path) == []


@pytest.mark.parametrize("tokenizer", [3, "empty"])
def test_what_is_no_tokenizer_is_named_and_leaves_nothing_behind(tmp_path, tokenizer):
  (tmp_path / "empty").mkdir()
  given = tmp_path / "empty" if tokenizer == "empty" else tokenizer
  with pytest.raises(ValueError, match=r"tokenizer: (expected one of transformers|.*empty holds no tokenizer files)"):
    save_pretrained(tmp_path / "model", random_params(), TINY, given)
  assert files_of(tmp_path) == ["empty"]


@pytest.mark.parametrize("kind", ["folder", "full", "file"])
def test_what_exists_is_not_overwritten(tmp_path, kind):
  there = tmp_path / "model"
  if kind == "file":
    there.write_text("mine")
  else:
    there.mkdir()
  if kind == "full":
    (there / "config.json").write_text("mine")
  with pytest.raises(ValueError, match="model: already exists; nothing was overwritten"):
    save_pretrained(there, random_params(), TINY)
  assert files_of(tmp_path) == ["model"]
  if kind == "full":
    assert (there / "config.json").read_text() == "mine"


def test_settings_that_cannot_be_are_refused_before_anything_is_written(tmp_path):
  with pytest.raises(ValueError, match="max_shard_bytes: expected at least 1, got 0"):
    save_pretrained(tmp_path / "model", random_params(), TINY, max_shard_bytes=0)
  config = dataclasses.replace(TINY, qk_norm=True, mlp_bias=True)
  with pytest.raises(ValueError, match="config: no architecture"):
    save_pretrained(tmp_path / "model", random_params(config), config)
  assert files_of(tmp_path) == []
