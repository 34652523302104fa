"""Experts against their base: what must agree, and what becomes of rows of tokens that only one of them has."""

import shutil
import warnings

import jax
import numpy as np
import pytest
import torch
from peft_cases import (
  CONFIGS,
  SIZES,
  WARNINGS,
  Base,
  copy_adapter,
  edit_json,
  largest_difference,
  our_logits,
  read_update,
  save_by_peft,
  save_model,
  torch_logits,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split, Whitespace
from transformers import (
  AutoModelForCausalLM,
  LlamaConfig,
  MistralConfig,
  PreTrainedTokenizerFast,
  Qwen2Config,
  Qwen3Config,
)

from cqd_jax.hub import experts, tensor_files
from cqd_jax.hub.experts import open_expert
from cqd_jax.low_rank import LowRank
from cqd_jax.models.hf_config import UnsupportedModel
from cqd_jax.trees import map_with_path

pytestmark = [pytest.mark.filterwarnings(each) for each in WARNINGS]

LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]
ROWS = SIZES["vocab_size"]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  """By architecture; without tokenizers."""
  folder = tmp_path_factory.mktemp("bases")
  return {name: Base(folder / name, config) for name, config in CONFIGS.items()}


def save_tokenizer(folder, *, merges=(("d", "e"), ("e", "f"), ("r", "e")), tokens=(), splits=Whitespace, added=()):
  """A small tokenizer: letters, and pairs of them; `tokens` are further ones that it never makes of text."""
  words = ["[UNK]", *LETTERS, "de", "ef", "re", *tokens]
  model = BPE({word: index for index, word in enumerate(words)}, list(merges), unk_token="[UNK]")
  tokenizer = Tokenizer(model)
  tokenizer.pre_tokenizer = splits()
  fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
  fast.add_tokens(list(added))
  fast.save_pretrained(folder)
  return folder


def with_tokenizer(base, folder, **settings):
  """The base's files with a tokenizer beside them, opened."""
  shutil.copytree(base.folder, folder)
  save_tokenizer(folder, **settings)
  other = object.__new__(Base)
  other.__dict__ = dict(base.__dict__)
  other.folder, other.opened = folder, experts.open_pretrained(folder)
  return other


def as_params(base, change):
  """The change of the leaves that the base's own placements make of changes of tensors, by NumPy."""

  def leaf(path, like):
    placement = base.opened.placements[path]
    parts = [change(name) for name in placement.names]
    parts = [part.T if placement.transposed else part for part in parts]
    return np.stack(parts) if placement.stacked else parts[0].reshape(like.shape)

  return map_with_path(leaf, base.params)


