"""Individuals of core spaces as LoRA adapters: peft loads each to the model that it is, and what is lost is told."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from peft_cases import (
  CONFIGS,
  SIZES,
  TOLERANCE,
  WARNINGS,
  Base,
  dense,
  largest_difference,
  our_logits,
  pick,
  read_update,
  torch_logits,
)
from safetensors.torch import load_file
from transformers import LlamaConfig

from cqd_jax.genotypes import CoreBasis
from cqd_jax.hub.load import load_pretrained
from cqd_jax.hub.save_adapter import save_adapter
from cqd_jax.low_rank import LowRank
from cqd_jax.models.hf_config import UnsupportedModel
from cqd_jax.operators import expert_svd_mutation, factorize, gaussian_mutation, linear_merge, svd_mutation
from cqd_jax.trees import is_matrix, map_with_path

pytestmark = [pytest.mark.filterwarnings(each) for each in WARNINGS]

MODELS = {
  "llama": (CONFIGS["llama"], torch.float32),
  "llama_tied_bfloat16": (LlamaConfig(**SIZES, tie_word_embeddings=True), torch.bfloat16),
  "qwen2_bfloat16": (CONFIGS["qwen2"], torch.bfloat16),
  "qwen3": (CONFIGS["qwen3"], torch.float32),
}
RANKS = (4, 4, 4)


class Space:
  """A base model and a core space of it, with three experts of rank 4."""

  def __init__(self, folder, config, dtype, *, vectors):
    self.model = Base(folder, config, dtype)
    self.params = load_pretrained(folder).params  # in their own dtypes
    self.config = self.model.config
    experts = [random_expert(self.params, rank, seed, vectors=vectors) for seed, rank in enumerate(RANKS)]
    self.basis = CoreBasis.from_experts(self.params, experts)

  def expert(self, index):
    return pick(self.basis.experts, index)

  def write(self, folder, genotype, **settings):
    return save_adapter(folder, self.basis, genotype, self.config, base_name=str(self.model.folder), **settings)

  def task_vector(self, genotype):
    """In float64, by NumPy."""

    def leaf(own, left, right):
      if left is None:
        return np.asarray(own, np.float64)
      left, right = (np.asarray(part, np.float32).astype(np.float64) for part in (left, right))
      return left @ np.asarray(own, np.float64) @ right.mT

    return map_leaves(leaf, self.params, genotype, self.basis.left, self.basis.right)

  def logits(self, genotype, *, vectors=True):
    """Of base plus task vector, in float32."""

    def add(path, leaf, change):
      keep = vectors or is_matrix(path, leaf)
      return jnp.asarray(np.asarray(leaf, np.float64) + keep * change, jnp.float32)

    return our_logits(map_with_path(add, self.model.params, self.task_vector(genotype)), self.config)

  def loaded(self, folder):
    return torch_logits(self.model.load(folder))


def map_leaves(function, like, *trees):
  structure = jax.tree.structure(like)
  columns = (structure.flatten_up_to(tree) for tree in trees)
  return jax.tree.unflatten(structure, [function(*each) for each in zip(*columns, strict=True)])


def random_expert(params, rank, seed, *, vectors):
  source = np.random.default_rng(seed)

  def leaf(path, like):
    if is_matrix(path, like):
      *stack, rows, columns = like.shape
      b, a = (source.normal(size=(*stack, *shape)) * 0.2 for shape in ((rows, rank), (rank, columns)))
      return LowRank(jnp.asarray(b, jnp.float32), jnp.asarray(a, jnp.float32))
    return jnp.asarray(source.normal(size=like.shape) * 0.1, jnp.float32) if vectors else None

  return map_with_path(leaf, params)


@pytest.fixture(scope="module")
def spaces(tmp_path_factory):
  """Spaces of experts that left vectors as they are."""
  folder = tmp_path_factory.mktemp("spaces")
  return {name: Space(folder / name, *about, vectors=False) for name, about in MODELS.items()}


@pytest.fixture(scope="module")
def vector_spaces(tmp_path_factory):
  """Spaces of experts that changed norms and biases too."""
  folder = tmp_path_factory.mktemp("vector_spaces")
  return {name: Space(folder / name, *MODELS[name], vectors=True) for name in ("llama", "qwen2_bfloat16", "qwen3")}


def mean(space):
  return jax.tree.map(lambda leaf: leaf.mean(0), space.basis.experts)


def merged(space):
  return linear_merge(jax.random.key(0), space.expert(0), space.expert(2), std=0.3, granularity="kernel")


def scaled(space):
  return svd_mutation(jax.random.key(1), merged(space), max_scale=2.0)


def towards_expert(space):
  return expert_svd_mutation(jax.random.key(2), mean(space), factorize(space.expert(1)), rate=0.5)


def noisy(space):
  """Vectors too."""
  return gaussian_mutation(jax.random.key(3), mean(space), std=0.05)


INDIVIDUALS = {
  "expert": (lambda space: space.expert(1), 4),
  "mean": (mean, 12),
  "merged": (merged, 8),
  "scaled": (scaled, 8),
  "towards_expert": (towards_expert, 12),
}


def relative_error(got, expected):
  """Of two trees, or two arrays, in Frobenius norms of the whole."""
  pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True))
  lost = sum(np.sum((np.asarray(one, np.float64) - other) ** 2) for one, other in pairs)
  return np.sqrt(lost / sum(np.sum(np.asarray(other, np.float64) ** 2) for _, other in pairs))


def matrices(tree):
  leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, LowRank))
  return [leaf for path, leaf in leaves if path[-1].key in ("kernel", "embedding")]


def written_change(folder, space):
  """B A of every module in an adapter's file, by NumPy, as the leaves of the params; vectors: zeros."""
  tensors = {name: tensor.double().numpy() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}

  def change(name):
    module = "base_model.model." + name.removesuffix(".weight")
    if f"{module}.lora_embedding_A" in tensors:
      return (tensors[f"{module}.lora_embedding_B"] @ tensors[f"{module}.lora_embedding_A"]).T
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]

  def leaf(path, like):
    placement = space.model.opened.placements[path]
    if not is_matrix(path, like):
      return np.zeros(like.shape)
    parts = [change(name).T if placement.transposed else change(name) for name in placement.names]
    return np.stack(parts) if placement.stacked else parts[0]

  return map_with_path(leaf, space.params)


