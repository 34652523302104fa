"""PEFT LoRA adapters: read as exact low-rank task vectors, and written from individuals of a core space.

An adapter holds for a module the factors A [r, in] and B [out, r] of the change s B A of its weight [out, in]. As
`LowRank` factors of the kernel [in, out] that is A^T times (s B)^T. (For the embedding [V, d] PEFT keeps A [r, V] and
B [d, r], and the change is s (B A)^T: again A^T times (s B)^T.)

Reference: Hu et al. 2022, "LoRA", arXiv:2106.09685; the scale of rank-stabilised LoRA: Kalajdzievski 2023,
arXiv:2312.03732.
"""

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cqd_jax.hub.patterns import UnsupportedPattern, compile_pattern
from cqd_jax.hub.tensor_files import DamagedWeights, Reader, Tensor, find_tensors
from cqd_jax.low_rank import LowRank
from cqd_jax.models.hf_config import UnsupportedModel
from cqd_jax.models.hf_layout import Placement
from cqd_jax.store.run_dir import read_json
from cqd_jax.trees import Path as TreePath

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
EMBEDDING = "model.embed_tokens"

ENDINGS = (
  (".lora_A.weight", "A"),
  (".lora_B.weight", "B"),
  (".lora_embedding_A", "A"),
  (".lora_embedding_B", "B"),
  (".base_layer.bias", "bias"),
  (".base_layer.weight", "weight"),
  (".bias", "bias"),
  (".weight", "weight"),
)
"""Of the names of an adapter's tensors, and which part of their module they are."""

HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base's weights as they are."""

REFUSED = {
  "use_dora": "DoRA, whose magnitudes are no low-rank change",
  "modules_to_save": "modules that were trained in full beside the adapter",
  "trainable_token_indices": "tokens that were trained in full beside the adapter",
  "lora_bias": "a bias of the adapter's own",
  "use_qalora": "QA-LoRA",
  "use_bdlora": "block-diagonal LoRA",
  "layer_replication": "layers that are used several times",
  "target_parameters": "parameters that are no weights of modules",
  "alora_invocation_tokens": "an adapter that works from some token on",
  "arrow_config": "routing among adapters",
  "velora_config": "VeLoRA",
  "kasa_config": "KaSA",
  "monteclora_config": "MonteCLoRA",
  "fan_in_fan_out": "weights that are kept transposed",
}
"""Settings of an adapter that must not be set, and what they are."""


@dataclasses.dataclass(frozen=True)
class Module:
  """The factors of one module.

  Attributes:
    a: the tensor A, `[r, in]`.
    b: the tensor B, `[out, r]`.
    scale: s.
  """

  a: Tensor
  b: Tensor
  scale: float


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
  """A PEFT adapter that was checked, and none of whose weights was read.

  Attributes:
    folder: where it is.
    content: of `adapter_config.json`.
    modules: by the name of the module in the base model.
    replaced: tensors of the base model that are new in the adapter, as biases, by the name in the base model.
  """

  folder: Path
  content: Mapping[str, Any]
  modules: Mapping[str, Module]
  replaced: Mapping[str, Tensor]

  @property
  def num_bytes(self) -> int:
    """Of the weights on disk."""
    factors = [tensor for module in self.modules.values() for tensor in (module.a, module.b)]
    return sum(tensor.num_bytes for tensor in (*factors, *self.replaced.values()))

  def factors(self, reader: Reader, placement: Placement) -> LowRank | None:
    """The change of a leaf of matrices, float32; None if the adapter leaves all of them as they are.

    Of a leaf of all layers the ranks may differ from layer to layer; the smaller ones are filled with zeros.
    """
    own = [self.modules.get(name.removesuffix(".weight")) for name in placement.names]
    if not any(own):
      return None
    rank = max(module.a.shape[0] for module in own if module is not None)
    rows, columns = placement.shape[-2:]
    b = np.zeros((len(own), rows, rank), np.float32)
    a = np.zeros((len(own), rank, columns), np.float32)
    for layer, module in enumerate(own):
      if module is None:
        continue
      size = module.a.shape[0]
      reader.read(module.a, b[layer, :, :size], transposed=True)
      reader.read(module.b, a[layer, :size], transposed=True)
      with np.errstate(over="ignore", invalid="ignore"):
        a[layer] *= module.scale
      if not np.isfinite(a[layer]).all():
        raise DamagedWeights(f"{module.b.file}: {module.b.name!r} times {module.scale} does not fit in float32")
    return LowRank(b, a) if placement.stacked else LowRank(b[0], a[0])  # type: ignore[arg-type]