def tensors_of(folder):
  return {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def check_update(base, folder, *, rows=ROWS, left_out=()):
  """That the update is the difference of the two files, with rows from `rows` on, and those of `left_out`, at zero."""
  before, after = tensors_of(base.folder), tensors_of(folder)

  def change(name):
    if name not in (EMBED, HEAD):
      return after[name] - before[name]
    expected = np.zeros(before[name].shape, np.float32)
    for row in range(min(rows, len(after[name]))):
      if row not in left_out:
        expected[row] = after[name][row] - before[name][row]
    return expected

  update = read_update(folder, base)
  assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {np.dtype(np.float32)}
  jax.tree.map(np.testing.assert_array_equal, update, as_params(base, change))
  return update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_update_of_a_whole_model_is_its_difference_in_float32(name, dtype, bases, tmp_path):
  folder = save_model(tmp_path / "expert", CONFIGS[name], dtype)
  update = check_update(bases[name], folder)
  moved = jax.tree.map(lambda leaf, change: leaf + change, bases[name].params, update)
  model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  assert largest_difference(our_logits(moved, bases[name].config), torch_logits(model)) < 2e-4
  expert = open_expert(folder, bases[name].opened)
  assert expert.kind == "full model"
  assert expert.num_bytes == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_base_is_an_expert_that_changes_nothing(name, bases, tmp_path):
  shutil.copytree(bases[name].folder, tmp_path / "expert")
  assert not any(leaf.any() for leaf in jax.tree.leaves(check_update(bases[name], tmp_path / "expert")))


@pytest.mark.parametrize(
  ("config", "named"),
  [
    (LlamaConfig(**SIZES | {"hidden_size": 48}), "another hidden_size than its base: 48, and 32 in"),
    (LlamaConfig(**SIZES | {"num_hidden_layers": 2}), "another num_layers than its base: 2, and 3 in"),
    (LlamaConfig(**SIZES | {"num_attention_heads": 8}), "another num_heads than its base: 8, and 4 in"),
    (LlamaConfig(**SIZES | {"num_key_value_heads": 4}), "another num_kv_heads than its base: 4, and 2 in"),
    (LlamaConfig(**SIZES, head_dim=10), "another head_dim than its base: 10, and 8 in"),
    (LlamaConfig(**SIZES | {"intermediate_size": 50}), "another intermediate_size than its base: 50, and 48 in"),
    (LlamaConfig(**SIZES, rms_norm_eps=1e-5), "another rms_norm_eps than its base: 1e-05, and 1e-06 in"),
    (
      LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}),
      "another rope_theta than its base: 500000.0, and 10000.0 in",
    ),
    (LlamaConfig(**SIZES, tie_word_embeddings=True), "another tie_embeddings than its base: True, and False in"),
    (LlamaConfig(**SIZES, attention_bias=True), "another qkv_bias than its base: True, and False in"),
    (Qwen2Config(**SIZES), "another qkv_bias than its base: True, and False in"),
    (Qwen3Config(**SIZES, head_dim=8), "another qk_norm than its base: True, and False in"),
    (
      MistralConfig(**SIZES, sliding_window=None),
      r"another architecture than its base: \['MistralForCausalLM'\], and \['LlamaForCausalLM'\] in",
    ),
  ],
)
def test_another_decoder_is_refused_by_what_differs(config, named, bases, tmp_path):
  folder = save_model(tmp_path / "expert", config)
  with pytest.raises(ValueError, match=f"^{folder}: {named} {bases['llama'].folder}$"):
    open_expert(folder, bases["llama"].opened)


def test_an_adapter_of_another_base_is_refused(bases, tmp_path):
  folder = save_by_peft(bases["qwen3"], tmp_path / "adapter", target_modules=["q_proj"])
  with pytest.raises(ValueError, match=rf"^{folder}.*q_proj' have shapes \(4, 32\) and \(40, 4\)"):
    open_expert(folder, bases["llama"].opened)


def test_folders_that_are_no_expert_are_named(bases, tmp_path):
  with pytest.raises(ValueError, match=f"{tmp_path / 'none'}: no such expert folder"):
    open_expert(tmp_path / "none", bases["llama"].opened)
  with pytest.raises(ValueError, match=f"{tmp_path}: not a Hugging Face model folder"):
    open_expert(tmp_path, bases["llama"].opened)
  folder = save_model(tmp_path / "expert", CONFIGS["llama"])
  edit_json(folder / "config.json", {"architectures": ["GPT2LMHeadModel"]})
  with pytest.raises(UnsupportedModel, match=f"{folder / 'config.json'}: GPT2LMHeadModel is not supported"):
    open_expert(folder, bases["llama"].opened)


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_expert_with_a_head_of_its_own(same, bases, tmp_path):
  folder = save_model(tmp_path / "expert", CONFIGS["qwen3"])
  tensors = load_file(folder / "model.safetensors")
  tensors[HEAD] = tensors[EMBED].clone()
  if not same:
    tensors[HEAD][96, 31] += 1e-3
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  if same:
    check_update(bases["qwen3"], folder)
  else:
    with pytest.raises(ValueError, match=rf"{folder}/model\.safetensors: 'lm_head\.weight' is not the embedding"):
      open_expert(folder, bases["qwen3"].opened)


