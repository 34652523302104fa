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
from cqd_jax.hub.recipe_values import ModelReference
from cqd_jax.hub.recipe_vocabulary import Vocabulary

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


def same(got, expected, tolerance=2e-6):
  assert got.shape == expected.shape
  np.testing.assert_allclose(wide(got), expected, rtol=tolerance, atol=tolerance)


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


def unit(tensor):
  return tensor / np.sqrt((tensor**2).sum())


def length(tensor):
  return np.sqrt((tensor**2).sum())


def breadcrumbs_of(delta, density, gamma):
  """Neither the largest nor the smallest."""
  top, kept = int(gamma * delta.size), int(density * delta.size)
  ranks = np.argsort(np.argsort(-np.abs(delta).ravel())).reshape(delta.shape)
  return np.where((ranks >= top) & (ranks < top + kept), delta, 0.0)


def sce_of(base, one, two):
  """Of all entries, with weights by squares: the mean of those that have the sum's sign."""
  squares = [((expert - base) ** 2).mean() for expert in (one, two)]
  deltas, weights = [one - base, two - base], [square / sum(squares) for square in squares]
  agree = [np.sign(delta) == np.where(sum(deltas) >= 0, 1.0, -1.0) for delta in deltas]
  total = sum(w * delta * mask for w, delta, mask in zip(weights, deltas, agree, strict=True))
  return base + total / np.maximum(sum(w * mask for w, mask in zip(weights, agree, strict=True)), 1e-6)


def stock_of(base, one, two):
  cosine = (unit(one - base) * unit(two - base)).sum()
  return base + 2 * cosine / (1 + cosine) * ((one - base) + (two - base)) / 2


def iso_of(base, one, two):
  left, values, right = np.linalg.svd((one - base) + (two - base), full_matrices=False)
  return base + 0.5 * values.mean() * left @ right


EXPERTS = "models: [{model: one, parameters: {weight: 0.7}}, {model: two, parameters: {weight: 0.4}}]"
PLAIN = "models: [{model: one}, {model: two}]"
ALONE = "base_model: base\nmodels: [{model: one}]"
METHODS = {
  "nuslerp": (EXPERTS, lambda base, one, two: slerp_of(one, two, 0.4 / 1.1)),
  "nuslerp of task vectors": ("base_model: base\n" + EXPERTS, lambda b, x, y: b + slerp_of(x - b, y - b, 0.4 / 1.1)),
  "nuslerp by rows": (
    "parameters: {nuslerp_flatten: false}\n" + EXPERTS,
    lambda base, one, two: np.stack([slerp_of(x, y, 0.4 / 1.1) for x, y in zip(one, two, strict=True)]),
  ),
  "multislerp": (
    EXPERTS,
    lambda base, one, two: (0.7 * length(one) + 0.4 * length(two)) / 1.1 * unit(0.7 * unit(one) + 0.4 * unit(two)),
  ),
  "karcher": (PLAIN, lambda base, one, two: (length(one) + length(two)) / 2 * slerp_of(unit(one), unit(two), 0.5)),
  "model_stock": ("base_model: base\n" + PLAIN, stock_of),
  "model_stock by rows": (
    "base_model: base\nparameters: {filter_wise: true}\n" + PLAIN,
    lambda *models: np.stack([stock_of(*rows) for rows in zip(*models, strict=True)]),
  ),
  "breadcrumbs": (
    "base_model: base\nparameters: {density: 0.5, gamma: 0.1}\n" + EXPERTS,
    lambda b, x, y: b + 0.7 * breadcrumbs_of(x - b, 0.5, 0.1) + 0.4 * breadcrumbs_of(y - b, 0.5, 0.1),
  ),
  "breadcrumbs_ties": (
    "base_model: base\n" + EXPERTS,  # at density 1 nothing goes, not even outliers
    lambda b, x, y: ties_of(b, [x, y], (0.7, 0.4), (1.0, 1.0), normalize=False),
  ),
  "ties summed": (
    "base_model: base\nparameters: {normalize: false, density: 0.5, lambda: 0.9}\n" + EXPERTS,
    lambda b, x, y: ties_of(b, [x, y], (0.7, 0.4), (0.5, 0.5), normalize=False, scale=0.9),
  ),
  "della": ("base_model: base\n" + EXPERTS, lambda b, x, y: ties_of(b, [x, y], (0.7, 0.4), (1.0, 1.0))),
  "della_linear": ("base_model: base\n" + EXPERTS, lambda b, x, y: b + 0.7 * (x - b) + 0.4 * (y - b)),
  "nearswap": ("parameters: {t: 0.3}\n" + ALONE, lambda b, x, y: b + np.clip(x - b, -0.3, 0.3)),
  "sce": ("base_model: base\n" + PLAIN, sce_of),
  "ram": (
    "base_model: base\nparameters: {epsilon: 1}\n" + PLAIN,
    lambda b, x, y: (
      b
      + sum(np.where(np.abs(d) > 1, d, 0.0) for d in (x - b, y - b))
      / np.maximum(sum((np.abs(d) > 1) * 1.0 for d in (x - b, y - b)), 1.0)
    ),
  ),
  "ramplus_tl": ("base_model: base\nmodels: [{model: one}]", lambda b, x, y: x),  # nothing is shared
  "magmax": (
    "base_model: base\n" + PLAIN,
    lambda b, x, y: b + np.where(np.abs(x - b) >= np.abs(y - b), x - b, y - b),
  ),
  "iso_c": ("base_model: base\nparameters: {lambda: 0.5}\n" + PLAIN, iso_of),
}


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
  """Models of one matrix."""
  root = tmp_path_factory.mktemp("matrices")
  made = {name: tensors_of({"mlp.weight": (6, 8)}, 20 + seed) for seed, name in enumerate(("base", "one", "two"))}
  for name, tensors in made.items():
    write_model(root / name, tensors)
  return root, [wide(tensors["mlp.weight"]) for tensors in made.values()]