@pytest.mark.parametrize("individual", INDIVIDUALS)
@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_an_individual_to_the_model_that_it_is_and_so_do_we(name, individual, spaces, tmp_path):
  space = spaces[name]
  make, rank = INDIVIDUALS[individual]
  genotype = make(space)
  folder = tmp_path / "adapter"
  written = space.write(folder, genotype)
  assert written[:4] == (rank, 0.0, False, ())
  want = space.logits(genotype)
  assert largest_difference(space.loaded(folder), want) < TOLERANCE
  assert largest_difference(torch_logits(space.model.fresh()), want) > 0.5
  exact = space.task_vector(genotype)
  assert relative_error(written_change(folder, space), exact) < 1e-6
  assert relative_error(map_leaves(dense, space.params, read_update(folder, space.model), space.params), exact) < 1e-6


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_it_is_what_materialize_gives(name, spaces, tmp_path):
  space = spaces[name]
  genotype = towards_expert(space)
  space.write(tmp_path / "adapter", genotype)
  want = our_logits(space.basis.materialize(genotype), space.config)
  assert largest_difference(space.loaded(tmp_path / "adapter"), want) < TOLERANCE


@pytest.mark.parametrize("rank", [1, 3, 8, 11, 12, 50])
@pytest.mark.parametrize("name", ["llama", "qwen2_bfloat16", "qwen3"])
def test_a_given_rank_gives_the_best_approximation_and_its_error(name, rank, spaces, tmp_path):
  space = spaces[name]
  genotype = towards_expert(space)
  written = space.write(tmp_path / "adapter", genotype, rank=rank)
  assert written.rank == min(rank, 12)
  exact = space.task_vector(genotype)
  true = relative_error(written_change(tmp_path / "adapter", space), exact)
  # Eckart and Young: no matrices of that rank are nearer than the rest of the singular values.
  values = [np.linalg.svd(leaf, compute_uv=False) for leaf in matrices(exact)]
  best = np.sqrt(sum((s[..., rank:] ** 2).sum() for s in values) / sum((s**2).sum() for s in values))
  assert true == pytest.approx(best, rel=1e-6, abs=1e-6)
  assert written.relative_error == pytest.approx(true, rel=1e-6, abs=1e-6)
  assert (written.relative_error > 0) == (rank < 12)
  if rank == 8:
    update = map_leaves(dense, space.params, read_update(tmp_path / "adapter", space.model), space.params)
    moved = jax.tree.map(lambda leaf, change: jnp.asarray(leaf + change, jnp.float32), space.model.params, update)
    want = our_logits(moved, space.config)
    assert largest_difference(space.loaded(tmp_path / "adapter"), want) < TOLERANCE