def test_long_tensors_are_compared_block_by_block(bases, tmp_path, monkeypatch):
  monkeypatch.setattr(tensor_files, "PIECE", 4 * 32 * 7)
  folder = save_by_peft(bases["llama"], tmp_path / "adapter", target_modules=["embed_tokens"])
  open_expert(folder, bases["llama"].opened)
  tensor = "base_model.model.model.embed_tokens.base_layer.weight"
  edited = copy_adapter(folder, tmp_path / "edited", change=lambda tensors: tensors[tensor][96, 31].add_(1e-3))
  with pytest.raises(ValueError, match="is not that of the base"):
    open_expert(edited, bases["llama"].opened)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_same_tokenizer(name, bases, tmp_path):
  base = with_tokenizer(bases[name], tmp_path / "base")
  folder = save_tokenizer(save_model(tmp_path / "expert", CONFIGS[name]))
  check_update(base, folder)
  # other bytes, the same meaning
  text = (folder / "tokenizer.json").read_text()
  (folder / "tokenizer.json").write_text(text.replace("  ", " "))
  assert (folder / "tokenizer.json").read_bytes() != (base.folder / "tokenizer.json").read_bytes()
  check_update(base, folder)


def test_tokenizers_of_the_same_bytes_are_not_loaded(bases, tmp_path, monkeypatch):
  base = with_tokenizer(bases["llama"], tmp_path / "base")
  folder = save_tokenizer(save_model(tmp_path / "expert", LlamaConfig(**SIZES | {"vocab_size": 100})))
  monkeypatch.setattr(experts, "load_tokenizer", lambda folder: pytest.fail(f"loads that of {folder}"))
  for each in (folder, base.folder):
    (each / "tokenizer.json").write_text("{")
  check_update(base, folder)


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_another_token_by_the_same_id_is_refused(kind, bases, tmp_path):
  base = with_tokenizer(bases["llama"], tmp_path / "base", tokens=["<this>"])
  folder = tmp_path / "expert"
  if kind == "model":
    save_model(folder, CONFIGS["llama"])
  else:
    save_by_peft(bases["llama"], folder, target_modules=["q_proj"])
  save_tokenizer(folder, tokens=["<that>"])
  with pytest.raises(ValueError, match=f"^{folder}: its token 30 is '<that>', that of {base.folder} '<this>'$"):
    open_expert(folder, base.opened)


@pytest.mark.parametrize(
  "settings",
  [
    {"merges": (("e", "f"), ("d", "e"), ("r", "e"))},
    {"merges": (("d", "e"), ("e", "f"))},
    {"splits": lambda: Split("d", "isolated")},
  ],
)
def test_another_splitting_of_text_is_refused(settings, bases, tmp_path):
  base = with_tokenizer(bases["llama"], tmp_path / "base")
  folder = save_tokenizer(save_model(tmp_path / "expert", CONFIGS["llama"]), **settings)
  with pytest.raises(
    ValueError, match=f"^{folder}: its tokenizer splits text otherwise than that of {base.folder}, as "
  ):
    open_expert(folder, base.opened)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_added_tokens_are_left_out_with_a_warning(kind, bases, tmp_path):
  """Tokens 95, 96 where the base has rows that no token uses, 97 to 101 where it has none."""
  words = [f"<{index}>" for index in range(30, 95)]
  base = with_tokenizer(bases[kind], tmp_path / "base", tokens=words)
  config = type(CONFIGS[kind]).from_dict(CONFIGS[kind].to_dict() | {"vocab_size": 104})
  folder = save_tokenizer(save_model(tmp_path / "expert", config), tokens=words, added=[f"<new {i}>" for i in range(7)])
  named = "'<new 0>', '<new 1>', '<new 2>', '<new 3>', '<new 4>', ...$"
  with pytest.warns(UserWarning, match=f"^{folder}: 7 tokens that {base.folder} has not are left out: {named}"):
    check_update(base, folder, rows=95)