def merged_matrix(text, root, tmp_path, monkeypatch, **options):
  monkeypatch.chdir(root)
  (tmp_path / "recipe.yml").write_text(text)
  out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
  merge_recipe(tmp_path / "recipe.yml", out, Console(file=io.StringIO()), MergeOptions(**options))
  return wide(load_file(out / "model.safetensors")["mlp.weight"])


@pytest.mark.parametrize("case", METHODS)
def test_every_method_is_its_operator_in_mergekits_form(case, matrices, tmp_path, monkeypatch):
  root, models = matrices
  text, expected = METHODS[case]
  got = merged_matrix(f"merge_method: {case.split()[0]}\n{text}", root, tmp_path, monkeypatch)
  same(got, expected(*models), 2e-5)


@pytest.mark.parametrize("method", ["arcee_fusion", "consensus_merge", "tsv"])
def test_methods_that_keep_equal_experts(method, matrices, tmp_path, monkeypatch):
  root, (base, one, _) = matrices
  models = (
    ALONE if method != "consensus_merge" else f"base_model: base\nmodels: [{{model: one}}, {{model: {root}/one}}]"
  )
  got = merged_matrix(f"merge_method: {method}\n{models}", root, tmp_path, monkeypatch)
  if method == "arcee_fusion":  # an entry is of the base, or of the expert
    assert (np.isclose(got, base, atol=1e-6) | np.isclose(got, one, atol=1e-6)).all()
    assert 0 < np.isclose(got, one, atol=1e-6).sum() < got.size
  elif method == "tsv":  # one expert of full rank is itself
    same(got, one, 2e-5)
  else:  # twice the same, where both are active
    assert (np.isclose(got, base, atol=1e-5) | np.isclose(got, 2 * one - base, atol=1e-5)).all()


def test_della_draws_within_its_window(matrices, tmp_path, monkeypatch):
  root, (base, one, _) = matrices
  text = "merge_method: della_linear\nparameters: {weight: 1, density: 0.6, epsilon: 0.39, rescale: false}\n" + ALONE
  shares = np.stack([merged_matrix(text, root, tmp_path, monkeypatch, seed=seed) - base for seed in range(4)])
  kept = np.abs(shares) > 1e-6
  np.testing.assert_allclose(shares[kept], np.broadcast_to(one - base, shares.shape)[kept], atol=1e-5)
  by_size = np.take_along_axis(kept.mean(0), np.argsort(np.abs(one - base), axis=1), axis=1).mean(0)
  # The mean of 24 draws at probabilities .21 and .99 (sd .083 and .02); and the seeds are fixed.
  assert by_size[0] < 0.6 < 0.85 < by_size[-1]


def test_a_gradient_of_densities_is_as_exact_as_one_density(matrices, tmp_path, monkeypatch):
  root, (base, _, _) = matrices
  for method in ("ties", "breadcrumbs"):
    text = f"merge_method: {method}\nparameters: {{weight: 1, density: VALUE}}\n{ALONE}"
    one_density, gradient = (
      merged_matrix(text.replace("VALUE", value), root, tmp_path, monkeypatch) for value in ("0.25", "[0.25, 1]")
    )
    np.testing.assert_array_equal(gradient, one_density)
    assert np.isclose(gradient, base).sum() == 36
  none = merged_matrix(text.replace("breadcrumbs", "ties").replace("VALUE", "[0, 1]"), root, tmp_path, monkeypatch)
  same(none, base)


