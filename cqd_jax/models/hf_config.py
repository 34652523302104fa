"""The `config.json` of a Hugging Face model folder as a `DecoderConfig`, and back.

Both forms of the file are read: that of transformers 5 (`rope_parameters`, `dtype`), and the older one (`rope_theta`,
`rope_scaling`, `torch_dtype`), which is also what is written, since both read it.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

from cqd_jax.models.config import DecoderConfig, RopeScaling

ARCHITECTURES: dict[str, dict[str, Any]] = {
  "LlamaForCausalLM": {"model_type": "llama"},
  "MistralForCausalLM": {"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": 4096},
  "Qwen2ForCausalLM": {"model_type": "qwen2", "num_key_value_heads": 32, "sliding_window": 4096},
  "Qwen3ForCausalLM": {"model_type": "qwen3", "num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
}
"""What is read, with the values that transformers takes where a file is silent (None: those of `_DEFAULTS`)."""

_DEFAULTS: dict[str, Any] = {
  "hidden_act": "silu",
  "rms_norm_eps": 1e-6,
  "rope_theta": 10_000.0,
  "tie_word_embeddings": False,
  "attention_bias": False,
  "mlp_bias": False,
  "use_sliding_window": False,
  "max_window_layers": 28,
  "partial_rotary_factor": 1.0,
}


_REPLACED = (
  "rope_parameters",
  "rope_scaling",
  "layer_types",
  "dtype",
  "sliding_window",
  "max_window_layers",
  "attention_bias",
  "mlp_bias",
)
"""Entries of a base model that are written again or, where they do not apply, left out."""


class UnsupportedModel(ValueError):
  """A model, or a feature of it, that is not read; the message names it and says what is."""


def decoder_config(content: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
  """Reads a `config.json`.

  Args:
    content: the file's JSON.
    source: names it in errors.

  Returns:
    The decoder that it describes.

  Raises:
    UnsupportedModel: naming an architecture or a feature that is not supported.
    ValueError: naming a value that is missing or cannot be.
  """
  architecture = _architecture(content, source)
  defaults = {**_DEFAULTS, **ARCHITECTURES[architecture]}
  given = {**defaults, **{name: value for name, value in content.items() if value is not None}}
  for name in ("sliding_window", "num_key_value_heads"):  # where a null says something else than silence
    if name in content and content[name] is None:
      given.pop(name, None)
  _refuse_features(given, architecture, source)
  read = _Reader(given, source)
  hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
  # A null, or with Llama silence, is the old form of "as many as there are heads".
  kv_heads = heads if "num_key_value_heads" not in given else read.integer("num_key_value_heads")
  if "head_dim" not in given and hidden % heads:
    raise ValueError(f"{source}: hidden_size={hidden} is no multiple of num_attention_heads={heads}, and no head_dim")
  qwen2, llama = architecture == "Qwen2ForCausalLM", architecture == "LlamaForCausalLM"
  biased = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and read.flag("attention_bias")
  depth = read.integer("num_hidden_layers")
  theta, scaling = _rope(given, read)
  fields: dict[str, Any] = {
    "vocab_size": read.integer("vocab_size"),
    "hidden_size": hidden,
    "intermediate_size": read.integer("intermediate_size"),
    "num_layers": depth,
    "num_heads": heads,
    "num_kv_heads": kv_heads,
    "head_dim": read.integer("head_dim") if "head_dim" in given else hidden // heads,
    "rope_theta": theta,
    "rope_scaling": scaling,
    "rms_norm_eps": read.number("rms_norm_eps"),
    "qkv_bias": qwen2 or biased,
    "output_bias": biased,
    "mlp_bias": llama and read.flag("mlp_bias"),
    "qk_norm": architecture == "Qwen3ForCausalLM",
    "tie_embeddings": read.flag("tie_word_embeddings"),
    "sliding_window": _sliding_window(given, architecture, depth, read),
  }
  try:
    return DecoderConfig(**fields)
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from error


def hf_config(config: DecoderConfig, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """The content of a `config.json` for a decoder.

  Args:
    config: the decoder.
    settings: further entries, as the `config.json` that the base model came with: token ids, `max_position_embeddings`.
      What describes the decoder is taken from `config`.

  Raises:
    ValueError: if none of `ARCHITECTURES` is such a decoder.
  """
  described: dict[str, Any] = {
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "rms_norm_eps": config.rms_norm_eps,
    "rope_theta": config.rope_theta,
    "tie_word_embeddings": config.tie_embeddings,
    **_architecture_of(config, (settings or {}).get("architectures")),
  }
  longest = 4096
  if (scaling := config.rope_scaling) is not None:
    described["rope_scaling"] = {
      "rope_type": "llama3",
      "factor": scaling.factor,
      "low_freq_factor": scaling.low_freq_factor,
      "high_freq_factor": scaling.high_freq_factor,
      "original_max_position_embeddings": scaling.original_max_positions,
    }
    longest = math.ceil(scaling.factor * scaling.original_max_positions)
  kept = {name: value for name, value in (settings or {}).items() if name not in _REPLACED}
  return {"max_position_embeddings": longest, **kept, **described}


def _architecture(content: Mapping[str, Any], source: str) -> str:
  named = content.get("architectures")
  kind = content.get("model_type")
  if named is None:
    by_type = [name for name, about in ARCHITECTURES.items() if about["model_type"] == kind]
    named = by_type or [f"model_type {kind!r}"]
  if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
    raise ValueError(f"{source}: architectures: expected one name in a list, got {named!r}")
  if named[0] not in ARCHITECTURES:
    raise UnsupportedModel(f"{source}: {named[0]} is not supported; supported are {', '.join(ARCHITECTURES)}")
  if kind not in (None, expected := ARCHITECTURES[named[0]]["model_type"]):
    raise ValueError(f"{source}: model_type: expected {expected!r} for {named[0]}, got {kind!r}")
  return named[0]


def _refuse_features(given: Mapping[str, Any], architecture: str, source: str) -> None:
  def refuse(what: str, supported: str) -> None:
    raise UnsupportedModel(f"{source}: {what} is not supported; supported: {supported}")

  if given.get("quantization_config"):
    method = given["quantization_config"]
    method = method.get("quant_method", "unknown") if isinstance(method, Mapping) else method
    refuse(f"a quantized model (quantization_config: {method})", "weights in bfloat16, float16 or float32")
  if given["hidden_act"] not in ("silu", "swish"):
    refuse(f"hidden_act={given['hidden_act']!r}", "silu")
  if given["partial_rotary_factor"] != 1.0:
    refuse(f"partial_rotary_factor={given['partial_rotary_factor']!r}", "1, rotation of whole heads")
  if architecture == "MistralForCausalLM" and given["attention_bias"]:
    refuse("attention_bias of a Mistral", "attention_bias of LlamaForCausalLM and Qwen3ForCausalLM")


def _rope(given: Mapping[str, Any], read: "_Reader") -> tuple[float, RopeScaling | None]:
  """The base of the wavelengths, and their scaling, from either form."""
  rope = given.get("rope_scaling") or given.get("rope_parameters") or {}  # the former first, as transformers does
  if not isinstance(rope, Mapping):
    raise ValueError(f"{read.source}: rope_parameters: expected settings by name, got {rope!r}")
  if any(isinstance(value, Mapping) for value in rope.values()):
    raise UnsupportedModel(f"{read.source}: rope_parameters for each kind of layer are not supported; supported: one")
  inner = _Reader({"rope_theta": given["rope_theta"], "partial_rotary_factor": 1.0, **rope}, read.source, "rope.")
  kind = rope.get("rope_type", rope.get("type", "default"))
  if inner.number("partial_rotary_factor") != 1.0:
    raise UnsupportedModel(f"{read.source}: partial_rotary_factor is not supported; supported: 1")
  theta = inner.number("rope_theta")
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise UnsupportedModel(f"{read.source}: rope scaling of type {kind!r} is not supported; supported: llama3, default")
  stretch = {name: inner.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
  longest = inner.integer("original_max_position_embeddings")
  try:
    return theta, RopeScaling(**stretch, original_max_positions=longest)
  except ValueError as error:
    raise ValueError(f"{read.source}: {error}") from error


def _sliding_window(given: Mapping[str, Any], architecture: str, depth: int, read: "_Reader") -> int | None:
  """The one window of all layers. Where only some layers have it, the model is not supported."""
  window = given.get("sliding_window")
  if architecture == "LlamaForCausalLM" or window is None:
    return None
  if architecture == "MistralForCausalLM":
    return read.integer("sliding_window")
  if not read.flag("use_sliding_window"):
    return None
  full, sliding = "full_attention", "sliding_attention"
  types = given.get("layer_types")
  if types is None:
    first = read.integer("max_window_layers", least=0)
    types = [full] * (first > 0) + [sliding] * (first < depth)  # one of each kind will do
  if not isinstance(types, list) or not types:
    raise ValueError(f"{read.source}: layer_types: expected a list of names, got {types!r}")
  if all(kind == full for kind in types):
    return None
  if all(kind == sliding for kind in types):
    return read.integer("sliding_window")
  raise UnsupportedModel(
    f"{read.source}: layers of different attention (layer_types, max_window_layers) are not supported; supported: "
    "all full_attention, or all sliding_attention"
  )


def _architecture_of(config: DecoderConfig, wanted: Any) -> dict[str, Any]:
  """The architecture that a decoder is, with its own entries; the `wanted` one if that fits."""
  biases = config.qkv_bias, config.output_bias, config.mlp_bias
  windows = {"sliding_window": config.sliding_window, "use_sliding_window": True, "max_window_layers": 0}
  if config.sliding_window is None:
    windows = {"sliding_window": None, "use_sliding_window": False, "max_window_layers": config.num_layers}
  fitting: dict[str, dict[str, Any]] = {}
  if config.qk_norm and biases in ((False, False, False), (True, True, False)):
    fitting["Qwen3ForCausalLM"] = {"attention_bias": config.qkv_bias, **windows}
  if not config.qk_norm:
    divides = config.hidden_size % config.num_heads == 0  # transformers asks that of a Llama
    if config.sliding_window is None and config.qkv_bias == config.output_bias and divides:
      fitting["LlamaForCausalLM"] = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    if biases == (False, False, False):
      fitting["MistralForCausalLM"] = {"sliding_window": config.sliding_window}
    if biases == (True, False, False):
      fitting["Qwen2ForCausalLM"] = windows
  if not fitting:
    raise ValueError(
      f"config: no architecture of {', '.join(ARCHITECTURES)} has qk_norm={config.qk_norm}, "
      f"qkv_bias={config.qkv_bias}, output_bias={config.output_bias}, mlp_bias={config.mlp_bias}, "
      f"sliding_window={config.sliding_window}, hidden_size={config.hidden_size}, num_heads={config.num_heads} together"
    )
  first = wanted[0] if isinstance(wanted, list) and wanted and wanted[0] in fitting else next(iter(fitting))
  return {"architectures": [first], "model_type": ARCHITECTURES[first]["model_type"], **fitting[first]}


class _Reader:
  """Typed access to entries by name, with errors that name them."""

  def __init__(self, given: Mapping[str, Any], source: str, prefix: str = ""):
    self._given = given
    self.source = source
    self._prefix = prefix

  def integer(self, name: str, *, least: int = 1) -> int:
    value = self._value(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
      raise ValueError(f"{self.source}: {self._prefix}{name}: expected an integer of at least {least}, got {value!r}")
    return value

  def number(self, name: str) -> float:
    value = self._value(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
      raise ValueError(f"{self.source}: {self._prefix}{name}: expected a number, got {value!r}")
    return float(value)

  def flag(self, name: str) -> bool:
    value = self._value(name)
    if not isinstance(value, bool):
      raise ValueError(f"{self.source}: {self._prefix}{name}: expected true or false, got {value!r}")
    return value

  def _value(self, name: str) -> Any:
    if name not in self._given:
      raise ValueError(f"{self.source}: misses {self._prefix}{name}")
    return self._given[name]
