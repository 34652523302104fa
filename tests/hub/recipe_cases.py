"""Tiny model folders, and what merges of them are by float64 NumPy."""

import json

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

BF16 = np.dtype(jnp.bfloat16)

HIDDEN, INNER, VOCAB, LAYERS = 8, 12, 16, 3


def llama_shapes(layers=LAYERS, head=True):
  """Names and shapes of a small Llama."""
  shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
  for layer in range(layers):
    shapes |= {
      f"model.layers.{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
      f"model.layers.{layer}.mlp.up_proj.weight": (INNER, HIDDEN),
      f"model.layers.{layer}.input_layernorm.weight": (HIDDEN,),
    }
  shapes["model.norm.weight"] = (HIDDEN,)
  return shapes | ({"lm_head.weight": (VOCAB, HIDDEN)} if head else {})


TOWER = {
  "vision_tower.patch.weight": (4, 3, 2, 2),
  "vision_tower.encoder.layers.0.attn.weight": (4, 4),
  "vision_tower.encoder.layers.1.attn.weight": (4, 4),
  "projector.scale": (),
}
"""Of a model of images beside a decoder: four axes, none, and a stack of layers of its own."""


def tensors_of(shapes, seed, dtype=np.float32):
  draw = np.random.default_rng(seed)
  return {name: np.asarray(draw.normal(size=shape), dtype) for name, shape in shapes.items()}


def llama_config(layers=LAYERS, **more):
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": layers,
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
  } | more


def write_model(folder, tensors, config=None, files=None):
  """Writes a model folder; returns its tensors."""
  folder.mkdir(parents=True)
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  if config is not None:
    (folder / "config.json").write_text(json.dumps(config))
  for name, content in (files or {}).items():
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
  return tensors


def write_llamas(root, names, dtype=np.float32):
  """Small Llamas by name, each drawn by its place; the first holds a tokenizer."""
  return {
    name: write_model(
      root / name,
      tensors_of(llama_shapes(), seed, dtype),
      llama_config(torch_dtype=np.dtype(dtype).name),
      TOKENIZER if seed == 0 else None,
    )
    for seed, name in enumerate(names)
  }


TOKENIZER = {
  "tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<s>", "id": 2}]},
  "tokenizer_config.json": {"chat_template": "{{ messages }} of the tokenizer"},
}


def wide(tensor):
  return np.asarray(tensor).astype(np.float64)


def same(got, expected, tolerance=2e-6):
  """Asserts that two tensors are the same, to rounding."""
  assert got.shape == expected.shape
  np.testing.assert_allclose(wide(got), expected, rtol=tolerance, atol=tolerance)


def trimmed(delta, density):
  """The largest magnitudes, so many as mergekit keeps."""
  keep = max(1, int(density * delta.size))
  cut = np.sort(np.abs(delta).ravel())[-keep]
  return np.where(np.abs(delta) >= cut, delta, 0.0)


def ties_of(base, experts, weights, densities, normalize=True, scale=1.0):
  """TIES as mergekit has it."""
  terms = [
    weight * trimmed(wide(expert) - wide(base), density)
    for expert, weight, density in zip(experts, weights, densities, strict=True)
  ]
  sign = np.where(sum(terms) >= 0, 1.0, -1.0)
  total, divisor = np.zeros_like(terms[0]), np.zeros_like(terms[0])
  for term, weight in zip(terms, weights, strict=True):
    agrees = np.sign(term) == sign
    total += np.where(agrees, term, 0.0)
    divisor += np.where(agrees, weight, 0.0)
  return wide(base) + scale * (total / np.where(divisor == 0, 1.0, divisor) if normalize else total)


def slerp_of(one, other, t):
  """Shoemake's, of the tensors as they are."""
  one, other = wide(one), wide(other)
  angle = np.arccos((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))
  return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * other) / np.sin(angle)
