"""Recipes whose results were worked out in float64: what is merged, where it is written, what goes on after a kill."""

import io
import json
import os
import signal
import subprocess
import sys
import weakref

import numpy as np
import pytest
from recipe_cases import (
  BF16,
  LAYERS,
  TOWER,
  llama_config,
  llama_shapes,
  same,
  slerp_of,
  tensors_of,
  ties_of,
  wide,
  write_llamas,
  write_model,
)
from rich.console import Console
from safetensors.numpy import load_file, save_file

from cqd_jax.hub import merge_recipe as running
from cqd_jax.hub.merge_recipe import MergeOptions, merge_recipe

ATTENTION = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llamas(root):
  return write_llamas(root, ("base", "one", "two"))


@pytest.fixture
def merge(root, tmp_path, monkeypatch):
  """Runs a recipe among the models; returns the result's tensors and config."""

  def run(text, out="merged", **options):
    monkeypatch.chdir(root)
    (tmp_path / "recipe.yml").write_text(text)
    merge_recipe(
      tmp_path / "recipe.yml", tmp_path / out, Console(file=io.StringIO(), width=200), MergeOptions(**options)
    )
    files = sorted((tmp_path / out).glob("*.safetensors"))
    config = tmp_path / out / "config.json"
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return tensors, json.loads(config.read_text()) if config.exists() else {}

  return run


def every(got, expected):
  """Compares all tensors with what a function of a name gives."""
  assert set(got) == set(llama_shapes())
  for name, tensor in got.items():
    same(tensor, expected(name))


def test_linear_weights_are_normalized(merge, llamas):
  got, config = merge(
    "{merge_method: linear, models: [{model: one, parameters: {weight: 1}}, {model: two, parameters: {weight: 3}}]}"
  )
  every(got, lambda name: 0.25 * wide(llamas["one"][name]) + 0.75 * wide(llamas["two"][name]))
  assert config == llama_config()


def test_linear_sums_plainly_if_told(merge, llamas):
  got, _ = merge(
    "{merge_method: linear, parameters: {normalize: false, weight: -2}, models: [{model: one}, "
    "{model: two, parameters: {weight: 0.5}}]}"
  )
  every(got, lambda name: -2 * wide(llamas["one"][name]) + 0.5 * wide(llamas["two"][name]))


def test_linear_takes_a_base_as_one_more_input(merge, llamas):
  got, _ = merge("{merge_method: linear, base_model: base, parameters: {weight: 1}, models: [{model: one}]}")
  every(got, lambda name: (wide(llamas["one"][name]) + wide(llamas["base"][name])) / 2)


def test_task_arithmetic_adds_task_vectors_times_lambda(merge, llamas):
  got, _ = merge("""
merge_method: task_arithmetic
base_model: base
parameters: {lambda: 0.5}
models:
  - {model: one, parameters: {weight: 0.4}}
  - {model: base}
  - {model: two, parameters: {weight: -1}}
""")
  one, two, base = (llamas[name] for name in ("one", "two", "base"))
  every(
    got,
    lambda name: (
      wide(base[name]) + 0.2 * (wide(one[name]) - wide(base[name])) - 0.5 * (wide(two[name]) - wide(base[name]))
    ),
  )


def test_task_arithmetic_without_experts_is_the_base(merge, llamas):
  got, _ = merge("{merge_method: task_arithmetic, base_model: base, models: [{model: base}]}")
  every(got, lambda name: wide(llamas["base"][name]))


TIES = """
merge_method: ties
base_model: base
models:
  - {model: one, parameters: {weight: 0.7, density: 0.5}}
  - {model: two, parameters: {weight: 0.4, density: 0.25}}
"""


def test_ties_with_a_density_for_each_model(merge, llamas):
  got, _ = merge(TIES + "parameters: {lambda: 0.9}")
  experts = lambda name: [llamas["one"][name], llamas["two"][name]]  # noqa: E731
  every(got, lambda name: ties_of(llamas["base"][name], experts(name), (0.7, 0.4), (0.5, 0.25), scale=0.9))


def test_slerp_with_gradients_by_filter_as_in_mergekits_example(merge, llamas):
  got, _ = merge("""
slices:
  - sources:
      - {model: base, layer_range: [0, 3]}
      - {model: one, layer_range: [0, 3]}
merge_method: slerp
base_model: base
parameters:
  t:
    - {filter: self_attn, value: [0.1, 0.5, 0.3, 0.7, 0.9]}
    - {filter: mlp, value: [0.9, 0.4]}
    - value: 0.5
dtype: float32
""")
  along = {"self_attn": (0.1, 0.3, 0.9), "mlp": (0.9, 0.65, 0.4)}  # of three layers: the depths 0, 1/2, 1

  def expected(name):
    kind = next((kind for kind in along if kind in name), None)
    return slerp_of(llamas["base"][name], llamas["one"][name], along[kind][int(name.split(".")[2])] if kind else 0.5)

  every(got, expected)


