"""Tiny base models with experts on disk, and what float64 NumPy says of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from cqd_jax.hub.load import save_pretrained
from cqd_jax.models import init_params
from cqd_jax.models.config import DecoderConfig

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}

MODULES = {
  "self_attn.q_proj": ("attention", "query"),
  "self_attn.k_proj": ("attention", "key"),
  "self_attn.v_proj": ("attention", "value"),
  "self_attn.o_proj": ("attention", "output"),
  "mlp.gate_proj": ("mlp", "gate"),
  "mlp.up_proj": ("mlp", "up"),
  "mlp.down_proj": ("mlp", "down"),
}


def tiny_config(**changes):
  return DecoderConfig(**{"vocab_size": 40, **SIZES, **changes})


def named(tree):
  """Leaves as float64 by their names."""
  return {
    "/".join(entry.key for entry in path): np.asarray(leaf, np.float64)
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def write_base(folder, config=None, dtype=jnp.float32):
  """A random base, its params and its config."""
  config = config or tiny_config()
  params = jax.tree.map(lambda leaf: leaf.astype(dtype), init_params(jax.random.key(0), config))
  save_pretrained(folder, params, config)
  return params, config


def write_full(folder, params, config, seed=1, change=None):
  """A full fine-tune: every leaf is changed by noise, or by what `change(name, leaf, source)` returns.

  Returns:
    Its task vector: leaves by name, float64, of the values that were written.
  """
  source = np.random.default_rng(seed)

  def leaf_of(path, leaf):
    name = "/".join(entry.key for entry in path)
    delta = source.normal(size=leaf.shape) / 10 if change is None else change(name, leaf, source)
    return jnp.asarray(np.asarray(leaf, np.float64) + delta, leaf.dtype)

  tuned = jax.tree.map_with_path(leaf_of, params)
  save_pretrained(folder, tuned, config)
  before, after = named(params), named(tuned)
  return {name: np.float64(np.float32(after[name]) - np.float32(before[name])) for name in before}


def write_adapter(folder, params, modules, rank=3, alpha=6, seed=2, size=0.1, patterns=None, **settings):
  """A LoRA adapter of some modules of all layers (or of one, as "layers.1.mlp.up_proj").

  Returns:
    Its task vector: leaves by name, float64, written out.
  """
  source = np.random.default_rng(seed)
  tensors = {}
  change = {name: np.zeros(leaf.shape) for name, leaf in named(params).items()}
  layers = range(params["layers"]["attention_norm"]["scale"].shape[0])
  for module in modules:
    own = module.removeprefix("layers.").split(".", 1) if module.startswith("layers.") else (None, module)
    name = f"layers/{'/'.join(MODULES[own[1]])}/kernel"
    r = (patterns or {}).get(own[1], rank)
    for layer in layers if own[0] is None else [int(own[0])]:
      rows, columns = change[name].shape[1:]
      a, b = source.normal(size=(r, rows)).astype(np.float32), source.normal(size=(columns, r)).astype(np.float32)
      b *= np.float32(size)
      full = f"base_model.model.model.layers.{layer}.{own[1]}"
      tensors |= {f"{full}.lora_A.weight": a, f"{full}.lora_B.weight": b}
      change[name][layer] = (alpha / r * np.float64(b) @ np.float64(a)).T
  folder.mkdir()
  save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
  content = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": "some/base"}
  content |= {"rank_pattern": patterns or {}, **settings}
  (folder / "adapter_config.json").write_text(json.dumps(content))
  return change


def flat(change):
  return np.concatenate([leaf.reshape(-1) for leaf in change.values()])


def norm(change):
  return float(np.linalg.norm(flat(change)))


def matrices(change):
  """Every matrix by name and layer."""
  found = {}
  for name, leaf in change.items():
    stacked = name.startswith("layers/")
    if leaf.ndim - stacked == 2:
      found |= {(name, layer): leaf[layer] for layer in range(len(leaf))} if stacked else {(name, 0): leaf}
  return found


def spectra(change):
  """Singular values of every matrix that is changed."""
  return {
    key: np.linalg.svd(matrix, compute_uv=False) for key, matrix in matrices(change).items() if np.any(matrix != 0)
  }


def energy_by_rank(change, most):
  squares = [values**2 for values in spectra(change).values()]
  total = sum(each.sum() for each in squares)
  return np.array([sum(each[:rank].sum() for each in squares) / total for rank in range(1, most + 1)])


def similarity(first, second, most=None):
  """CycleQD's, over the matrices that both change."""
  one, other = spectra(first), spectra(second)
  both = [(one[key][:most], other[key][:most]) for key in one.keys() & other.keys()]
  return np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in both]), len(both)
