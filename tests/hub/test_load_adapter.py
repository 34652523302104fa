"""LoRA adapters as peft saves them: read to what peft's own forward gives, or refused by name."""

import json
import pickle

import jax
import numpy as np
import pytest
import torch
from hf_cases import follow
from peft import AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from peft_cases import (
  CONFIGS,
  TOLERANCE,
  WARNINGS,
  Base,
  copy_adapter,
  dense,
  disturb,
  edit_json,
  is_update,
  largest_difference,
  our_logits,
  pick,
  read_update,
  save_by_peft,
  torch_logits,
)
from safetensors.torch import load_file, save_file

from cqd_jax.genotypes import CoreBasis
from cqd_jax.hub.experts import open_expert
from cqd_jax.hub.load_adapter import REFUSED
from cqd_jax.low_rank import LowRank
from cqd_jax.models.hf_config import UnsupportedModel
from cqd_jax.trees import map_with_path

pytestmark = [pytest.mark.filterwarnings(each) for each in WARNINGS]

TWO = {"target_modules": ["q_proj", "down_proj"]}
LINEAR = {"target_modules": "all-linear"}

CASES = {
  "plain": ("llama", TWO),
  "alpha": ("llama", {**TWO, "lora_alpha": 7}),
  "rank_stabilised": ("llama", {**TWO, "use_rslora": True, "lora_alpha": 5}),
  "endings": ("llama", {**TWO, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}),
  "dotted": (
    "llama",
    {**TWO, "rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"2.mlp.down_proj": 2.5}},
  ),
  "regex": (
    "llama",
    {**TWO, "rank_pattern": {r"layers\.[02]\.self_attn\..*": 1}, "alpha_pattern": {r".*\.(0|1)\.mlp\.\w+": 3}},
  ),
  # only the first is anchored at the beginning of a name; the last is no whole ending
  "anchored": (
    "llama",
    {**TWO, "rank_pattern": {"^model.layers.2.self_attn.q_proj": 3, "^layers.1.mlp.down_proj": 9, "proj": 5}},
  ),
  # peft sorts patterns when it saves them, and takes the first when it loads them
  "two_match": (
    "llama",
    {
      **TWO,
      "rank_pattern": {"layers.1.self_attn.q_proj": 4, "q_proj": 2},
      "alpha_pattern": {"layers.1.mlp.down_proj": 3, "down_proj": 11},
    },
  ),
  "stabilised_patterns": (
    "qwen3",
    {**TWO, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.down_proj": 3}},
  ),
  "some_layers": ("llama", {**TWO, "layers_to_transform": [0, 2]}),
  "one_layer": ("qwen3", {**TWO, "layers_to_transform": 1}),
  "one_module": ("llama", {"target_modules": r"model\.layers\.1\.mlp\.up_proj"}),
  "modules_by_regex": ("qwen2", {"target_modules": r".*(\.[01]\.self_attn\.[kv]|gate)_proj"}),
  "all_linear": ("llama", LINEAR),
  "all_linear_biased": ("qwen2", LINEAR),
  "all_linear_normed": ("qwen3", LINEAR),
  "embedding_and_head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
  "embedding_alone": ("qwen2", {"target_modules": ["embed_tokens"], "lora_alpha": 3}),
  "head_alone": ("llama", {"target_modules": ["lm_head"]}),
  "tied": ("qwen3", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
  "no_bias_to_train": ("llama", {**TWO, "bias": "all"}),
  "all_biases": ("qwen2", {**TWO, "bias": "all"}),
  "biases_of_modules": ("qwen2", {**TWO, "bias": "lora_only"}),
  "gaussian": ("llama", {**TWO, "init_lora_weights": "gaussian", "lora_dropout": 0.5}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bases")
  return {name: Base(folder / name, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
  """An adapter of Llama that others are made of."""
  return save_by_peft(bases["llama"], tmp_path_factory.mktemp("plain"), **TWO)


def check_leaves(update, base, folder):
  """Factors of the largest rank of a leaf where the file has factors, None where it has nothing, vectors as such."""
  tensors = load_file(folder / "adapter_model.safetensors")
  names = [name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in tensors]
  sizes = {name: min(tensor.shape) for name, tensor in zip(names, tensors.values(), strict=True) if ".lora_" in name}

  def check(path, leaf, own):
    placement = base.opened.placements[path]
    modules = [name.rpartition(".")[0] for name in placement.names]
    ranks = [size for name, size in sizes.items() if any(name.startswith(f"{module}.lora_") for module in modules)]
    if ranks and path[-1] != "bias":
      assert isinstance(own, LowRank)
      assert [array.dtype for array in own] == [np.float32] * 2
      assert own.b.shape == (*leaf.shape[:-1], max(ranks))
      assert own.a.shape == (*leaf.shape[:-2], max(ranks), leaf.shape[-1])
    elif path[-1] == "bias" and set(placement.names) & set(names):
      assert isinstance(own, np.ndarray)
      assert (own.shape, own.dtype) == (leaf.shape, np.float32)
    else:
      assert own is None

  structure = jax.tree.structure(base.params)
  map_with_path(check, base.params, jax.tree.unflatten(structure, structure.flatten_up_to(update)))


def check_logits(update, base, want):
  basis = CoreBasis.from_experts(base.params, [update])
  got = our_logits(basis.materialize(pick(basis.experts, 0)), base.config)
  assert largest_difference(got, want) < TOLERANCE
  return basis


# as the anchored ones that are meant to
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_what_peft_makes_of_it(case, bases, tmp_path):
  name, settings = CASES[case]
  base = bases[name]
  folder = save_by_peft(base, tmp_path / "adapter", seed=list(CASES).index(case), **settings)
  want = torch_logits(base.load(folder))
  assert largest_difference(want, torch_logits(base.fresh())) > 0.5
  update = read_update(folder, base)
  check_leaves(update, base, folder)
  basis = check_logits(update, base, want)
  assert all(fit.relative_error == 0 for fit in basis.fits())


def drop_copies(tensors):
  for name in [name for name in tensors if name.endswith(".base_layer.weight")]:
    tensors.pop(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["endings", "embedding_and_head", "all_biases"])
def test_adapters_in_16_bits_are_read_exactly(case, dtype, bases, tmp_path):
  name, settings = CASES[case]
  base = bases[name]
  folder = save_by_peft(base, tmp_path / "adapter", dtype=dtype, **settings)
  update = read_update(folder, base)
  check_leaves(update, base, folder)
  # peft takes its copies of the base's embedding and head, rounded, for the base; here the base rules
  check_logits(update, base, torch_logits(base.load(copy_adapter(folder, tmp_path / "bare", change=drop_copies))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["embedding_and_head", "all_biases"])
def test_a_base_in_bfloat16(case, dtype, tmp_path):
  name, settings = CASES[case]
  base = Base(tmp_path / "base", CONFIGS[name], torch.bfloat16)
  assert base.opened.dtype.name == "bfloat16"
  folder = save_by_peft(base, tmp_path / "adapter", dtype=dtype, **settings)
  check_logits(read_update(folder, base), base, torch_logits(base.load(folder)))


def test_a_base_in_bfloat16_whose_embedding_the_trainer_held_in_float32(tmp_path):
  """The stored copy has other bytes and the same values."""
  base = Base(tmp_path / "base", CONFIGS["llama"], torch.bfloat16)
  folder = save_by_peft(base, tmp_path / "adapter", target_modules=["embed_tokens"])
  stored = load_file(folder / "adapter_model.safetensors")["base_model.model.model.embed_tokens.base_layer.weight"]
  assert stored.dtype == torch.float32
  assert isinstance(read_update(folder, base)["embed"]["embedding"], LowRank)


def test_ranks_that_differ_from_layer_to_layer_are_filled_with_zeros(bases, tmp_path):
  base = bases["llama"]
  ranks = {"layers.0.mlp.down_proj": 1, "layers.2.mlp.down_proj": 6}
  folder = save_by_peft(base, tmp_path / "adapter", **TWO, rank_pattern=ranks, lora_alpha=5)
  update = read_update(folder, base)["layers"]["mlp"]["down"]["kernel"]
  tensors = load_file(folder / "adapter_model.safetensors")
  for layer, rank in enumerate((1, 4, 6)):
    module = f"base_model.model.model.layers.{layer}.mlp.down_proj"
    a, b = (tensors[f"{module}.lora_{part}.weight"].numpy() for part in "AB")
    assert not update.b[layer, :, rank:].any()
    assert not update.a[layer, rank:].any()
    np.testing.assert_array_equal(update.b[layer, :, :rank], a.T)
    np.testing.assert_allclose(update.a[layer, :rank], b.T * (5 / rank), rtol=1e-6)


def test_the_size_of_an_adapter(plain, bases):
  expert = open_expert(plain, bases["llama"].opened)
  tensors = load_file(plain / "adapter_model.safetensors").values()
  assert expert.num_bytes == sum(4 * tensor.numel() for tensor in tensors)
  assert expert.kind == "LoRA adapter"


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights of the model:UserWarning")
def test_pissa_converted_as_the_refusal_of_it_advises(bases, tmp_path):
  base = bases["llama"]
  torch.manual_seed(0)
  model = get_peft_model(base.fresh(), LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights="pissa", **TWO))
  config = model.peft_config["default"]
  config.init_lora_weights = True
  model.save_pretrained(tmp_path / "start")
  config.init_lora_weights = "pissa"
  disturb([each for each in model.named_parameters() if each[1].requires_grad], 0.2)
  model.save_pretrained(tmp_path / "kept")
  with pytest.raises(UnsupportedModel, match=r"init_lora_weights='pissa'.*path_initial_model_for_weight_conversion"):
    read_update(tmp_path / "kept", base)
  model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
  check_logits(read_update(tmp_path / "converted", base), base, torch_logits(model.eval()))


@pytest.mark.parametrize(
  ("settings", "named"),
  [
    ({"use_dora": True}, "use_dora"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    pytest.param(
      {"lora_bias": True},
      "lora_bias",
      marks=pytest.mark.filterwarnings("ignore:Adapter .default.. . LoRA tensor.s. have invalid shape"),
    ),
    ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "trainable_token_indices"),
    ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
  ],
)
def test_what_peft_can_do_besides_is_refused_by_name(settings, named, bases, tmp_path):
  folder = save_by_peft(bases["qwen2"], tmp_path / "adapter", target_modules=["q_proj"], **settings)
  with pytest.raises(UnsupportedModel, match=rf"adapter_config\.json: .*{named}"):
    read_update(folder, bases["qwen2"])


@pytest.mark.parametrize("name", REFUSED)
def test_every_setting_that_is_refused_is_one_of_peft(name, plain, bases, tmp_path):
  assert name in LoraConfig.__dataclass_fields__
  folder = copy_adapter(plain, tmp_path / "adapter", config={name: {"any": 1}})
  with pytest.raises(UnsupportedModel, match=rf"adapter_config\.json: {name} "):
    read_update(folder, bases["llama"])


@pytest.mark.parametrize("start", ["loftq", "corda", "lora_ga", "mica", ["pissa"], 3])
def test_starts_that_change_the_base_are_refused(start, plain, bases, tmp_path):
  folder = copy_adapter(plain, tmp_path / "adapter", config={"init_lora_weights": start})
  with pytest.raises(UnsupportedModel, match="init_lora_weights="):
    read_update(folder, bases["llama"])


@pytest.mark.parametrize(
  "config",
  [
    IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, **TWO),
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
  ],
  ids=lambda config: config.peft_type.value,
)
def test_other_kinds_of_adapters_are_refused(config, bases, tmp_path):
  get_peft_model(bases["llama"].fresh(), config).save_pretrained(tmp_path / "adapter")
  with pytest.raises(UnsupportedModel, match=f"adapters of type '{config.peft_type.value}' are not supported"):
    read_update(tmp_path / "adapter", bases["llama"])


@pytest.mark.parametrize(
  ("config", "named"),
  [
    ({"peft_type": None}, "adapters of type None"),
    ({"r": "4"}, "r: expected an integer of at least 1, got '4'"),
    ({"r": True}, "r: expected an integer of at least 1, got True"),
    ({"r": 0}, "r: expected an integer of at least 1, got 0"),
    ({"r": 4.0}, "r: expected an integer of at least 1, got 4.0"),
    ({"r": None}, "r: expected an integer of at least 1, got None"),
    ({"lora_alpha": "8"}, "lora_alpha: expected a number, got '8'"),
    ({"lora_alpha": None}, "lora_alpha: expected a number, got None"),
    ({"lora_alpha": float("nan")}, "lora_alpha: expected a number, got nan"),
    ({"lora_alpha": 10**400}, "lora_alpha: expected a number, got 1000"),
    ({"alpha_pattern": {"q_proj": [8]}}, r"lora_alpha: expected a number, got \[8\] for .*q_proj"),
    ({"rank_pattern": {"q_proj": None}}, "r: expected an integer of at least 1, got None for .*q_proj"),
    ({"rank_pattern": ["q_proj"]}, r"rank_pattern: expected values by pattern, got \['q_proj'\]"),
    ({"rank_pattern": {"q_(proj": 4}}, r"rank_pattern: 'q_\(proj' is no pattern"),
    ({"alpha_pattern": {"q{99999999999999999999}": 4}}, "alpha_pattern: .* is no pattern"),
    ({"alpha_pattern": {"(" * 140: 4}}, "alpha_pattern: .* is no pattern"),
    ({"alpha_pattern": {"(" * 9999: 4}}, r"alpha_pattern: the pattern '\(+'\.\.\. is not supported \(longer than"),
    ({"rank_pattern": {r"(q_proj)\1": 4}}, "rank_pattern: the pattern '.*' is not supported \\(references to groups"),
    (
      {"rank_pattern": {"(_*[a-z]*)*x": 4}},
      "rank_pattern: the pattern '.*' is not supported \\(a group that",
    ),
    ({"rank_pattern": {"(a|a|[a-z.0-9]|.)+x": 4}}, "rank_pattern: the pattern '.*' is not supported \\(a group"),
    (
      {"alpha_pattern": {".*.*.*.*x": 4}},
      "alpha_pattern: the pattern '.*' is not supported \\(more than 2,000,000 ways",
    ),
    ({"bias": "some"}, "bias: expected none, all or lora_only, got 'some'"),
    ({"bias": ["all"]}, r"bias: expected none, all or lora_only, got \['all'\]"),
  ],
)
def test_settings_that_cannot_be_are_named(config, named, plain, bases, tmp_path):
  folder = copy_adapter(plain, tmp_path / "adapter", config=config)
  with pytest.raises(ValueError, match=rf"adapter_config\.json: {named}"):
    read_update(folder, bases["llama"])


def test_a_config_that_is_no_object_is_named(plain, bases, tmp_path):
  folder = copy_adapter(plain, tmp_path / "adapter")
  (folder / "adapter_config.json").write_text("[1]")
  with pytest.raises(ValueError, match=r"adapter_config\.json: expected settings by name, got list"):
    read_update(folder, bases["llama"])


MODULE = "base_model.model.model.layers.1.self_attn.q_proj"


def rename(old, new):
  return lambda tensors: tensors.update({new: tensors.pop(old)})


def set_tensor(name, *shape):
  return lambda tensors: tensors.update({name: torch.ones(shape)})


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (lambda tensors: tensors.pop(f"{MODULE}.lora_A.weight"), "misses the LoRA factor A of 'model.layers.1.self_attn"),
    (lambda tensors: tensors.pop(f"{MODULE}.lora_B.weight"), "misses the LoRA factor B of 'model.layers.1.self_attn"),
    (lambda tensors: tensors.clear(), "holds no weights"),
    (
      rename(f"{MODULE}.lora_A.weight", f"{MODULE}.lora_A"),
      r"belongs to .*q_proj\.lora_A', which the base model has not",
    ),
    (rename(f"{MODULE}.lora_A.weight", "what"), "'what' belongs to 'what', which the base model has not"),
    (
      rename(f"{MODULE}.lora_A.weight", MODULE.replace(".1.", ".3.") + ".lora_A.weight"),
      r"belongs to 'model\.layers\.3\.self_attn\.q_proj\.weight', which the base model has not",
    ),
    (set_tensor(f"{MODULE}.lora_magnitude_vector", 32), r"belongs to .*q_proj\.lora_magnitude_vector', which the base"),
    (set_tensor(f"{MODULE}.base_layer.bias", 32), r"belongs to 'model\.layers\.1\.self_attn\.q_proj\.bias', which"),
    (set_tensor(f"{MODULE}.lora_A.weight", 5, 32), r"shapes \(5, 32\) and \(32, 4\); with rank 4 the base model needs"),
    (set_tensor(f"{MODULE}.lora_A.weight", 4, 31), r"needs \(4, 32\) and \(32, 4\)"),
    (set_tensor(f"{MODULE}.lora_B.weight", 4), r"shapes \(4, 32\) and \(4,\)"),
    # factors by the names of an embedding's
    (
      rename(f"{MODULE}.lora_A.weight", f"{MODULE}.lora_embedding_A"),
      "lora_embedding_A', which the base model has not",
    ),
    (
      lambda tensors: [
        set_tensor("base_model.model.model.embed_tokens.lora_A.weight", 4, 32)(tensors),
        set_tensor("base_model.model.model.embed_tokens.lora_B.weight", 97, 4)(tensors),
      ],
      r"belongs to 'model\.embed_tokens\.lora_[AB]\.weight', which the base model has not",
    ),
    (
      lambda tensors: [
        set_tensor("base_model.model.model.norm.lora_A.weight", 4, 32)(tensors),
        set_tensor("base_model.model.model.norm.lora_B.weight", 32, 4)(tensors),
      ],
      r"has LoRA factors of 'model\.norm', which is no matrix",
    ),
    (set_tensor(f"{MODULE[17:]}.lora_A.weight", 4, 32), "are the same tensor of 'model.layers.1.self_attn.q_proj'"),
    (
      set_tensor("base_model.model.model.norm.weight", 32),
      "'base_model.model.model.norm.weight' is not that of the base",
    ),
    (set_tensor(f"{MODULE}.weight", 32, 32), "weights that were trained in full beside an adapter are not supported"),
    (set_tensor(f"{MODULE}.weight", 32, 31), r"has shape \(32, 31\), the base model \(32, 32\)"),
  ],
)
def test_tensors_that_do_not_fit_are_named(change, named, plain, bases, tmp_path):
  folder = copy_adapter(plain, tmp_path / "adapter", change=change)
  with pytest.raises(ValueError, match=rf"{folder}.*{named}"):
    read_update(folder, bases["llama"])


def test_a_rank_in_the_config_that_is_not_the_tensors(plain, bases, tmp_path):
  for index, config in enumerate(({"r": 5}, {"rank_pattern": {"layers.2.mlp.down_proj": 3}})):
    folder = copy_adapter(plain, tmp_path / str(index), config=config)
    with pytest.raises(ValueError, match=r"with rank [35] the base model needs"):
      read_update(folder, bases["llama"])


def test_a_scale_beyond_float32_is_named(plain, bases, tmp_path):
  folder = copy_adapter(plain, tmp_path / "adapter", config={"lora_alpha": 1e300})
  with pytest.raises(ValueError, match=r"lora_B\.weight' times .* does not fit in float32"):
    read_update(folder, bases["llama"])


def test_factors_that_are_not_finite_are_named(plain, bases, tmp_path):
  folder = copy_adapter(
    plain, tmp_path / "adapter", change=lambda tensors: tensors[f"{MODULE}.lora_B.weight"][3, 1].fill_(float("nan"))
  )
  with pytest.raises(ValueError, match=r"q_proj\.lora_B\.weight' holds NaN or infinite values"):
    read_update(folder, bases["llama"])


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True. as the embedding layer has been resized")
@pytest.mark.filterwarnings("ignore:The new embeddings will be initialized")
def test_an_embedding_that_was_resized_is_refused(bases, tmp_path):
  model = bases["llama"].fresh()
  model.resize_token_embeddings(101)
  get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **TWO)).save_pretrained(tmp_path / "adapter")
  with pytest.raises(ValueError, match=r"has shape \(101, 32\), the base model \(97, 32\)"):
    read_update(tmp_path / "adapter", bases["llama"])


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_an_embedding_that_was_trained_in_full_is_refused(name, bases, tmp_path):
  folder = save_by_peft(bases["llama"], tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"])
  read_update(folder, bases["llama"])
  tensor = f"base_model.model.{name}.base_layer.weight"
  edited = copy_adapter(folder, tmp_path / "edited", change=lambda tensors: tensors[tensor][50, 3].add_(1e-3))
  with pytest.raises(ValueError, match=rf"{tensor}' is not that of the base {bases['llama'].folder}"):
    read_update(edited, bases["llama"])


@pytest.mark.parametrize(
  ("targets", "named"),
  [
    (["embed_tokens"], "changes the embedding of a base model whose head is its embedding"),
    (["lm_head", "q_proj"], "changes the head of a base model whose head is its embedding"),
    (["embed_tokens", "lm_head"], "supported is the same change of both"),
  ],
)
def test_a_tied_base_needs_one_change_of_embedding_and_head(targets, named, bases, tmp_path):
  folder = save_by_peft(bases["qwen3"], tmp_path / "adapter", target_modules=targets)
  with pytest.raises(UnsupportedModel, match=named):
    read_update(folder, bases["qwen3"])


class Trap:
  """What runs when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), "w")


def test_a_pickled_adapter_is_never_loaded(plain, bases, tmp_path):
  folder = copy_adapter(plain, tmp_path / "adapter")
  (folder / "adapter_model.safetensors").unlink()
  (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
  with pytest.raises(
    ValueError, match=rf"{folder}: its weights are pickle files \(adapter_model\.bin\), which are never"
  ):
    read_update(folder, bases["llama"])
  assert not (tmp_path / "sprung").exists()
  (folder / "adapter_model.bin").unlink()
  with pytest.raises(ValueError, match=rf"{folder}: has no adapter_model\.safetensors"):
    read_update(folder, bases["llama"])


def test_the_conversion_of_an_adapter_that_is_advised_works(plain, bases, tmp_path):
  folder = copy_adapter(plain, tmp_path / "an adapter")
  expected = read_update(folder, bases["llama"])
  torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
  (folder / "adapter_model.safetensors").unlink()
  with pytest.raises(ValueError, match="pickle") as caught:
    read_update(folder, bases["llama"])
  follow(str(caught.value))
  found = read_update(folder, bases["llama"])
  jax.tree.map(np.testing.assert_array_equal, found, expected)


ATTEMPTS = 250


def damage(content, source):
  """One to three bits turned over, or the end cut off."""
  content = bytearray(content)
  if source.uniform() < 0.3:
    return bytes(content[: source.integers(len(content))])
  for place in source.integers(len(content), size=source.integers(1, 4)):
    content[place] ^= 1 << source.integers(8)
  return bytes(content)


def try_to_read(folder, base):
  try:
    return read_update(folder, base), None
  except (ValueError, OSError) as error:
    return None, error


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")  # in damaged patterns
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_adapters_are_refused_by_name_or_read(name, bases, tmp_path):
  base = bases["llama"]
  folder = save_by_peft(
    base, tmp_path / "adapter", **TWO, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.[01]\.mlp\.\w+": 3}
  )
  config = json.loads((folder / "adapter_config.json").read_text())
  short = {key: value for key, value in config.items() if value or key in ("r", "bias")}
  (folder / "adapter_config.json").write_text(json.dumps(short))
  # Half of the damage to weights is to their header, which is a small part of the file.
  whole = (folder / name).read_bytes()
  header = 8 + int.from_bytes(whole[:8], "little") if name.endswith("safetensors") else 0
  source = np.random.default_rng(0)
  refused = 0
  for index in range(ATTEMPTS):
    content = damage(whole[:header], source) + whole[header:] if index % 2 and header else damage(whole, source)
    (folder / name).write_bytes(content)
    update, error = try_to_read(folder, base)
    refused += error is not None
    assert error is None or str(folder) in str(error)
    leaves = jax.tree.leaves(update, is_leaf=is_update) if error is None else []
    for own, like in zip(leaves, jax.tree.leaves(base.params), strict=error is None):
      assert dense(own, like).shape == like.shape
      assert np.isfinite(dense(own, like)).all()
  assert ATTEMPTS / 4 < refused < ATTEMPTS


def test_several_files_and_an_index(plain, bases, tmp_path):
  folder = copy_adapter(plain, tmp_path / "adapter")
  tensors = load_file(folder / "adapter_model.safetensors")
  (folder / "adapter_model.safetensors").unlink()
  weight_map = {name: f"adapter_model-{index % 2}.safetensors" for index, name in enumerate(tensors)}
  for file in set(weight_map.values()):
    save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
  (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  jax.tree.map(np.testing.assert_array_equal, read_update(folder, bases["llama"]), read_update(plain, bases["llama"]))
  edit_json(folder / "adapter_model.safetensors.index.json", {"weight_map": dict.fromkeys(tensors, "no")})
  with pytest.raises(ValueError, match="no: is missing"):
    read_update(folder, bases["llama"])