def test_a_gradient_begins_at_its_first_value_also_behind_the_layers(merge, llamas):
  got, _ = merge("{merge_method: passthrough, models: [{model: one, parameters: {scale: [2, 4]}}]}")
  factors = {0: 2.0, 1: 3.0, 2: 4.0}
  every(got, lambda name: wide(llamas["one"][name]) * (factors[int(name.split(".")[2])] if "layers" in name else 2.0))


def test_what_is_nearer_counts_source_before_slice_before_module_before_all(merge, llamas):
  got, _ = merge("""
merge_method: linear
parameters: {weight: 1, normalize: false}
modules:
  default:
    parameters: {weight: {filter: norm, value: 10}}
    slices:
      - sources:
          - {model: one, layer_range: [0, 1], parameters: {weight: {filter: up_proj, value: 1000}}}
        parameters: {weight: {filter: q_proj, value: 100}}
      - sources: [{model: one, layer_range: [1, 3]}]
""")
  factors = {"layers.0.mlp": 1000.0, "layers.0.self": 100.0, "norm": 10.0}
  every(got, lambda name: wide(llamas["one"][name]) * next((f for part, f in factors.items() if part in name), 1.0))


def test_layers_are_stacked_and_numbered_through(merge, llamas):
  got, config = merge("""
merge_method: passthrough
slices:
  - sources: [{model: one, layer_range: [0, 2]}]
  - sources: [{model: two, layer_range: [1, 3], parameters: {scale: [{filter: layers.2.mlp, value: 2}]}}]
""")
  assert config["num_hidden_layers"] == 4
  assert len([name for name in got if "q_proj" in name]) == 4
  for layer, (model, own) in enumerate((("one", 0), ("one", 1), ("two", 1), ("two", 2))):
    same(got[ATTENTION.format(layer)], wide(llamas[model][ATTENTION.format(own)]))
  up = "model.layers.{}.mlp.up_proj.weight"  # the filter is of the name in the model that is read
  same(got[up.format(3)], 2 * wide(llamas["two"][up.format(2)]))
  same(got["model.embed_tokens.weight"], wide(llamas["one"]["model.embed_tokens.weight"]))
  for behind in ("model.norm.weight", "lm_head.weight"):
    same(got[behind], wide(llamas["two"][behind]))


def test_a_config_follows_its_layers(merge, root):
  kinds = ["full", "sliding", "full"]
  write_model(root / "kinds", tensors_of(llama_shapes(), 7), llama_config(layer_types=kinds))
  _, config = merge("""
merge_method: passthrough
slices:
  - sources: [{model: kinds, layer_range: [1, 2]}]
  - sources: [{model: kinds, layer_range: [0, 2]}]
""")
  assert config["layer_types"] == ["sliding", "full", "sliding"]
  assert config["num_hidden_layers"] == 3


def test_half_precision_is_rounded_once(merge, root):
  made = write_llamas(root / "half", ("base", "one", "two"), BF16)
  got, config = merge(
    TIES.replace(": base", ": half/base").replace(": one", ": half/one").replace(": two", ": half/two")
  )
  assert config["torch_dtype"] == "bfloat16"
  for name, tensor in got.items():
    assert tensor.dtype == BF16
    expected = ties_of(made["base"][name], [made["one"][name], made["two"][name]], (0.7, 0.4), (0.5, 0.25))
    same(tensor, expected, 2**-8)
    assert np.mean(wide(tensor) == wide(expected.astype(np.float32).astype(BF16))) > 0.98


def test_dtypes_of_merge_and_result(merge, llamas):
  text = "merge_method: passthrough\nmodels: [{model: one}]\n"
  got, config = merge(text + "dtype: torch.bfloat16\nout_dtype: float32")
  assert config["torch_dtype"] == "float32"
  every(got, lambda name: wide(llamas["one"][name].astype(BF16)))
  got, config = merge(text + "out_dtype: float16", "half")
  assert config["torch_dtype"] == "float16"
  assert {tensor.dtype for tensor in got.values()} == {np.dtype(np.float16)}


def write_adapter(folder, rank=2, alpha=4.0, config=None, **factors):
  folder.mkdir(parents=True)
  save_file(factors, folder / "adapter_model.safetensors")
  (folder / "adapter_config.json").write_text(
    json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none"} | (config or {}))
  )


