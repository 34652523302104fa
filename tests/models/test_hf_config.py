"""The config.json of a model folder in both forms, judged by the config and model classes of transformers."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from decoder_cases import CONFIGS, PLAIN, STRETCHED

from cqd_jax.models import DecoderConfig, RopeScaling
from cqd_jax.models.hf_config import ARCHITECTURES, UnsupportedModel, decoder_config, hf_config

SIZES = {
  "vocab_size": 50,
  "hidden_size": 64,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 32,
}

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def judged(content, architecture=None):
  """The decoder that transformers makes of a config.json: sizes of its config class, features of its modules."""
  model_class = getattr(transformers, architecture or content["architectures"][0])
  config = model_class.config_class.from_dict(copy.deepcopy(content))
  with torch.device("meta"):
    model = model_class(config)
  attention, mlp, rope = model.model.layers[0].self_attn, model.model.layers[0].mlp, config.rope_parameters
  # The Mistral class has one window for all layers, the Qwen classes a window in each layer that slides.
  own = config if config.model_type == "mistral" else attention
  stretched = rope["rope_type"] == "llama3"
  return DecoderConfig(
    vocab_size=model.lm_head.weight.shape[0],
    hidden_size=model.lm_head.weight.shape[1],
    intermediate_size=mlp.up_proj.weight.shape[0],
    num_layers=len(model.model.layers),
    num_heads=attention.q_proj.weight.shape[0] // attention.head_dim,
    num_kv_heads=attention.k_proj.weight.shape[0] // attention.head_dim,
    head_dim=attention.head_dim,
    rope_theta=rope["rope_theta"],
    rope_scaling=RopeScaling(*(rope[name] for name in LLAMA3)) if stretched else None,
    rms_norm_eps=model.model.norm.variance_epsilon,
    qkv_bias=attention.q_proj.bias is not None,
    output_bias=attention.o_proj.bias is not None,
    mlp_bias=mlp.up_proj.bias is not None,
    qk_norm=hasattr(attention, "q_norm"),
    tie_embeddings=config.tie_word_embeddings,
    sliding_window=getattr(own, "sliding_window", None),
  )


def random_content(source):
  """A config.json: each entry is there or not, in the newer form or the older one."""

  def perhaps(entries):
    return entries if source.random() < 0.5 else {}

  architecture = str(source.choice(list(ARCHITECTURES)))
  content = {"architectures": [architecture], **SIZES}
  for entries in (
    {"model_type": ARCHITECTURES[architecture]["model_type"]},
    {"num_key_value_heads": [4, 32][source.integers(2)]},
    {"head_dim": 6},
    {"hidden_act": "silu"},
    {"rms_norm_eps": 1e-5},
    {"tie_word_embeddings": bool(source.random() < 0.5)},
    {"sliding_window": 5 if source.random() < 0.5 else None},
    {"max_position_embeddings": 512, "initializer_range": 0.02, "use_cache": True, "bos_token_id": 1},
  ):
    content |= perhaps(entries)
  if architecture != "MistralForCausalLM":
    content |= perhaps({"attention_bias": True})
    content |= {"num_key_value_heads": None} if source.random() < 0.2 else {}
  if architecture == "LlamaForCausalLM":
    content |= perhaps({"mlp_bias": True})
  if architecture.startswith("Qwen"):
    content |= perhaps({"use_sliding_window": True, "max_window_layers": 0})
    content |= perhaps({"max_window_layers": 2})
  return content | random_rope(source)


def random_rope(source):
  theta, kind = {"rope_theta": 5000.0} if source.random() < 0.5 else {}, source.integers(3)
  if source.random() < 0.5:
    rope = [{"rope_type": "default"}, {}, {"rope_type": "llama3", **LLAMA3}][kind]
    if source.random() < 0.5:
      return {"rope_parameters": rope | theta, "dtype": "bfloat16"}
    return {"rope_parameters": rope, **theta}
  name = "type" if source.random() < 0.5 else "rope_type"
  scaling = [{"rope_scaling": None}, {}, {"rope_scaling": {name: "llama3", **LLAMA3}}][kind]
  return theta | scaling | {"torch_dtype": "float16"}


def test_every_mix_of_entries_is_read_as_transformers_reads_it():
  source = np.random.default_rng(0)
  seen = set()
  for _ in range(100):
    content = random_content(source)
    expected = judged(content)
    assert decoder_config(content) == expected, content
    seen.add(dataclasses.astuple(expected))
  assert len(seen) > 60


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_silence_is_what_transformers_takes_it_for(architecture):
  content = {"architectures": [architecture], **SIZES}
  expected = judged(content)
  assert decoder_config(content) == expected
  # of model_type alone, as a config that was never saved with its model
  by_type = {"model_type": ARCHITECTURES[architecture]["model_type"], **SIZES}
  assert decoder_config(by_type) == expected


def test_of_both_forms_the_older_one_counts():
  newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}
  for older in ({"type": "llama3", **LLAMA3}, {"type": "llama3", "rope_theta": 55.0, **LLAMA3}, {}, None):
    content = {"architectures": ["LlamaForCausalLM"], **SIZES, **newer, "rope_scaling": older, "rope_theta": 33.0}
    assert decoder_config(content) == judged(content)


def test_the_published_configs():
  """Sizes, and features, of four models that people use, with the entries of their files."""
  llama = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
  }
  assert decoder_config(llama) == DecoderConfig(
    *(128256, 2048, 8192, 16, 32, 8, 64),
    rope_theta=500000.0,
    rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
    rms_norm_eps=1e-5,
    tie_embeddings=True,
  )
  qwen = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
  }
  sizes = (151936, 896, 4864, 24, 14, 2, 64)
  assert decoder_config(qwen) == DecoderConfig(*sizes, rope_theta=1e6, qkv_bias=True, tie_embeddings=True)


def described():
  """Every decoder that one of the architectures is."""
  for heads, kv_heads, head_dim in ((4, 4, 4), (4, 2, 6)):
    sized = dataclasses.replace(PLAIN, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    for scaling, tied in ((None, False), (STRETCHED, True)):
      plain = dataclasses.replace(sized, rope_scaling=scaling, tie_embeddings=tied, rms_norm_eps=1e-5)
      yield plain
      for biases in ({"mlp_bias": True}, {"qkv_bias": True, "output_bias": True}):
        yield dataclasses.replace(plain, **biases)
      for window in (None, 3):
        for features in ({}, {"qkv_bias": True}, {"qk_norm": True}):
          yield dataclasses.replace(plain, **features, sliding_window=window)
        yield dataclasses.replace(plain, qk_norm=True, qkv_bias=True, output_bias=True, sliding_window=window)
  yield dataclasses.replace(PLAIN, hidden_size=18)  # no multiple of the heads: no Llama for transformers


def test_what_is_written_is_read_back_and_transformers_reads_the_same():
  for config in described():
    content = json.loads(json.dumps(hf_config(config)))
    assert decoder_config(content) == config
    assert judged(content) == config
    # with the entries of whatever base it came from, that of a Mistral with a window and of a Qwen in the newer form
    for base in ({"architectures": ["MistralForCausalLM"], "sliding_window": 7}, *newer_forms()):
      settings = base | {"eos_token_id": [3, 4], "max_position_embeddings": 99}
      content = json.loads(json.dumps(hf_config(config, settings)))
      assert decoder_config(content) == config
      assert judged(content) == config
      assert content["eos_token_id"] == [3, 4]
      assert content["max_position_embeddings"] == 99


def newer_forms():
  yield {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": True,
    "use_sliding_window": True,
    "sliding_window": 9,
    "layer_types": ["sliding_attention"],
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0, **LLAMA3},
    "dtype": "float32",
  }
  yield {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True, "head_dim": 2}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_the_base_models_architecture_stays_where_it_fits(architecture):
  assert hf_config(PLAIN, {"architectures": [architecture]})["architectures"] == [architecture]
  windowed = hf_config(CONFIGS["window"], {"architectures": [architecture]})
  assert windowed["architectures"] == ["MistralForCausalLM"]


def test_the_longest_position_follows_from_the_scaling():
  assert hf_config(PLAIN)["max_position_embeddings"] == 4096
  assert hf_config(CONFIGS["rope_scaling"])["max_position_embeddings"] == 128


@pytest.mark.parametrize("features", [{"output_bias": True}, {"qk_norm": True, "mlp_bias": True}])
def test_a_decoder_of_no_architecture_is_refused(features):
  with pytest.raises(ValueError, match=r"config: no architecture of LlamaForCausalLM.*" + next(iter(features))):
    hf_config(dataclasses.replace(PLAIN, **features))


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "mrope", None, 3])
def test_other_rope_scaling_is_refused_by_name(form, kind):
  content = {"architectures": ["LlamaForCausalLM"], **SIZES, form: {"rope_type": kind, "factor": 2.0}}
  with pytest.raises(UnsupportedModel, match=rf"^here: rope scaling of type {kind!r} is not supported.*llama3"):
    decoder_config(content, "here")


LAYERS = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
  ("architecture", "changes", "named"),
  [
    ("GemmaForCausalLM", {}, "GemmaForCausalLM is not supported; supported are LlamaForCausalLM, Mistral"),
    ("LlamaForSequenceClassification", {}, "LlamaForSequenceClassification"),
    ("Qwen2MoeForCausalLM", {}, "Qwen2MoeForCausalLM"),
    (None, {"model_type": "gemma"}, "model_type 'gemma'"),
    (None, {"model_type": ["llama"]}, r"model_type \['llama'\]"),
    (None, {}, "model_type None"),
    ("LlamaForCausalLM", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: gptq"),
    ("LlamaForCausalLM", {"quantization_config": "fp8"}, "quantization_config: fp8"),
    ("LlamaForCausalLM", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("Qwen3ForCausalLM", {"hidden_act": ["silu"]}, "hidden_act"),
    ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("LlamaForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("Qwen2ForCausalLM", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "each kind of layer"),
    ("MistralForCausalLM", {"attention_bias": True}, "attention_bias of a Mistral"),
    ("Qwen2ForCausalLM", {"use_sliding_window": True, "layer_types": LAYERS}, "layer_types"),
    ("Qwen3ForCausalLM", {"use_sliding_window": True, "max_window_layers": 1}, "max_window_layers"),
    ("Qwen3ForCausalLM", {"use_sliding_window": True, "layer_types": ["chunked_attention"]}, "layer_types"),
  ],
)
def test_what_is_not_supported_is_refused_by_name(architecture, changes, named):
  content = SIZES | ({"architectures": [architecture]} if architecture else {}) | changes
  with pytest.raises(UnsupportedModel, match=f"^here: .*{named}"):
    decoder_config(content, "here")


HUGE = pytest.param(10**400, id="huge")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [None, 0, -3, 2.5, "64", True, [64], {}, 2**31, HUGE])
def test_sizes_that_are_missing_or_cannot_be_are_named(name, value):
  content = {"architectures": ["LlamaForCausalLM"], **SIZES, name: value}
  with pytest.raises(ValueError, match=f"^here: .*{name}"):
    decoder_config(content, "here")


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"architectures": []}, "architectures"),
    ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "architectures"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architectures"),
    ({"model_type": "qwen2"}, "model_type: expected 'llama'"),
    ({"num_key_value_heads": 5}, "num_kv_heads: expected a divisor of num_heads=32, got 5"),
    ({"num_attention_heads": 31}, "hidden_size=64 is no multiple of num_attention_heads=31"),
    ({"head_dim": 5}, "head_dim: expected an even width"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rope_theta": -1.0}, "rope_theta"),
    ({"rope_theta": float("inf")}, "rope_theta"),
    ({"rope_theta": 10**400}, "rope_theta"),  # no float holds it
    ({"rope_theta": "10000"}, "rope_theta"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "misses rope.factor"),
    ({"rope_scaling": {"type": "llama3", **LLAMA3, "factor": 0.5}}, "factor: expected at least 1"),
    ({"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1}}, "high_freq_factor"),
    ({"rope_scaling": {"type": "llama3", **LLAMA3, "original_max_position_embeddings": 64.0}}, "original_max_position"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false, got 1"),
    ({"attention_bias": "yes"}, "attention_bias"),
    ({"mlp_bias": 0}, "mlp_bias"),
  ],
)
def test_values_that_cannot_be_are_named(changes, named):
  with pytest.raises(ValueError, match=f"^here: .*{named}") as caught:
    decoder_config({"architectures": ["LlamaForCausalLM"], **SIZES} | changes, "here")
  assert str(caught.value).count("here") == 1


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"use_sliding_window": "yes"}, "use_sliding_window"),
    ({"sliding_window": 0, "max_window_layers": 0}, "sliding_window"),
    ({"max_window_layers": -1}, "max_window_layers"),
    ({"layer_types": {}}, "layer_types"),
    ({"layer_types": [[], {}]}, "layer_types"),
    ({"layer_types": []}, "layer_types"),
    ({"num_hidden_layers": 2**31 - 1}, "max_window_layers"),  # and no list of so many layers is made
  ],
)
def test_windows_that_cannot_be_are_named(architecture, changes, named):
  content = {"architectures": [architecture], **SIZES, "use_sliding_window": True} | changes
  with pytest.raises(ValueError, match=f"^here: .*{named}"):
    decoder_config(content, "here")
