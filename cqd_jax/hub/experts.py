"""Experts on disk, whole models or LoRA adapters: checked against their base, then read as changes of its leaves.

The base rules. An expert must be the same decoder, and its tokenizer must mean the same by every token id that both
know, and split text alike. Its vocabulary may be larger or smaller: rows of the embedding and the head that the base
has not (padding), and those of tokens that its tokenizer has not, are left out, with a warning where they are tokens;
rows that the expert has not count as unchanged.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from cqd_jax.hub.load import (
  ModelFolder,
  check_tied_head,
  load_tokenizer,
  open_pretrained,
  refuse_adapter_beside_model,
)
from cqd_jax.hub.load_adapter import AdapterFolder, is_adapter, open_adapter
from cqd_jax.hub.tensor_files import DamagedWeights, Reader, same_values
from cqd_jax.low_rank import LowRank
from cqd_jax.models.hf_layout import Placement
from cqd_jax.store.run_dir import read_json
from cqd_jax.trees import Path as TreePath

EMBEDDING, HEAD = ("embed", "embedding"), ("head", "kernel")

PROBES = (
  "def twice(number):\n\treturn 2 * number  # 2x",
  "SELECT name, SUM(price) FROM items WHERE name LIKE 'A%' GROUP BY name;",
  "ls -la /tmp | grep -c '^d' && echo \"done\"",
  "Grüße aus Zürich! 你好世界 Привет 1234567890 😀",
)
"""Texts that two tokenizers must split alike."""


@dataclasses.dataclass(frozen=True)
class Expert:
  """An expert that fits its base; none of its weights was read.

  Attributes:
    folder: where it is.
    base: the base model.
    model: the whole model, or None.
    adapter: the LoRA adapter, or None.
    added: ids of tokens that the base's tokenizer has not.
  """

  folder: Path
  base: ModelFolder
  model: ModelFolder | None = None
  adapter: AdapterFolder | None = None
  added: tuple[int, ...] = ()

  @property
  def kind(self) -> str:
    """In a word or two."""
    return "full model" if self.adapter is None else "LoRA adapter"

  @property
  def num_bytes(self) -> int:
    """Of the weights on disk."""
    source = self.model or self.adapter
    assert source is not None
    return source.num_bytes

  def update(self, reader: Reader, path: TreePath) -> LowRank | np.ndarray | None:
    """The expert's change of a leaf of the base's params, on the host: low-rank factors, or float32 of its shape.

    None: an adapter that leaves it as it is.
    """
    placement = self.base.placements[path]
    if self.model is not None:
      return self._without_added(path, _difference(self.base, self.model, reader, placement))
    assert self.adapter is not None
    if placement.tensor_shape[1:]:
      return self._without_added(path, self.adapter.factors(reader, placement))
    return self._replaced(reader, placement)

  def _without_added(self, path: TreePath, change: Any) -> Any:
    """The change of a leaf without that of tokens that the base's tokenizer has not, where the base has rows for them.

    Zeros are written into `change`.
    """
    own = [index for index in self.added if index < self.base.config.vocab_size]
    if own and change is not None and path == EMBEDDING:
      (change.b if isinstance(change, LowRank) else change)[own] = 0
    elif own and change is not None and path == HEAD:
      (change.a if isinstance(change, LowRank) else change)[:, own] = 0
    return change

  def _replaced(self, reader: Reader, placement: Placement) -> np.ndarray | None:
    """The change of vectors that are new in an adapter."""
    assert self.adapter is not None
    own = [self.adapter.replaced.get(name) for name in placement.names]
    if not any(tensor is not None for tensor in own):
      return None
    before = self.base.read_part(reader, placement.path, (slice(None),) * len(placement.shape), np.float32)
    after = before.copy()
    for layer, tensor in enumerate(own):
      if tensor is not None:
        reader.read(tensor, after[layer] if placement.stacked else after)
    return np.asarray(after - before)


def open_expert(folder: Path, base: ModelFolder) -> Expert:
  """Opens an expert of a base model and checks that they belong together.

  Raises:
    UnsupportedModel: naming what is not supported.
    ValueError: naming the folder and in what it differs from the base: the architecture, the vocabulary, the
      tokenizer; or what is damaged or missing.
  """
  if not folder.is_dir():
    raise ValueError(f"{folder}: no such expert folder")
  refuse_adapter_beside_model(folder)
  if is_adapter(folder):
    adapter = open_adapter(folder, base.placements, tied=base.config.tie_embeddings)
    _check_copies(adapter, base)
    return Expert(folder, base, None, adapter, check_tokenizers(folder, base, rows=base.config.vocab_size))
  model = open_pretrained(folder)
  ours, theirs = (
    {**dataclasses.asdict(opened.config), "architecture": opened.content.get("architectures")}
    for opened in (base, model)
  )
  for name, value in ours.items():
    if name != "vocab_size" and theirs[name] != value:
      raise ValueError(f"{folder}: another {name} than its base: {theirs[name]}, and {value} in {base.folder}")
  if model.end_ids != base.end_ids:
    warnings.warn(
      f"{folder}: its answers end with the tokens {model.end_ids}, those of {base.folder} with {base.end_ids}, as all "
      "answers are read",
      stacklevel=2,
    )
  with Reader() as reader:
    check_tied_head(model, reader)  # another one would be lost
  return Expert(folder, base, model, None, check_tokenizers(folder, base, rows=model.config.vocab_size))


def check_tokenizers(folder: Path, base: ModelFolder, *, rows: int) -> tuple[int, ...]:
  """Raises unless an expert's tokenizer, if it has one, means the same as the base's.

  Args:
    folder: of the expert.
    base: the base model.
    rows: of the expert's embedding.

  Returns:
    The ids of tokens that the expert's tokenizer has and the base's has not; there is a warning of them.

  Raises:
    ValueError: naming the first difference.
  """
  if (own_template := _template(folder)) is not None and own_template != _template(base.folder):
    warnings.warn(
      f"{folder}: has another chat template than {base.folder}, with whose template all models are asked", stacklevel=3
    )
  if _same_tokenizer_files(folder, base.folder):
    return ()
  own = load_tokenizer(folder)
  if own is None or base.tokenizer is None:
    if rows != base.config.vocab_size:
      raise ValueError(
        f"{folder}: its vocabulary has {rows} tokens, that of {base.folder} {base.config.vocab_size}, and without both "
        "tokenizers nobody knows which is which"
      )
    return ()
  ours = {index: token for token, index in base.tokenizer.get_vocab().items()}
  theirs = {index: token for token, index in own.get_vocab().items()}
  for index in sorted(ours.keys() & theirs.keys()):
    if ours[index] != theirs[index]:
      raise ValueError(f"{folder}: its token {index} is {theirs[index]!r}, that of {base.folder} {ours[index]!r}")
  for text in PROBES:
    if _split(own, text, folder) != _split(base.tokenizer, text, base.folder):
      raise ValueError(f"{folder}: its tokenizer splits text otherwise than that of {base.folder}, as {text[:30]!r}")
  if added := sorted(theirs.keys() - ours.keys()):
    shown = ", ".join(repr(theirs[index]) for index in added[:5]) + (", ..." if added[5:] else "")
    warnings.warn(f"{folder}: {len(added)} tokens that {base.folder} has not are left out: {shown}", stacklevel=3)
  return tuple(added)


def _split(tokenizer: Any, text: str, folder: Path) -> list[int]:
  try:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
  except Exception as error:  # of many kinds, some of them of Rust
    raise ValueError(f"{folder}: its tokenizer cannot split {text[:30]!r} ({error})") from error
  return ids


def _template(folder: Path) -> Any:
  """The chat template of a folder, as it stands in its files; None if it has none."""
  if (folder / "chat_template.jinja").is_file():
    return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
  if not (folder / "tokenizer_config.json").is_file():
    return None
  content = read_json(folder / "tokenizer_config.json")
  return content.get("chat_template") if isinstance(content, dict) else None


def _same_tokenizer_files(first: Path, second: Path) -> bool:
  files = [folder / "tokenizer.json" for folder in (first, second)]
  return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()


def _difference(base: ModelFolder, model: ModelFolder, reader: Reader, placement: Placement) -> np.ndarray:
  """What a whole model has more than the base; rows of tokens that one of them has not: nothing."""
  path, shape = placement.path, placement.shape
  if path not in (EMBEDDING, HEAD):
    part = (slice(None),) * len(shape)
    before, after = (opened.read_part(reader, path, part, np.float32) for opened in (base, model))
    after -= before
    return after
  axis = 0 if path == EMBEDDING else 1
  common = min(base.config.vocab_size, model.config.vocab_size)
  part = tuple(slice(0, common) if dimension == axis else slice(None) for dimension in range(2))
  change = np.zeros(shape, np.float32)
  before, after = (opened.read_part(reader, path, part, np.float32) for opened in (base, model))
  np.subtract(after, before, out=change[part])
  return change


def _check_copies(adapter: AdapterFolder, base: ModelFolder) -> None:
  """Raises unless the weights of the base that PEFT stores with an adapter are those of the base."""
  with Reader() as reader:
    for name, tensor in adapter.replaced.items():
      if not name.endswith(".weight"):
        continue  # a bias, which may be another
      if not same_values(reader, tensor, base.tensors.get(name) or base.tensors["model.embed_tokens.weight"]):
        raise DamagedWeights(
          f"{tensor.file}: {tensor.name!r} is not that of the base {base.folder}: weights that were trained in full "
          "beside an adapter are not supported"
        )
