"""Small decoders and LoRA adapters of them, made, loaded and run by transformers, peft and PyTorch."""

import copy
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from cqd_jax.hub.experts import open_expert
from cqd_jax.hub.load import load_pretrained, open_pretrained
from cqd_jax.hub.tensor_files import Reader
from cqd_jax.low_rank import LowRank
from cqd_jax.models import forward
from cqd_jax.trees import map_with_path

torch.set_num_threads(1)  # nothing here is large, and threads that wait for one another are slow

WARNINGS = (
  # transformers, of its own older name, whenever a model is wrapped
  "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
  # peft, of adapters of the embedding
  "ignore:Setting .save_embedding_layers. to .True. as embedding layers found:UserWarning",
  "ignore:Model has .tie_word_embeddings=True. and a tied layer is part of the adapter:UserWarning",
)
"""What the judges say that is of no concern here."""

SIZES = {
  "vocab_size": 97,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}
CONFIGS = {
  "llama": LlamaConfig(**SIZES),
  "qwen2": Qwen2Config(**SIZES),
  "qwen3": Qwen3Config(**SIZES, head_dim=10, tie_word_embeddings=True),
}
TOKEN_IDS = np.random.default_rng(0).integers(0, 97, (2, 24))
TOLERANCE = 1e-4
"""Of logits in float32, whose scale is about 5."""


class Base:
  """A base model in a folder, once as peft's and once as ours."""

  def __init__(self, folder, config, dtype=torch.float32):
    self.folder = save_model(folder, config, dtype, seed=1)
    self.opened = open_pretrained(folder)
    self.params = load_pretrained(folder, jnp.float32).params
    self.config = self.opened.config
    self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

  def fresh(self):
    """The model as transformers loads it, in float32."""
    return copy.deepcopy(self._model)

  def load(self, folder):
    """The model with an adapter, as peft loads it."""
    return PeftModel.from_pretrained(self.fresh(), folder).eval()


def save_model(folder, config, dtype=torch.float32, *, seed=5):
  """A model of random weights, as transformers saves it."""
  torch.manual_seed(seed)
  model = AutoModelForCausalLM.from_config(config)
  disturb(model.named_parameters(), 0.3)
  model.to(dtype).save_pretrained(folder)
  return folder


def disturb(named_parameters, scale):
  with torch.no_grad():
    for _, parameter in named_parameters:
      parameter.add_(torch.randn_like(parameter) * scale)


def save_by_peft(base, folder, *, seed=0, dtype=torch.float32, **settings):
  """An adapter of random factors, as peft saves it."""
  torch.manual_seed(seed)
  model = get_peft_model(base.fresh(), LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings}))
  disturb([each for each in model.named_parameters() if each[1].requires_grad], 0.1)
  model.save_pretrained(folder)
  file = folder / "adapter_model.safetensors"
  save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
  return folder


def torch_logits(model):
  with torch.no_grad():
    return model(torch.tensor(TOKEN_IDS)).logits.numpy()


def our_logits(params, config):
  return np.asarray(_forward(params, TOKEN_IDS, config=config))


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, token_ids, *, config):
  return forward(params, config, token_ids)


def largest_difference(one, other):
  return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).max())


def read_update(folder, base):
  """Our reading of an expert: for each leaf `LowRank`, an array or None."""
  expert = open_expert(folder, base.opened)
  with Reader() as reader:
    return map_with_path(lambda path, _: expert.update(reader, path), base.params)


def dense(update, like):
  """An update of one leaf written out in float64."""
  if update is None:
    return np.zeros(like.shape)
  if isinstance(update, LowRank):
    return np.asarray(update.b, np.float64) @ np.asarray(update.a, np.float64)
  return np.asarray(update, np.float64)


def is_update(node):
  return node is None or isinstance(node, LowRank)


def pick(population, index):
  return jax.tree.map(lambda leaf: leaf[index], population)


def copy_adapter(source, folder, *, config=None, change=None):
  """A copy of an adapter with other settings, and tensors that went through `change`."""
  shutil.copytree(source, folder)
  edit_json(folder / "adapter_config.json", config or {})
  if change is not None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
  return folder


def edit_json(file, settings):
  file.write_text(json.dumps(json.loads(file.read_text()) | settings))