def is_adapter(folder: Path) -> bool:
  """Whether a folder is a PEFT adapter."""
  return (folder / ADAPTER_CONFIG).is_file()


def open_adapter(folder: Path, wanted: Mapping[TreePath, Placement], *, tied: bool) -> AdapterFolder:
  """Opens an adapter: reads its config and headers, and checks them against the base model.

  Args:
    folder: of the adapter.
    wanted: the base model's leaves.
    tied: whether the base model's head is its embedding.

  Raises:
    UnsupportedModel: naming the kind of adapter, the setting or the pattern that is not supported.
    DamagedWeights: naming file and tensor: missing, one too many, of another shape, a pickle.
    ValueError: naming the setting that cannot be.
  """
  shapes = {name: placement.tensor_shape for placement in wanted.values() for name in placement.names}
  return open_adapter_of(folder, shapes, tied=tied)


def open_adapter_of(folder: Path, shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> AdapterFolder:
  """As `open_adapter`, of a base model of which no more is known than its tensors.

  Args:
    folder: of the adapter.
    shapes: of the base model's tensors by name.
    tied: whether the base model's head is its embedding.
  """
  source = folder / ADAPTER_CONFIG
  content = read_json(source)
  if not isinstance(content, dict):
    raise ValueError(f"{source}: expected settings by name, got {type(content).__name__}")
  _refuse_features(content, source)
  if tied and f"{EMBEDDING}.weight" in shapes:
    shapes = {**shapes, "lm_head.weight": shapes[f"{EMBEDDING}.weight"]}
  pairs, replaced = _sort(find_tensors(folder, "adapter_model"), shapes)
  modules = {name: _module(name, pair, shapes, content, folder) for name, pair in pairs.items()}
  if not modules and not replaced:
    raise DamagedWeights(f"{folder}: the adapter holds no weights")
  if tied:
    _check_tied(modules, folder)
  return AdapterFolder(folder, content, modules, replaced)


def _refuse_features(content: Mapping[str, Any], source: Path) -> None:
  kind = content.get("peft_type")
  if kind != "LORA":
    raise UnsupportedModel(f"{source}: adapters of type {kind!r} are not supported; supported: LORA")
  for name, what in REFUSED.items():
    if content.get(name):
      raise UnsupportedModel(f"{source}: {name} ({what}) is not supported; merge the adapter into a full model instead")
  start = content.get("init_lora_weights")
  if start not in HARMLESS_STARTS:
    raise UnsupportedModel(
      f"{source}: init_lora_weights={start!r} is not supported, since it changes the base's weights; merge the adapter "
      "into a full model, or save it with path_initial_model_for_weight_conversion"
    )
  if content.get("bias", "none") not in ("none", "all", "lora_only"):
    raise ValueError(f"{source}: bias: expected none, all or lora_only, got {content['bias']!r}")


def _sort(
  tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
  """An adapter's tensors: the factors A and B by module, and by their names those that replace the base's."""
  pairs: dict[str, dict[str, Tensor]] = {}
  replaced: dict[str, Tensor] = {}
  for name, tensor in tensors.items():
    module, part = _parse(name)
    target = f"{module}.{'weight' if part in ('A', 'B') else part}" if part else module
    if target not in shapes:
      raise DamagedWeights(f"{tensor.file}: {name!r} belongs to {target!r}, which the base model has not")
    owner, key = (pairs.setdefault(module, {}), part) if part in ("A", "B") else (replaced, target)
    if key in owner:
      raise DamagedWeights(f"{tensor.file}: {owner[key].name!r} and {name!r} are the same tensor of {module!r}")
    owner[key] = tensor
    if owner is replaced and tensor.shape != shapes[target]:
      raise DamagedWeights(f"{tensor.file}: {name!r} has shape {tensor.shape}, the base model {shapes[target]}")
  return pairs, replaced


def _parse(name: str) -> tuple[str, str]:
  """The module of the base model to which an adapter's tensor belongs, and which part it is: A, B, bias, weight.

  The whole name and "", if it is none of these; an embedding has factors of other names than other modules.
  """
  whole = name.removeprefix(PREFIX)
  for ending, part in ENDINGS:
    if whole.endswith(ending):
      module = whole.removesuffix(ending)
      fits = part not in ("A", "B") or ("embedding" in ending) == (module == EMBEDDING)
      return (module, part) if fits else (whole, "")
  return whole, ""


def _check_tied(modules: Mapping[str, Module], folder: Path) -> None:
  """Raises unless embedding and head, one matrix in the base, are changed alike: PEFT changes each by itself."""
  embedding, head = (modules.get(name) for name in (EMBEDDING, "lm_head"))
  if embedding is None and head is None:
    return
  if (
    embedding is not None
    and head is not None
    and embedding.scale == head.scale
    and embedding.a.shape == head.b.shape[::-1]
  ):
    factors = [np.empty(tensor.shape, np.float32) for tensor in (embedding.a, embedding.b, head.b, head.a)]
    with Reader() as reader:
      for tensor, out in zip((embedding.a, embedding.b, head.b, head.a), factors, strict=True):
        reader.read(tensor, out)
    if np.array_equal(factors[0], factors[2].T) and np.array_equal(factors[1], factors[3].T):
      return
  raise UnsupportedModel(
    f"{folder}: changes {'the head' if embedding is None else 'the embedding'} of a base model whose head is its "
    "embedding (tie_word_embeddings); supported is the same change of both"
  )


def _module(
  name: str, pair: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], content: Mapping[str, Any], folder: Path
) -> Module:
  """The factors of a module with their scale, checked."""
  if missing := {"A", "B"} - pair.keys():
    raise DamagedWeights(f"{folder}: misses the LoRA factor {missing.pop()} of {name!r}")
  a, b = pair["A"], pair["B"]
  source = f"{folder / ADAPTER_CONFIG}"
  rank = _of_pattern(content, "rank_pattern", name, content.get("r"), source)
  alpha = _of_pattern(content, "alpha_pattern", name, content.get("lora_alpha"), source)
  if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
    raise ValueError(f"{source}: r: expected an integer of at least 1, got {rank!r} for {name}")
  if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
    raise ValueError(f"{source}: lora_alpha: expected a number, got {alpha!r} for {name}")
  if len(shapes[f"{name}.weight"]) != 2:
    raise DamagedWeights(f"{a.file}: has LoRA factors of {name!r}, which is no matrix")
  size_out, size_in = shapes[f"{name}.weight"]
  if name == EMBEDDING:
    size_out, size_in = size_in, size_out
  if a.shape != (rank, size_in) or b.shape != (size_out, rank):
    raise DamagedWeights(
      f"{a.file}: the factors of {name!r} have shapes {a.shape} and {b.shape}; with rank {rank} the base model needs "
      f"{(rank, size_in)} and {(size_out, rank)}"
    )
  return Module(a, b, alpha / (math.sqrt(rank) if content.get("use_rslora") else rank))


def _of_pattern(content: Mapping[str, Any], name: str, module: str, default: Any, source: str) -> Any:
  """A module's own value by a pattern of its name (the first that matches), or the default."""
  patterns = content.get(name) or {}
  if not isinstance(patterns, Mapping):
    raise ValueError(f"{source}: {name}: expected values by pattern, got {patterns!r}")
  for pattern, value in patterns.items():
    shown = repr(pattern) if len(pattern) <= 80 else f"{pattern[:80]!r}..."
    try:
      if _compiled(pattern).match(module):
        return value
    except UnsupportedPattern as error:
      raise UnsupportedModel(f"{source}: {name}: the pattern {shown} is not supported ({error})") from error
    except (re.error, OverflowError, RecursionError) as error:
      raise ValueError(f"{source}: {name}: {shown} is no pattern ({error})") from error
  return default


_compiled = functools.cache(compile_pattern)
