"""The memory of a swarm, against sums worked out by hand and against arrays that are really made."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.__main__ import main
from benchmarks.memory import MODELS
from cqd_jax.genotypes import CoreBasis
from cqd_jax.low_rank import LowRank, partition_shared
from cqd_jax.models import DecoderConfig, bucket_prompts, init_params, unstack_layers
from cqd_jax.models.decoding import _decode_population
from cqd_jax.run import memory
from cqd_jax.trees import is_matrix, map_with_path


def make_plan(**changes):
  plan = {
    "name": "a model", "config": MODELS["llama3-8b"], "rank": 16, "experts": 3, "elites": 675, "population": 4,
    "prompts": 2, "prompt_tokens": 600, "answer_tokens": 200, "dtype": "bfloat16", "embeddings": False,
  }  # fmt: skip
  return memory.Plan(**{**plan, **changes})


def test_llama_3_8b_by_hand():
  parts = memory.num_bytes(make_plan())
  assert parts["base model"] == 2 * 8_030_261_248  # the published number of parameters
  # a = b = 48: seven cores a layer; one number for each for embedding and head, which no expert changed
  cores = 32 * 7 * 48 * 48 + 2
  norms = (2 * 32 + 1) * 4096
  assert parts["archives"] == 675 * 4 * (cores + norms)
  columns = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14_336)
  assert parts["bases"] == 2 * (32 * 48 * columns + 2 * (128_256 + 4096))
  assert parts["KV caches"] == 8 * 800 * 2 * 32 * 8 * 128 * 2
  assert parts["logits"] == 8 * 128_256 * 4
  assert parts["prefill"] == 8 * (2 * 4 * 32 * 600**2 + 600 * 2 * 32 * 8 * 128 * 2)


@pytest.mark.parametrize("embeddings", [False, True])
def test_the_bytes_are_those_of_arrays_that_are_made(embeddings):
  plan = make_plan(config=MODELS["miniature"], rank=4, experts=2, dtype="float32", embeddings=embeddings)
  base = unstack_layers(init_params(jax.random.key(0), MODELS["miniature"]))

  def update(path, leaf):
    if not is_matrix(path, leaf) or (path[0] != "layers" and not embeddings):
      return None
    *stack, rows, columns = leaf.shape
    return LowRank(jnp.ones((*stack, rows, 4)), jnp.ones((*stack, 4, columns)))

  basis = CoreBasis.from_experts(base, [map_with_path(update, base)] * 2)

  def num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

  parts = memory.num_bytes(plan)
  assert parts["base model"] == num_bytes(basis.base)
  assert parts["bases"] == num_bytes((basis.left, basis.right))
  assert parts["experts"] == num_bytes(basis.experts)
  assert parts["children"] == 4 * num_bytes(basis.experts) // 2


def test_the_command_prints_the_table(capsys):
  main(["memory", "--model", "llama3-8b", "--rank", "16", "--elites", "675"])
  printed = capsys.readouterr().out
  for text in ("1 device of 80 GB", "8,030,261,248 parameters", "16.1 GB", "675 elites of 3.13 MB", "10.8 TB"):
    assert text in printed


@pytest.mark.usefixtures("optimized")
def test_a_compiled_decoding_needs_no_more():
  """What the compiler sets aside for caches, prefill and logits, of a small model with long prompts."""
  config = DecoderConfig(64, 32, 64, 3, 4, 2, 16)
  plan = make_plan(config=config, population=8, prompts=4, prompt_tokens=96, answer_tokens=32, dtype="float32")
  parts = memory.num_bytes(plan)
  basis = memory.shapes(plan)
  own = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((8, *leaf.shape[1:]), leaf.dtype), basis.experts)
  shared = partition_shared(jax.eval_shape(CoreBasis.apply, basis, own))[1]
  buckets = bucket_prompts([[1] * 96] * 4, num_buckets=1)
  program = _decode_population.lower(own, shared, config, buckets, 32, jnp.zeros(1, jnp.int32), jnp.int32(0), 8)
  needed = program.compile().memory_analysis().temp_size_in_bytes
  counted = parts["KV caches"] + parts["prefill"] + parts["logits"]
  assert 0.5 * counted < needed < 1.5 * counted


@pytest.mark.parametrize("arguments", [["--rank", "0"], ["--model", "gpt"], ["--device-gb", "0"], ["--elites", "x"]])
def test_bad_arguments_are_named(arguments, capsys):
  with pytest.raises(SystemExit):
    main(["memory", *arguments])
  assert arguments[0] in capsys.readouterr().err