def test_an_adapter_is_added_to_its_model(merge, root, llamas):
  draw = np.random.default_rng(5)
  a, b = draw.normal(size=(2, 8)).astype(np.float32), draw.normal(size=(8, 2)).astype(np.float32)
  module = "base_model.model.model.layers.1.self_attn.q_proj"
  write_adapter(root / "lora", **{f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b})
  text = "{merge_method: linear, models: [{model: MODEL, parameters: {weight: 1}}]}"
  got, _ = merge(text.replace("MODEL", "base+lora"))
  name = ATTENTION.format(1)
  every(got, lambda one: wide(llamas["base"][one]) + (2.0 * wide(b) @ wide(a) if one == name else 0.0))
  again, _ = merge(text.replace("MODEL", "{model: {path: base}, lora: {path: lora}}"), "again")
  np.testing.assert_array_equal(again[name], got[name])


def test_models_of_other_kinds_merge_by_their_names(merge, root):
  shapes = llama_shapes() | TOWER
  made = {name: tensors_of(shapes, seed) for seed, name in enumerate(("seeing", "watching"))}
  position = {"vision_tower.position_ids": np.arange(9)[None]}
  config = {"text_config": {"num_hidden_layers": LAYERS}, "vision_config": {"num_hidden_layers": 2}}
  for name, tensors in made.items():
    write_model(root / name, tensors | position, config)
  got, config = merge("""
merge_method: linear
parameters: {normalize: false}
models:
  - {model: seeing, parameters: {weight: [0, 1]}}
  - {model: watching, parameters: {weight: 1}}
""")
  np.testing.assert_array_equal(got.pop("vision_tower.position_ids"), np.arange(9)[None])
  assert set(got) == set(shapes)
  depths = {"model.layers": (0.0, 0.5, 1.0), "vision_tower.encoder.layers": (0.0, 1.0)}  # each stack has its own
  for name, tensor in got.items():
    stack = next((stack for stack in depths if name.startswith(stack)), None)
    weight = depths[stack][int(name[len(stack) + 1 :].split(".")[0])] if stack else 0.0
    same(tensor, weight * wide(made["seeing"][name]) + wide(made["watching"][name]))
  got, config = merge(
    """
merge_method: passthrough
modules:
  vision_tower: {slices: [{sources: [{model: seeing, layer_range: [1, 2]}]}]}
  default: {models: [{model: watching}]}
""",
    "modules",
  )
  same(
    got["vision_tower.encoder.layers.0.attn.weight"], wide(made["seeing"]["vision_tower.encoder.layers.1.attn.weight"])
  )
  assert "vision_tower.encoder.layers.1.attn.weight" not in got
  same(got["projector.scale"], wide(made["watching"]["projector.scale"]))
  assert config["vision_config"]["num_hidden_layers"] == 1
  assert config["text_config"]["num_hidden_layers"] == LAYERS


LINEAR = "{merge_method: linear, parameters: {weight: 1}, models: [{model: ONE}, {model: TWO}]}"


def test_a_tied_head_is_the_embedding(merge, root, llamas):
  tied = write_model(root / "tied", tensors_of(llama_shapes(head=False), 9), llama_config(tie_word_embeddings=True))
  got, config = merge(LINEAR.replace("ONE", "tied").replace("TWO", "one"))
  same(got["lm_head.weight"], (wide(tied["model.embed_tokens.weight"]) + wide(llamas["one"]["lm_head.weight"])) / 2)
  assert not config["tie_word_embeddings"]
  got, config = merge(LINEAR.replace("ONE", "tied").replace(", {model: TWO}", ""), "alone")
  assert "lm_head.weight" not in got
  assert config["tie_word_embeddings"]


def test_what_not_all_models_have_is_refused_or_kept(merge, root, llamas, tmp_path):
  extra = {"model.layers.1.self_attn.q_norm.weight": (4,)}
  more = write_model(root / "more", tensors_of(llama_shapes() | extra, 4), llama_config())
  text = LINEAR.replace("ONE", "one").replace("TWO", "more")
  with pytest.raises(ValueError, match=r"q_norm.weight: one misses it, more has it; .*--missing keep"):
    merge(text)
  assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]
  got, _ = merge(text, keep=True)
  (name,) = extra
  same(got.pop(name), wide(more[name]))
  every(got, lambda one: (wide(more[one]) + wide(llamas["one"][one])) / 2)
  assert (
    name.replace("_", "\\_") in (tmp_path / "merged" / "README.md").read_text()
    or name in (tmp_path / "merged" / "README.md").read_text()
  )


