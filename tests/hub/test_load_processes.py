"""Models read in processes of their own: on a mesh, within the memory of the model, and without PyTorch."""

import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
from hf_cases import make_model, make_tokenizer, random_tokens, save_model, torch_tokens

from cqd_jax.hub.load import save_pretrained
from cqd_jax.models import DecoderConfig
from cqd_jax.models.hf_layout import placements


def launch(program, *arguments, **environment):
  """Runs a program; returns the JSON that it prints last."""
  done = subprocess.run(
    [sys.executable, "-c", program, *map(str, arguments)],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | environment,
    capture_output=True,
    text=True,
    timeout=1200,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


ON_A_MESH = """
import json, sys
import jax, numpy as np
from cqd_jax.genotypes.placement import make_mesh, param_shardings
from cqd_jax.hub.load import load_pretrained, open_pretrained
from cqd_jax.hub.tensor_files import Reader
from cqd_jax.trees import leaf_path

folder = sys.argv[1]
opened = open_pretrained(folder)
facts = {"read": [], "cut": 0}
for dtype, population, model in ((None, 1, 4), (None, 2, 2), (None, 4, 1), ("bfloat16", 1, 4)):
  mesh = make_mesh(population=population, model=model)
  counts = []
  params = load_pretrained(folder, dtype, mesh=mesh, on_read=counts.append).params
  facts["read"].append(sum(counts))
  whole = load_pretrained(folder, dtype).params
  assert jax.tree.structure(params) == jax.tree.structure(whole)
  shardings = jax.tree.leaves(param_shardings(opened.shapes(dtype), mesh))
  for (path, leaf), other, sharding in zip(
    jax.tree.leaves_with_path(params), jax.tree.leaves(whole), shardings, strict=True
  ):
    assert leaf.sharding == sharding, path
    assert leaf.dtype == other.dtype, path
    assert [shard.device for shard in leaf.addressable_shards] == list(jax.devices()), path
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other), err_msg=str(path))
    facts["cut"] += leaf.addressable_shards[0].data.size < leaf.size
    # the part of one device alone, as a process would read it that has no other
    part = sharding.devices_indices_map(leaf.shape)[jax.devices()[1]]
    counts = []
    with Reader(counts.append) as reader:
      own = opened.read_part(reader, leaf_path(path), part, dtype)
    np.testing.assert_array_equal(own, np.asarray(leaf.addressable_shards[1].data))
    assert sum(counts) == own.size * opened.dtype.itemsize, path
print(json.dumps(facts))
"""


def test_on_a_mesh_each_device_reads_its_part(tmp_path):
  # sizes of which some are multiples of the devices, and some of none of them
  model = make_model("qwen3", vocab_size=62, intermediate_size=45)
  folder = save_model(model, tmp_path / "model", "30KB")
  own = "--xla_force_host_platform_device_count=4 --xla_cpu_multi_thread_eigen=false"
  flags = f"{os.environ['XLA_FLAGS']} {own}"
  facts = launch(ON_A_MESH, folder, XLA_FLAGS=flags)
  size = 4 * sum(parameter.numel() for parameter in model.parameters())
  # what several devices hold is read once for all of them
  assert facts["read"] == [size] * 4
  assert facts["cut"] == 3 * 9  # all kernels and the embedding, wherever a model is on more than one device


READING = """
import json, sys
import jax
from cqd_jax.hub.load import load_pretrained

def status(name):
  with open("/proc/self/status") as file:
    return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))

jax.block_until_ready(jax.numpy.ones(3) + 1)
before = status("VmRSS")
params = load_pretrained(sys.argv[1]).params
jax.block_until_ready(params)
print(json.dumps({"size": sum(leaf.nbytes for leaf in jax.tree.leaves(params)), "peak": status("VmHWM") - before}))
"""


def test_reading_takes_the_memory_of_the_model(tmp_path):
  config = DecoderConfig(20_000, 1024, 2816, num_layers=9, num_heads=16, num_kv_heads=4, head_dim=64)
  values = np.random.default_rng(0).standard_normal(1 << 16).astype(jnp.bfloat16)
  leaves = ((each.path, np.resize(values, each.shape)) for each in placements(config))
  folder = tmp_path / "model"
  try:
    save_pretrained(folder, leaves, config, max_shard_bytes=100_000_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    facts = launch(READING, folder)
  finally:
    shutil.rmtree(folder)
  assert facts["size"] > 280e6
  assert facts["peak"] < 1.15 * facts["size"]


WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None
import jax
from pathlib import Path
from cqd_jax.hub.load import load_pretrained, save_pretrained
from cqd_jax.models import bucket_prompts, decode_population

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
model = load_pretrained(folder)
prompts = [list(prompt) for prompt in json.loads(sys.argv[3])]
population = jax.tree.map(lambda leaf: leaf[None], model.params)
tokens, _ = decode_population(
  population, model.config, bucket_prompts(prompts, num_buckets=1), max_new_tokens=8, end_ids=()
)
tokenizer = model.tokenizer
text = tokenizer.apply_chat_template([{"role": "user", "content": "abab"}], tokenize=False)
save_pretrained(out, model.params, model.config, tokenizer, settings=model.source.content)
again = load_pretrained(out)
assert again.tokenizer.encode("abc ab") == tokenizer.encode("abc ab")
assert sys.modules["torch"] is None
print(json.dumps({"tokens": tokens[0].tolist(), "ids": tokenizer.encode("abc ab"), "text": text}))
"""


def test_pytorch_is_never_needed(tmp_path):
  model = make_model("llama_biases")
  folder = save_model(model, tmp_path / "model")
  tokenizer = make_tokenizer()
  tokenizer.save_pretrained(folder)
  prompts = [random_tokens(length, seed=length).tolist() for length in (3, 7)]
  facts = launch(WITHOUT_TORCH, folder, tmp_path / "out", json.dumps(prompts))
  np.testing.assert_array_equal(facts["tokens"], torch_tokens(model, prompts, 8))
  assert facts["ids"] == tokenizer.encode("abc ab")
  assert facts["text"] == "<user>abab"