ONE_HAS = {
  "model": {"vocab": {"a": 0, "b": 1}},
  "added_tokens": [{"content": "<s>", "id": 2}, {"content": "<x>", "id": 3}],
}
TWO_HAS = {
  "model": {"vocab": {"a": 0, "b": 1}},
  "added_tokens": [{"content": "<y>", "id": 2}, {"content": "<s>", "id": 4}],
}


@pytest.fixture
def speakers(tmp_path):
  """Models with other numbers of the same tokens, and rows that are of no token."""
  root = tmp_path / "speakers"
  shapes = {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,), "lm_head.weight": (6, 4)}
  made = {name: tensors_of(shapes, seed) for seed, name in enumerate(("one", "two"))}
  for (name, tensors), tokenizer in zip(made.items(), (ONE_HAS, TWO_HAS), strict=True):
    write_model(root / name, tensors, {"vocab_size": 6}, {"tokenizer.json": tokenizer})
  return root, made


def test_a_union_puts_rows_in_the_order_of_its_tokens(speakers, tmp_path, monkeypatch):
  root, made = speakers
  monkeypatch.chdir(root)
  (tmp_path / "recipe.yml").write_text(
    "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: one}, {model: two}]\ntokenizer: {source: union}"
  )
  merge_recipe(tmp_path / "recipe.yml", tmp_path / "merged", Console(file=io.StringIO()), MergeOptions())
  got = load_file(tmp_path / "merged" / "model.safetensors")
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    one, two = (wide(made[model][name]) for model in ("one", "two"))
    # a, b, <s>, and <x> and <y>, of which each is in one model only
    same(got[name], np.stack([(one[0] + two[0]) / 2, (one[1] + two[1]) / 2, (one[2] + two[4]) / 2, one[3], two[2]]))
  same(got["model.norm.weight"], (wide(made["one"]["model.norm.weight"]) + wide(made["two"]["model.norm.weight"])) / 2)
  added = json.loads((tmp_path / "merged" / "tokenizer.json").read_text())["added_tokens"]
  assert {entry["content"]: entry["id"] for entry in added} == {"<s>": 2, "<x>": 3, "<y>": 4}
  assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 5


def test_a_base_has_the_rows_that_others_miss(speakers, tmp_path, monkeypatch):
  root, made = speakers
  monkeypatch.chdir(root)
  (tmp_path / "recipe.yml").write_text("""
merge_method: task_arithmetic
base_model: one
models: [{model: two, parameters: {weight: 0.5}}]
tokenizer_source: base
""")
  merge_recipe(tmp_path / "recipe.yml", tmp_path / "merged", Console(file=io.StringIO()), MergeOptions())
  got = load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"]
  one, two = (wide(made[model]["lm_head.weight"]) for model in ("one", "two"))
  same(got, np.stack([(one[0] + two[0]) / 2, (one[1] + two[1]) / 2, (one[2] + two[4]) / 2, one[3]]))


def test_tokens_of_several_owners_get_their_mean():
  a, b, c = (ModelReference(name) for name in "abc")
  rows = {a: np.array([0, -1, 1]), b: np.array([1, 0, -1]), c: np.array([0, 1, -1])}
  matrices = {model: np.arange(4, dtype=np.float32).reshape(2, 2) + 10 * n for n, model in enumerate((a, b, c))}
  filled = Vocabulary(rows, ()).filled(matrices, None)
  np.testing.assert_array_equal(filled[a], [[0, 1], [16, 17], [2, 3]])
  np.testing.assert_array_equal(filled[c], [[20, 21], [22, 23], [2, 3]])
  np.testing.assert_array_equal(Vocabulary(rows, ()).filled(matrices, c)[a][1], [22, 23])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_its_share_and_the_sum_of_magnitudes(method, matrices, tmp_path, monkeypatch):
  root, (base, one, _) = matrices
  text = f"merge_method: {method}\nparameters: {{weight: 1, density: 0.4}}\n{ALONE}"
  got = merged_matrix(text, root, tmp_path, monkeypatch)
  delta, sparse = one - base, got - base
  kept = np.abs(sparse) > 1e-5
  assert 5 <= kept.sum() <= 36  # of 48 with 0.4: within 4 standard deviations; and the seed is fixed
  assert abs(np.abs(sparse).sum() - np.abs(delta).sum()) < 1e-3
  ratio = sparse[kept] / delta[kept]
  np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)
  np.testing.assert_array_equal(merged_matrix(text, root, tmp_path, monkeypatch), got)
  assert not np.array_equal(merged_matrix(text, root, tmp_path, monkeypatch, seed=1), got)
