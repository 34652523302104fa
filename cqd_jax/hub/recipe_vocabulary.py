"""Vocabularies of models that are merged: which row of whose embedding stands for a token of the result.

Tokens go by their text. The result's are those of one model's tokenizer, or with `union` those of the first model and,
behind them, what tokenizers of the others have added to their vocabulary. A folder without `tokenizer.json` numbers its
tokens as the result's tokenizer does.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cqd_jax.hub.recipe_values import ModelReference, RecipeError
from cqd_jax.store.run_dir import read_json

FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The tokens of the result, where models number theirs in other ways.

  Attributes:
    rows: of each model the row of each token, `[V]`, or -1.
    added: entries of `tokenizer.json` that the tokenizer's own file has not.
  """

  rows: Mapping[ModelReference, np.ndarray]
  added: tuple[Mapping[str, Any], ...]

  @property
  def size(self) -> int:
    """How many rows an embedding has."""
    return len(next(iter(self.rows.values())))

  def filled(
    self, matrices: Mapping[ModelReference, np.ndarray], base: ModelReference | None
  ) -> dict[ModelReference, np.ndarray]:
    """Embeddings of equal rows.

    A token that a model has not gets the base's row, if the base has it; else the mean of those that have it, which of
    one owner is its row.

    Args:
      matrices: `[rows, d]` float32 each.
      base: which of them is the base.
    """
    width = next(iter(matrices.values())).shape[1]
    total, owners = np.zeros((self.size, width), np.float32), np.zeros((self.size, 1), np.float32)
    for model, matrix in matrices.items():
      there = self.rows[model] >= 0
      total[there] += matrix[self.rows[model][there]]
      owners[there] += 1
    total /= np.maximum(owners, 1.0)
    if base is not None and base in matrices:
      there = self.rows[base] >= 0
      total[there] = matrices[base][self.rows[base][there]]
    filled = {}
    for model, matrix in matrices.items():
      own, there = total.copy(), self.rows[model] >= 0
      own[there] = matrix[self.rows[model][there]]
      filled[model] = own
    return filled

  def write(self, folder: Path) -> None:
    """Adds the tokens to the tokenizer that was copied to a folder."""
    if self.added:
      content = read_json(folder / FILE)
      content["added_tokens"] = [*(content.get("added_tokens") or []), *self.added]
      (folder / FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def vocabulary_of(
  source: ModelReference | str, folders: Mapping[ModelReference, Path], sources: Sequence[ModelReference]
) -> Vocabulary | None:
  """The vocabulary of a merge; None if all models number their tokens alike.

  Args:
    source: the model whose tokenizer is taken, or "union".
    folders: of all models.
    sources: those that are merged, the base first.

  Raises:
    RecipeError: naming the model whose `tokenizer.json` is of another form, or missing from the source; the token that
      no model has, or that only a retrained tokenizer could have.
  """
  first = source if isinstance(source, ModelReference) else sources[0]
  expected = _tokens(folders[first])
  if expected is None:
    raise RecipeError(f"tokenizer_source: {folders[first]} of {first} has no {FILE}")
  tokens = {model: _tokens(folders[model]) or expected for model in dict.fromkeys([first, *sources])}
  if all(own == tokens[first] for own in tokens.values()):
    return None
  result = dict(tokens[first])
  added: list[Mapping[str, Any]] = []
  if source == "union":
    for model in sources:
      entries = {entry["content"]: entry for entry in _content(folders[model]).get("added_tokens") or []}
      for token in sorted(tokens[model].keys() - result.keys(), key=tokens[model].__getitem__):
        if token not in entries:
          raise RecipeError(
            f"tokenizer_source: union: {token!r} is in the vocabulary of {model} and not in that of {first}; supported "
            "are tokens that were added to one vocabulary"
          )
        result[token] = max(result.values()) + 1
        added.append({**entries[token], "id": result[token]})
  size = max(result.values()) + 1
  rows = {model: np.full(size, -1, np.int64) for model in sources}
  for token, number in result.items():
    owned = [model for model in sources if token in tokens[model]]
    if not owned:
      raise RecipeError(f"tokenizer_source: {token!r} of {first} is in none of the models")
    for model in owned:
      rows[model][number] = tokens[model][token]
  return Vocabulary(rows, tuple(added))


def _content(folder: Path) -> Mapping[str, Any]:
  content = read_json(folder / FILE) if (folder / FILE).is_file() else {}
  return content if isinstance(content, dict) else {}


def _tokens(folder: Path) -> dict[str, int] | None:
  """Tokens and their numbers, from `tokenizer.json`; None if there is no such file."""
  if not (folder / FILE).is_file():
    return None
  content = _content(folder)
  own = content.get("model")
  vocab = own.get("vocab") if isinstance(own, dict) else None
  if isinstance(vocab, list):  # of a unigram model: [token, score] each
    vocab = {entry[0]: number for number, entry in enumerate(vocab)}
  if not isinstance(vocab, dict) or not vocab:
    raise RecipeError(f"tokenizer_source: {folder / FILE}: has no vocabulary in a known form")
  return vocab | {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