def test_an_adapters_change_of_tokens_that_the_base_has_not(bases, tmp_path):
  base = with_tokenizer(bases["llama"], tmp_path / "base")
  folder = save_by_peft(bases["llama"], tmp_path / "adapter", target_modules=["embed_tokens", "lm_head", "q_proj"])
  whole = read_update(folder, base)
  save_tokenizer(folder, added=["<new>"])
  with pytest.warns(UserWarning, match="1 tokens that .* has not are left out: '<new>'$"):
    update = read_update(folder, base)
  assert all(isinstance(update[name][leaf], LowRank) for name, leaf in (("embed", "embedding"), ("head", "kernel")))
  embed, head = (np.matmul(*factors) for factors in (whole["embed"]["embedding"], whole["head"]["kernel"]))
  assert np.abs(embed[30]).min() > 0
  embed[30] = head[:, 30] = 0
  np.testing.assert_array_equal(np.matmul(*update["embed"]["embedding"]), embed)
  np.testing.assert_array_equal(np.matmul(*update["head"]["kernel"]), head)
  jax.tree.map(np.testing.assert_array_equal, update["layers"], whole["layers"])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", [90, 104])
def test_rows_that_one_of_them_has_not_change_nothing(name, rows, bases, tmp_path):
  """Padding, of which there is no warning."""
  base = with_tokenizer(bases[name], tmp_path / "base")
  config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | {"vocab_size": rows})
  folder = save_tokenizer(save_model(tmp_path / "expert", config))
  for _ in range(2):
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      check_update(base, folder, rows=min(rows, ROWS))
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")  # then by content


def test_fewer_tokens_and_fewer_rows(bases, tmp_path):
  base = with_tokenizer(bases["llama"], tmp_path / "base", added=["<one>", "<two>"])
  folder = save_tokenizer(save_model(tmp_path / "expert", LlamaConfig(**SIZES | {"vocab_size": 31})), added=["<one>"])
  update = check_update(base, folder, rows=31)
  assert update["embed"]["embedding"][30].any()


@pytest.mark.parametrize("who", ["neither", "base", "expert"])
@pytest.mark.parametrize("rows", [96, 98])
def test_vocabularies_of_other_sizes_without_both_tokenizers_are_refused(who, rows, bases, tmp_path):
  base = with_tokenizer(bases["llama"], tmp_path / "base") if who == "base" else bases["llama"]
  folder = save_model(tmp_path / "expert", LlamaConfig(**SIZES | {"vocab_size": rows}))
  if who == "expert":
    save_tokenizer(folder)
  with pytest.raises(ValueError, match=f"^{folder}: its vocabulary has {rows} tokens, that of {base.folder} 97, and"):
    open_expert(folder, base.opened)


@pytest.mark.parametrize("who", ["base", "expert"])
def test_one_tokenizer_is_enough_where_the_sizes_agree(who, bases, tmp_path):
  base = with_tokenizer(bases["llama"], tmp_path / "base") if who == "base" else bases["llama"]
  folder = save_model(tmp_path / "expert", CONFIGS["llama"])
  if who == "expert":
    save_tokenizer(folder)
  check_update(base, folder)


def test_a_tokenizer_that_cannot_be_used_is_named(bases, tmp_path):
  base = with_tokenizer(bases["llama"], tmp_path / "base")
  folder = save_tokenizer(save_model(tmp_path / "expert", CONFIGS["llama"]))
  (folder / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match=f"^{folder}: its tokenizer cannot be read"):
    open_expert(folder, base.opened)


def test_a_tokenizer_that_fails_on_text_is_named(bases, tmp_path, monkeypatch):
  base = with_tokenizer(bases["llama"], tmp_path / "base")
  folder = save_tokenizer(save_model(tmp_path / "expert", CONFIGS["llama"]), added=["<new>"])
  load = experts.load_tokenizer

  def broken(folder):
    tokenizer = load(folder)
    monkeypatch.setattr(tokenizer, "encode", lambda *args, **kwargs: 1 / 0)
    return tokenizer

  monkeypatch.setattr(experts, "load_tokenizer", broken)
  with pytest.raises(ValueError, match=rf"^{folder}: its tokenizer cannot split 'def twice.*division by zero"):
    open_expert(folder, base.opened)
