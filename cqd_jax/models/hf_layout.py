"""Where each tensor of a Hugging Face checkpoint goes in the params of `cqd_jax.models`.

A checkpoint has one tensor a layer and keeps matrices as `[out, in]`; params have one leaf for all layers,
`[L, in, out]`. The embedding is `[V, d]` in both.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cqd_jax.models.config import DecoderConfig
from cqd_jax.models.decoder import init_params
from cqd_jax.trees import Path, is_stacked, leaf_path

MODULES: dict[Path, str] = {
  ("embed",): "model.embed_tokens",
  ("layers", "attention_norm"): "model.layers.{layer}.input_layernorm",
  ("layers", "attention", "query"): "model.layers.{layer}.self_attn.q_proj",
  ("layers", "attention", "key"): "model.layers.{layer}.self_attn.k_proj",
  ("layers", "attention", "value"): "model.layers.{layer}.self_attn.v_proj",
  ("layers", "attention", "output"): "model.layers.{layer}.self_attn.o_proj",
  ("layers", "attention", "query_norm"): "model.layers.{layer}.self_attn.q_norm",
  ("layers", "attention", "key_norm"): "model.layers.{layer}.self_attn.k_norm",
  ("layers", "mlp_norm"): "model.layers.{layer}.post_attention_layernorm",
  ("layers", "mlp", "gate"): "model.layers.{layer}.mlp.gate_proj",
  ("layers", "mlp", "up"): "model.layers.{layer}.mlp.up_proj",
  ("layers", "mlp", "down"): "model.layers.{layer}.mlp.down_proj",
  ("final_norm",): "model.norm",
  ("head",): "lm_head",
}
"""A module of the params -> the module of a checkpoint, of the families that `hf_config.ARCHITECTURES` lists."""

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


class Placement(NamedTuple):
  """A leaf of the params, and the tensors that it is made of.

  Attributes:
    path: of the leaf.
    shape: of the leaf.
    names: of the tensors; L of them for a leaf of all layers, in order, otherwise one.
    stacked: whether the leaf has a leading axis of layers.
    transposed: whether a tensor is the transpose of its matrix.
  """

  path: Path
  shape: tuple[int, ...]
  names: tuple[str, ...]
  stacked: bool
  transposed: bool

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """Of each tensor."""
    shape = self.shape[1:] if self.stacked else self.shape
    return shape[::-1] if self.transposed else shape


def placements(config: DecoderConfig) -> tuple[Placement, ...]:
  """Every leaf of a decoder's params, in the order of `jax.tree.leaves`."""
  found = []
  for key_path, leaf in jax.tree.leaves_with_path(_shapes(config)):
    path = leaf_path(key_path)
    name = f"{MODULES[path[:-1]]}.{LEAVES[path[-1]]}"
    layers = config.num_layers if is_stacked(path) else 1
    names = tuple(name.format(layer=layer) for layer in range(layers))
    found.append(Placement(path, leaf.shape, names, is_stacked(path), path[-1] == "kernel"))
  return tuple(found)


def param_shapes(config: DecoderConfig, dtype: jax.typing.DTypeLike = jnp.float32) -> dict[str, object]:
  """The params of a decoder with `jax.ShapeDtypeStruct` in the place of arrays."""
  shapes: dict[str, object] = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _shapes(config))
  return shapes


@functools.lru_cache(maxsize=8)  # tracing takes longer than all the rest of opening a folder
def _shapes(config: DecoderConfig) -> Any:
  return jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
