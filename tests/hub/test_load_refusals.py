"""Folders that are no models, or damaged ones: each is refused by a message that names it, quickly, in little room."""

import collections
import contextlib
import json
import pickle
import re
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hf_cases import follow, make_model, make_tokenizer, save_model
from safetensors.torch import load_file, save_file
from safetensors.torch import save_model as save_without_twins

from cqd_jax.hub.experts import open_expert
from cqd_jax.hub.load import load_pretrained, open_pretrained

SMALL = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 12, "vocab_size": 13, "head_dim": 4}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
  """A folder with everything: one file of weights, a generation config, a tokenizer."""
  model = make_model("llama_biases", **SMALL)
  model.generation_config.eos_token_id = [1, 3]
  folder = save_model(model, tmp_path_factory.mktemp("sound") / "model")
  make_tokenizer().save_pretrained(folder)
  assert load_pretrained(folder).tokenizer.eos_token_id == 1
  return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
  """The same kind of model, in several files."""
  return save_model(make_model("qwen2_window_scaled", **SMALL), tmp_path_factory.mktemp("sharded") / "model", "1KB")


@pytest.fixture
def folder(sound, tmp_path):
  """A copy to be damaged."""
  return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture
def shards(sharded, tmp_path):
  """A copy to be damaged."""
  return Path(shutil.copytree(sharded, tmp_path / "shards"))


def edit_json(file, **changes):
  content = json.loads(file.read_text())
  file.write_text(json.dumps({**content, **changes}))


@contextlib.contextmanager
def edited(folder):
  """The tensors of a folder, to be changed and written back."""
  tensors = load_file(folder / "model.safetensors")
  yield tensors
  save_file(tensors, folder / "model.safetensors")


def refused(folder, match):
  with pytest.raises(ValueError, match=match) as caught:
    load_pretrained(folder)
  assert str(folder) in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize(
  ("files", "match"),
  [
    (None, "no such model folder"),
    ((), r"not a Hugging Face model folder \(it has no config\.json\)"),
    (("adapter_config.json", "adapter_model.safetensors"), "PEFT adapter, which belongs to a base model"),
    (("run.json", "history.db"), "run directory; its models are in models/"),
    (("model.json", "model.safetensors"), "model folder of a run of the miniature"),
    (("model.safetensors",), r"it has no config\.json"),
  ],
)
def test_a_folder_of_another_kind(tmp_path, files, match):
  folder = tmp_path / "thing"
  if files is not None:
    folder.mkdir()
    for name in files:
      (folder / name).write_text("{}")
  refused(folder, match)


def test_a_file_and_a_name_of_the_hub_are_no_folders(folder):
  refused(folder / "config.json", "no such model folder")
  with pytest.raises(ValueError, match="meta-llama/Llama-3-8B: no such model folder"):
    load_pretrained("meta-llama/Llama-3-8B")


def test_a_config_without_weights(folder):
  (folder / "model.safetensors").unlink()
  refused(folder, r"has no model\.safetensors, and no model\.safetensors\.index\.json")


