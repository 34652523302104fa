"""Where each tensor goes, judged by the names and shapes of transformers' own modules."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from decoder_cases import CONFIGS, PLAIN

from cqd_jax.models import init_params
from cqd_jax.models.hf_config import hf_config
from cqd_jax.models.hf_layout import param_shapes, placements
from cqd_jax.trees import leaf_path

# Of no two equal sizes, or a transposed matrix would have the shape of its own transpose.
SIZED = dataclasses.replace(
  PLAIN, vocab_size=50, hidden_size=16, intermediate_size=28, num_layers=12, num_heads=4, num_kv_heads=2, head_dim=6
)

MODELS = {
  "llama": SIZED,
  "llama_biases": dataclasses.replace(SIZED, qkv_bias=True, output_bias=True, mlp_bias=True),
  "mistral": dataclasses.replace(SIZED, sliding_window=3),
  "qwen2": dataclasses.replace(SIZED, qkv_bias=True, tie_embeddings=True),
  "qwen3": dataclasses.replace(SIZED, qk_norm=True),
  "qwen3_biases": dataclasses.replace(SIZED, qk_norm=True, qkv_bias=True, output_bias=True, tie_embeddings=True),
}


def tensors_of_transformers(config):
  """Names and shapes of what transformers saves."""
  content = hf_config(config)
  model_class = getattr(transformers, content["architectures"][0])
  with torch.device("meta"):
    model = model_class(model_class.config_class.from_dict(content))
  return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # tied weights once


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_its_place(name):
  found = placements(MODELS[name])
  tensors = {tensor: placement.tensor_shape for placement in found for tensor in placement.names}
  assert tensors == tensors_of_transformers(MODELS[name])
  assert sum(len(placement.names) for placement in found) == len(tensors)
  for placement in found:
    assert placement.stacked == (placement.path[0] == "layers")
    assert placement.transposed == (placement.path[-1] == "kernel")
    if placement.stacked:  # in the order of the layers, 10 after 9
      assert [tensor.split(".")[2] for tensor in placement.names] == [str(layer) for layer in range(12)]


@pytest.mark.parametrize("name", CONFIGS)
def test_leaves_are_those_of_the_params_in_their_order(name):
  config = CONFIGS[name]
  params = jax.eval_shape(lambda key: init_params(key, config, jnp.bfloat16), jax.random.key(0))
  leaves = [(leaf_path(path), leaf.shape) for path, leaf in jax.tree.leaves_with_path(params)]
  assert [(placement.path, placement.shape) for placement in placements(config)] == leaves
  shapes = param_shapes(config, jnp.bfloat16)
  assert jax.tree.structure(shapes) == jax.tree.structure(params)
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), params
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(param_shapes(config))} == {jnp.dtype(jnp.float32)}


def test_shapes_can_be_changed_by_who_asked_for_them():
  param_shapes(PLAIN).clear()
  param_shapes(PLAIN)["layers"]["mlp"].clear()
  assert jax.tree.leaves(param_shapes(PLAIN)["layers"]["mlp"])