def test_a_layer_that_changed_far_less_than_others_is_kept(spaces, tmp_path):
  """Rounding is told from change matrix by matrix."""
  space = spaces["llama"]

  def shrink(leaf):
    return leaf.at[1].multiply(1e-8) if leaf.ndim == 3 else leaf

  genotype = jax.tree.map(shrink, space.expert(0))
  assert space.write(tmp_path / "adapter", genotype).rank == 4
  got, expected = written_change(tmp_path / "adapter", space), space.task_vector(genotype)
  for one, other in zip(jax.tree.leaves(got["layers"]["mlp"]), jax.tree.leaves(expected["layers"]["mlp"]), strict=True):
    assert relative_error(one[1], other[1]) < 1e-6


def test_the_rank_is_that_of_the_largest_matrix(spaces, tmp_path):
  """An individual that has one expert's part here and the mean there."""
  space = spaces["llama"]
  genotype = space.expert(0)
  genotype["layers"]["mlp"]["up"]["kernel"] = mean(space)["layers"]["mlp"]["up"]["kernel"]
  assert space.write(tmp_path / "adapter", genotype).rank == 12
  assert largest_difference(space.loaded(tmp_path / "adapter"), space.logits(genotype)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_modules_that_did_not_change_are_not_in_the_file(name, spaces, tmp_path):
  space = spaces[name]
  zeros = jax.tree.map(jnp.zeros_like, space.expert(0))
  genotype = zeros | {"layers": zeros["layers"] | {"mlp": space.expert(0)["layers"]["mlp"]}}
  assert space.write(tmp_path / "adapter", genotype).rank == 4
  names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
  assert {name.split(".")[6] for name in names} == {"gate_proj", "up_proj", "down_proj"}
  config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
  assert (config["r"], config["lora_alpha"]) == (4, 4)
  assert config["base_model_name_or_path"] == str(space.model.folder)
  assert largest_difference(space.loaded(tmp_path / "adapter"), space.logits(genotype)) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_the_base_itself_is_an_adapter_too(name, spaces, tmp_path):
  space = spaces[name]
  genotype = jax.tree.map(jnp.zeros_like, space.expert(0))
  assert space.write(tmp_path / "adapter", genotype)[:4] == (1, 0.0, False, ())
  assert largest_difference(space.loaded(tmp_path / "adapter"), torch_logits(space.model.fresh())) == 0
  update = read_update(tmp_path / "adapter", space.model)
  assert not any(leaf.any() for leaf in jax.tree.leaves(update))


@pytest.mark.parametrize("individual", [mean, noisy])
@pytest.mark.parametrize("name", ["llama", "qwen2_bfloat16", "qwen3"])
def test_changed_norms_and_biases_are_kept_exactly(name, individual, vector_spaces, tmp_path):
  space = vector_spaces[name]
  genotype = individual(space)
  written = space.write(tmp_path / "adapter", genotype)
  assert written.vectors
  assert (written.relative_error, written.left_out) == (0.0, ())
  want = space.logits(genotype)
  assert largest_difference(want, space.logits(genotype, vectors=False)) > 0.1
  assert largest_difference(space.loaded(tmp_path / "adapter"), want) < TOLERANCE
  config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert config["bias"] == ("all" if name.startswith("qwen2") else "none")
  with pytest.raises(UnsupportedModel, match="modules_to_save"):
    read_update(tmp_path / "adapter", space.model)


def only(space, *endings):
  """An individual that changed no other leaves than those."""

  def leaf(path, own):
    return own if path[-1] in endings else jnp.zeros_like(own)

  return map_with_path(leaf, mean(space))


@pytest.mark.parametrize("endings", [("bias",), ("scale",), ("bias", "scale"), ("bias", "kernel")])
def test_some_kinds_of_vectors_alone(endings, vector_spaces, tmp_path):
  space = vector_spaces["qwen2_bfloat16"]
  genotype = only(space, *endings)
  written = space.write(tmp_path / "adapter", genotype)
  assert written[:4] == (12 if "kernel" in endings else 1, 0.0, True, ())
  assert largest_difference(space.loaded(tmp_path / "adapter"), space.logits(genotype)) < TOLERANCE
  if "scale" not in endings:
    update = read_update(tmp_path / "adapter", space.model)
    got = map_leaves(dense, space.params, update, space.params)
    assert relative_error(got, space.task_vector(genotype)) < 1e-6


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("name", ["llama", "qwen2_bfloat16", "qwen3"])
def test_norms_and_biases_left_out_are_named_and_count_in_the_error(name, rank, vector_spaces, tmp_path):
  space = vector_spaces[name]
  genotype = noisy(space)
  written = space.write(tmp_path / "adapter", genotype, keep_vectors=False, rank=rank)
  vectors = [path for path, placement in space.model.opened.placements.items() if not placement.tensor_shape[1:]]
  assert written.left_out == tuple("/".join(path) for path in vectors)
  assert not written.vectors
  true = relative_error(written_change(tmp_path / "adapter", space), space.task_vector(genotype))
  assert written.relative_error == pytest.approx(true, rel=1e-6)
  read_update(tmp_path / "adapter", space.model)
  if rank is None:
    want = space.logits(genotype, vectors=False)
    assert largest_difference(space.loaded(tmp_path / "adapter"), want) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen2_bfloat16", "qwen3"])
def test_embedding_and_head_left_out_are_named_and_count_in_the_error(name, spaces, tmp_path):
  space = spaces[name]
  genotype = noisy(space)
  assert space.write(tmp_path / "whole", genotype).embeddings
  written = space.write(tmp_path / "adapter", genotype, keep_embeddings=False, keep_vectors=False)
  named = ("embed/embedding",) if space.model.config.tie_embeddings else ("embed/embedding", "head/kernel")
  assert written.left_out[: len(named)] == named
  assert not written.embeddings
  content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert not {"embed_tokens", "lm_head"} & set(content["target_modules"])
  got = map_leaves(dense, space.params, read_update(tmp_path / "adapter", space.model), space.params)
  assert written.relative_error == pytest.approx(relative_error(got, space.task_vector(genotype)), rel=1e-5)
  assert space.loaded(tmp_path / "adapter") is not None


def test_an_error_counts_vectors_that_are_kept(vector_spaces, tmp_path):
  space = vector_spaces["llama"]
  genotype = mean(space)
  written = space.write(tmp_path / "adapter", genotype, rank=5)
  exact = space.task_vector(genotype)

  def keep(path, change, own):
    return own if path[-1] in ("scale", "bias") else change

  got = map_with_path(keep, written_change(tmp_path / "adapter", space), exact)
  assert written.relative_error == pytest.approx(relative_error(got, exact), rel=1e-6)


@pytest.mark.parametrize(("dtype", "half"), [(jnp.bfloat16, 2.0**-8), (jnp.float16, 2.0**-11)])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_factors_in_16_bits(name, dtype, half, spaces, tmp_path):
  """Each entry is off by at most `half` of itself, so B A by twice that of |B| |A| (and float16's smallest numbers)."""
  space = spaces[name]
  genotype = mean(space)
  space.write(tmp_path / "adapter", genotype, dtype=dtype)
  tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
  assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{jnp.dtype(dtype).name}"}
  for update, exact in zip(
    matrices(read_update(tmp_path / "adapter", space.model)),
    matrices(space.task_vector(genotype)),
    strict=True,
  ):
    bound = 2.1 * half * np.matmul(*map(np.abs, update)) + 1e-5
    assert (np.abs(np.matmul(*update) - exact) <= bound).all()
  update = map_leaves(dense, space.params, read_update(tmp_path / "adapter", space.model), space.params)
  moved = jax.tree.map(lambda leaf, change: jnp.asarray(leaf + change, jnp.float32), space.model.params, update)
  assert largest_difference(space.loaded(tmp_path / "adapter"), our_logits(moved, space.config)) < TOLERANCE


def test_the_folder(spaces, tmp_path):
  space = spaces["llama"]
  space.write(tmp_path / "deep" / "adapter", space.expert(0), card="# A card\n")
  assert [file.name for file in (tmp_path / "deep").iterdir()] == ["adapter"]
  names = sorted(file.name for file in (tmp_path / "deep" / "adapter").iterdir())
  assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
  assert (tmp_path / "deep" / "adapter" / "README.md").read_text() == "# A card\n"
  with pytest.raises(ValueError, match="already exists; nothing was overwritten"):
    space.write(tmp_path / "deep" / "adapter", space.expert(1))
  assert largest_difference(space.loaded(tmp_path / "deep" / "adapter"), space.logits(space.expert(0))) < TOLERANCE


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", ["layers/mlp/up/kernel", "final_norm/scale", "embed/embedding"])
def test_what_is_not_finite_is_not_written(path, value, spaces, tmp_path):
  space = spaces["llama"]

  def spoil(names, leaf):
    return leaf.at[(0,) * leaf.ndim].set(value) if "/".join(names) == path else leaf

  with pytest.raises(ValueError, match=f"genotype at {path}: holds NaN or infinite values; nothing was written"):
    space.write(tmp_path / "adapter", map_with_path(spoil, space.expert(0)))
  assert not list(tmp_path.iterdir())


def test_factors_that_do_not_fit_their_dtype_are_not_written(spaces, tmp_path):
  space = spaces["llama"]
  large = jax.tree.map(lambda leaf: leaf * 1e10, space.expert(0))
  with pytest.raises(ValueError, match=r"genotype: .*lora_\w+ does not fit in float16; nothing was written"):
    space.write(tmp_path / "adapter", large, dtype=jnp.float16)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float64])