class Trap:
  """Creates a file when it is loaded."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickles_are_never_loaded(folder, tmp_path, name):
  (folder / "model.safetensors").unlink()
  (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "loaded")))
  message = refused(folder, rf"its weights are pickle files \({re.escape(name)}\), which are never loaded")
  assert "executes whatever code it holds" in message
  assert not (tmp_path / "loaded").exists()
  pickle.loads((folder / name).read_bytes())  # the trap does work
  assert (tmp_path / "loaded").exists()


def test_the_conversion_of_shards_that_is_advised_works(tmp_path):
  folder = tmp_path / "it's a model"
  save_model(make_model("llama_grouped_scaled_tied", **SMALL), folder)
  make_tokenizer().save_pretrained(folder)
  expected = load_pretrained(folder)
  tensors = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  names = sorted(tensors)
  parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
  for file, own in parts.items():
    torch.save({name: tensors[name] for name in own}, folder / file)
  weight_map = {name: file for file, own in parts.items() for name in own}
  index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
  (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
  follow(refused(folder, "pickle"))
  found = load_pretrained(f"{folder}-safetensors")
  jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
  assert found.tokenizer.get_vocab() == expected.tokenizer.get_vocab()


def test_either_name_of_a_tied_pair_will_do(tmp_path):
  model = make_model("llama_grouped_scaled_tied", **SMALL)
  save_model(model, tmp_path / "tied")
  expected = load_pretrained(tmp_path / "tied")
  file = tmp_path / "tied" / "model.safetensors"
  save_without_twins(model, str(file), metadata={"format": "pt"})
  assert "lm_head.weight" in load_file(file)  # and not the embedding
  found = load_pretrained(tmp_path / "tied")
  jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_a_model_and_an_adapter_in_one_folder_are_refused(folder, sound):
  (folder / "adapter_config.json").write_text("{}")
  (folder / "adapter_model.safetensors").write_bytes(b"")
  said = r"holds a whole model \(model\.safetensors\) and an adapter \(adapter_config\.json, adapter_model"
  base = open_pretrained(sound)
  refused(folder, said)
  with pytest.raises(ValueError, match=said):
    open_expert(folder, base)


def test_the_conversion_that_is_advised_works(folder):
  expected = load_pretrained(folder)
  torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
  (folder / "model.safetensors").unlink()
  follow(refused(folder, "pickle"))
  found = load_pretrained(folder)
  assert found.config == expected.config
  jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


DOWN = "model.layers.0.mlp.down_proj.weight"


def test_a_missing_tensor_is_named(folder):
  with edited(folder) as tensors:
    del tensors[DOWN]
  refused(folder, f"misses the tensor '{DOWN}'$")
  with edited(folder) as tensors:
    del tensors["lm_head.weight"], tensors["model.norm.weight"]
  refused(folder, r"misses the tensor '.*' and 2 more")


def test_a_tensor_too_many_is_named(folder):
  with edited(folder) as tensors:
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors[DOWN].clone()
  refused(
    folder, r"model\.safetensors: has the tensor 'model\.layers\.1\.mlp\.down_proj\.weight', which a model of this"
  )
  edit_json(folder / "config.json", mlp_bias=False)
  refused(folder, r"has the tensor 'model\.layers\.\d\.mlp\.\w*\.\w*' and 3 more")


@pytest.mark.parametrize("change", [lambda tensor: tensor[:-1], lambda tensor: tensor.T, lambda tensor: tensor[None]])
def test_a_tensor_of_another_shape_is_named(folder, change):
  with edited(folder) as tensors:
    tensors[DOWN] = change(tensors[DOWN]).contiguous()
  refused(folder, rf"model\.safetensors: '{DOWN}' has shape \(.*\), and by config\.json it has \(8, 12\)")


def test_a_tied_model_with_a_head_of_its_own(tmp_path):
  folder = save_model(make_model("mistral", **SMALL), tmp_path / "model")
  with edited(folder) as tensors:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
  load_pretrained(folder)
  for change in (lambda head: head * 1.0001, lambda head: head[:-1], lambda head: head[None], lambda head: head.sum()):
    with edited(folder) as tensors:
      tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"]).clone()
    refused(folder, "'lm_head.weight' is not the embedding, though config.json has tie_word_embeddings=true")


def test_weights_that_are_quantized_or_not_finite_are_named(folder):
  original = load_file(folder / "model.safetensors")[DOWN]
  for dtype, name in ((torch.int8, "I8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3")):
    with edited(folder) as tensors:
      tensors[DOWN] = original.to(dtype)
    refused(folder, rf"model\.safetensors: '{DOWN}' is of dtype {name}; supported are BF16, F16, F32")
  for value in (np.nan, np.inf, -np.inf):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
      with edited(folder) as tensors:
        tensors[DOWN] = original.to(dtype, copy=True)
        tensors[DOWN][7, 11] = value
      refused(folder, rf"model\.safetensors: the tensor '{DOWN}' holds NaN or infinite values")


def test_values_too_large_for_the_dtype_that_is_asked_for(folder):
  with edited(folder) as tensors:
    tensors[DOWN][0, 0] = 1e5
  load_pretrained(folder, "bfloat16")
  with pytest.raises(ValueError, match=f"the tensor '{DOWN}' holds values that do not fit in float16"):
    load_pretrained(folder, "float16")


@pytest.mark.parametrize("dtype", ["int8", "float64", "complex64", "bool"])
def test_other_dtypes_than_those_of_weights(folder, dtype):
  with pytest.raises(ValueError, match=f"dtype: expected one of bfloat16, float16, float32, got {dtype}"):
    load_pretrained(folder, dtype)


@pytest.mark.parametrize(
  "name", ["../other.safetensors", "sub/model.safetensors", "/etc/passwd", "./model.safetensors"]
)
def test_an_index_that_names_files_elsewhere(shards, name):
  file = shards / "model.safetensors.index.json"
  entries = json.loads(file.read_text())["weight_map"]
  edit_json(file, weight_map={**entries, next(iter(entries)): name})
  refused(shards, rf"index\.json: expected names of files in the folder, got '{re.escape(name)}'")


@pytest.mark.parametrize("name", ["..", ".", "", "other.safetensors", "a" * 200, "\0", "\ud800"])
def test_an_index_that_names_what_is_no_file(shards, name):
  file = shards / "model.safetensors.index.json"
  entries = json.loads(file.read_text())["weight_map"]
  edit_json(file, weight_map={**entries, next(iter(entries)): name})
  refused(shards, "is missing, and|expected names of files")


@pytest.mark.parametrize("content", [[], {}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": {"a": 3}}, 1])
def test_an_index_that_is_none(shards, content):
  (shards / "model.safetensors.index.json").write_text(json.dumps(content))
  refused(shards, r"index\.json: damaged, it has no weight_map")


def test_a_missing_shard_and_a_tensor_that_is_not_in_its_shard(shards):
  file = shards / "model.safetensors.index.json"
  entries = json.loads(file.read_text())["weight_map"]
  first, second = sorted(set(entries.values()))[:2]
  name = next(name for name in entries if entries[name] == first)
  edit_json(file, weight_map={**entries, name: second})
  refused(shards, rf"{second}: misses the tensor '{name}', which model\.safetensors\.index\.json says is there")
  edit_json(file, weight_map=entries)
  (shards / first).unlink()
  refused(shards, rf"{first}: is missing, and model\.safetensors\.index\.json names it")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"[1]", b"", b"\xff\xfe{}", b"{", b"3", b"null", b'{"a": 1} x'])
def test_json_that_is_none(folder, name, content):
  (folder / name).write_bytes(content)
  refused(folder, f"{name}: (not JSON|expected settings by name)")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [-1, 13, "</s>", 1.0, True, [1, 13], [[1]], {}, [None]])
def test_end_ids_that_are_no_tokens(folder, name, ids):
  (folder / "generation_config.json").write_text("{}")
  edit_json(folder / name, eos_token_id=ids)
  opened = open_pretrained(folder)
  with pytest.raises(ValueError, match=rf"{name}: eos_token_id: expected ids in \[0, 13\), got ") as caught:
    _ = opened.end_ids
  assert str(folder) in str(caught.value)


def test_a_tokenizer_that_is_damaged_is_refused_when_it_is_asked_for(folder):
  (folder / "tokenizer.json").write_text("{}")
  model = load_pretrained(folder)
  with pytest.raises(ValueError, match=f"{folder}: its tokenizer cannot be read"):
    _ = model.tokenizer


def peak_memory():
  """A function that gives how many bytes the peak of memory has risen since."""
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is the present again

  def status(name):
    with open("/proc/self/status") as file:
      return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))

  before = status("VmRSS")
  return lambda: status("VmHWM") - before


@pytest.mark.parametrize("value", [9_999_999, 2**30, 2**31 - 1])
@pytest.mark.parametrize(
  "names",
  [
    ("hidden_size",),
    ("num_hidden_layers",),
    ("vocab_size",),
    ("intermediate_size",),
    ("head_dim",),
    ("num_attention_heads", "num_key_value_heads"),
    ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"),
  ],
)
def test_absurd_sizes_are_refused_at_once(folder, shards, names, value):
  rise, start = peak_memory(), time.perf_counter()
  for each in (folder, shards):
    even = value - value % 2 if names == ("head_dim",) else value
    edit_json(each / "config.json", **dict.fromkeys(names, even))
    refused(each, "has shape|misses|expected a divisor|is no multiple|not supported")
  assert time.perf_counter() - start < 5
  assert rise() < 50e6


def damaged(source, content, header):
  """Cut off somewhere, or with a byte or a few changed; half of them in the header, if there is one."""
  if source.random() < 0.2:
    return content[: source.integers(len(content))]
  changed = bytearray(content)
  end = header if source.random() < 0.5 else len(content)
  for _ in range(source.choice([1, 1, 1, 3])):
    place = source.integers(end)
    if chr(changed[place]).isdigit():
      changed[place] = source.integers(ord("0"), ord("9") + 1)
    elif source.random() < 0.5:
      changed[place] ^= 1 << source.integers(8)
    else:
      changed[place] = source.integers(32, 127)
  return bytes(changed)


def fuzz(folder, name, cases, ask, seed=0):
  """Damages a file again and again; counts what became of it. Anything but a refusal that names the folder raises."""
  file, counts = folder / name, collections.Counter()
  content = file.read_bytes()
  header = 8 + int.from_bytes(content[:8], "little") if name.endswith(".safetensors") else len(content)
  source, rise = np.random.default_rng(seed), peak_memory()
  for _ in range(cases):
    file.write_bytes(damaged(source, content, header))
    start = time.perf_counter()
    try:
      ask(folder)
      counts["read"] += 1
    except (ValueError, OSError) as error:
      counts["refused" if str(folder) in str(error) else f"unnamed: {error}"] += 1
    assert time.perf_counter() - start < 5
  file.write_bytes(content)
  ask(folder)
  return counts, rise()


def read_weights(folder):
  return load_pretrained(folder).source.end_ids


def read_tokenizer(folder):
  return open_pretrained(folder).tokenizer


FUZZED = {
  ("folder", "config.json"): 300,
  ("shards", "config.json"): 200,
  ("folder", "generation_config.json"): 200,
  ("folder", "model.safetensors"): 300,
  ("shards", "model.safetensors.index.json"): 300,
  ("folder", "tokenizer.json"): 300,
  ("folder", "tokenizer_config.json"): 150,
}


@pytest.mark.parametrize(("kind", "name"), FUZZED)
def test_damage_is_refused_by_name_or_does_no_harm(request, kind, name):
  cases = FUZZED[kind, name]
  ask = read_tokenizer if name.startswith("tokenizer") else read_weights
  counts, rise = fuzz(request.getfixturevalue(kind), name, cases, ask)
  assert counts.keys() == {"read", "refused"}
  assert counts["refused"] > cases / 4
  assert rise < 60e6