def test_documents_use_one_another(merge, llamas, tmp_path):
  got, _ = merge("""
merge_method: linear
parameters: {weight: 1}
models: [{model: half way}, {model: two}]
---
name: half way
merge_method: linear
parameters: {weight: 1}
models: [{model: base}, {model: one}]
""")
  every(
    got, lambda name: wide(llamas["base"][name]) / 4 + wide(llamas["one"][name]) / 4 + wide(llamas["two"][name]) / 2
  )
  assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "recipe.yml"]


@pytest.mark.usefixtures("llamas")
def test_tokenizer_template_and_card(merge, root, tmp_path):
  (root / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
  merge(TIES + "tokenizer_source: base")
  made = tmp_path / "merged"
  assert "of the tokenizer" in json.loads((made / "tokenizer_config.json").read_text())["chat_template"]
  card = (made / "README.md").read_text()
  assert "apache-2.0" in card
  assert TIES.strip() in card
  merge(TIES + "chat_template: '{% for one in messages %}{{ one }}{% endfor %}'", "own")
  assert (tmp_path / "own" / "chat_template.jinja").read_text() == "{% for one in messages %}{{ one }}{% endfor %}"
  assert "chat_template" not in json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())
  merge(TIES + "chat_template: auto", "auto")
  assert (tmp_path / "auto" / "chat_template.jinja").read_text() == "{{ messages }} of the tokenizer"


@pytest.mark.usefixtures("llamas")
def test_shards_are_named_and_indexed(merge, tmp_path):
  whole, _ = merge(TIES)
  parts, _ = merge(TIES, "parts", max_shard_bytes=1000)
  index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
  files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
  assert len(files) == 4
  assert sorted(set(index["weight_map"].values())) == files
  assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
  for name, tensor in whole.items():
    np.testing.assert_array_equal(parts[name], tensor)


@pytest.mark.usefixtures("llamas")
def test_few_tensors_are_in_memory(merge, monkeypatch):
  alive, most = set(), [0]
  original = running.OpenModel.read

  def counted(self, *args):
    tensor = original(self, *args)
    alive.add(id(tensor))
    weakref.finalize(tensor, alive.discard, id(tensor))
    most[0] = max(most[0], len(alive))
    return tensor

  monkeypatch.setattr(running.OpenModel, "read", counted)
  merge(TIES)
  assert 1 <= most[0] <= 3  # of the base and two experts


KILLED = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from cqd_jax.hub import merge_recipe as running

made, original = [0], running.make_tensor
def make_tensor(*args):
  made[0] += 1
  if made[0] == int(sys.argv[3]):
    os.kill(os.getpid(), signal.SIGKILL)
  return original(*args)
running.make_tensor = make_tensor
running.merge_recipe(
  Path(sys.argv[1]), Path(sys.argv[2]), Console(), running.MergeOptions(max_shard_bytes=1000)
)
"""


@pytest.mark.usefixtures("llamas")
def test_a_killed_merge_goes_on_from_whole_shards(merge, root, tmp_path, monkeypatch):
  expected, _ = merge(TIES)
  command = [sys.executable, "-c", KILLED, str(tmp_path / "recipe.yml"), str(tmp_path / "killed"), "8"]
  killed = subprocess.run(command, cwd=root, capture_output=True, timeout=120, env=dict(os.environ))
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert not (tmp_path / "killed").exists()
  left = tmp_path / ".killed.merging" / "step-0"
  whole = {path.name for path in left.glob("model-*.safetensors")}
  assert whole
  made = []
  original = running.make_tensor
  monkeypatch.setattr(running, "make_tensor", lambda output, *rest: made.append(output.name) or original(output, *rest))
  got, _ = merge(TIES, "killed", max_shard_bytes=1000)
  assert set(made) | {name for file in whole for name in load_file(tmp_path / "killed" / file)} == set(expected)
  assert len(made) < len(expected)
  for name, tensor in expected.items():
    np.testing.assert_array_equal(got[name], tensor)
  assert not (tmp_path / ".killed.merging").exists()


@pytest.mark.usefixtures("llamas")
def test_shards_of_another_recipe_are_not_used(merge, root, tmp_path):
  expected, _ = merge(TIES)
  work = tmp_path / ".other.merging" / "step-0"
  work.mkdir(parents=True)
  save_file({"model.norm.weight": np.zeros(8, np.float32)}, work / "model.safetensors")
  (tmp_path / ".other.merging" / "merge.json").write_text('{"fingerprint": "of another"}')
  got, _ = merge(TIES, "other")
  assert set(got) == set(expected)