def test_other_dtypes_are_refused(dtype, spaces, tmp_path):
  with pytest.raises(ValueError, match=f"dtype: expected one of bfloat16, float16, float32, got {jnp.dtype(dtype)}"):
    spaces["llama"].write(tmp_path / "adapter", spaces["llama"].expert(0), dtype=dtype)


def test_a_rank_below_1_is_refused(spaces, tmp_path):
  with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
    spaces["llama"].write(tmp_path / "adapter", spaces["llama"].expert(0), rank=0)


def test_genotypes_of_another_basis_are_refused(spaces, tmp_path):
  space = spaces["llama"]
  other = CoreBasis.from_experts(space.params, [random_expert(space.params, 4, 9, vectors=False)])
  foreign = {
    r"genotype at embed/embedding: expected shape \(12, 12\), got \(4, 4\)": pick(other.experts, 0),
    r"genotype at embed/embedding: expected shape \(12, 12\), got \(3, 12, 12\)": space.basis.experts,
    "genotype: expected the structure of the base's params": spaces["qwen3"].expert(0),
    "genotype: expected the structure": None,
  }
  for named, genotype in foreign.items():
    with pytest.raises(ValueError, match=named):
      space.write(tmp_path / "adapter", genotype)
  with pytest.raises(ValueError, match="config: is not the decoder of the basis's base"):
    save_adapter(tmp_path / "adapter", space.basis, space.expert(0), spaces["qwen3"].config, base_name="base")
  assert not list(tmp_path.iterdir())


MANY = 12


def test_many_individuals_on_one_base(spaces, tmp_path):
  """Adapters that are loaded side by side, as they are served."""
  space = spaces["llama"]
  model, errors = space.model.fresh(), []
  for index in range(MANY):
    keys = jax.random.split(jax.random.key(index), 3)
    first, second = (space.expert(each) for each in ((index % 3), (index + 1 + index % 2) % 3))
    genotype = linear_merge(keys[0], first, second, std=0.5, granularity="layer")
    genotype = svd_mutation(keys[1], genotype, max_scale=2.0) if index % 2 else genotype
    folder = tmp_path / f"{index}"
    space.write(folder, genotype)
    if index == 0:
      model = PeftModel.from_pretrained(model, folder, adapter_name="0").eval()
    else:
      model.load_adapter(folder, adapter_name=f"{index}")
    tmp_path.joinpath(f"{index}.npy").write_bytes(space.logits(genotype).tobytes())
  for index in range(MANY):
    model.set_adapter(f"{index}")
    want = np.frombuffer(tmp_path.joinpath(f"{index}.npy").read_bytes(), np.float32)
    errors.append(largest_difference(torch_logits(model).ravel(), want))
  assert max(errors) < TOLERANCE
