"""Rows of embeddings follow their tokens where models number these in other ways."""

import io
import json

import numpy as np
import pytest
from recipe_cases import same, tensors_of, wide, write_model
from rich.console import Console
from safetensors.numpy import load_file

from cqd_jax.hub.merge_recipe import MergeOptions, merge_recipe
from cqd_jax.hub.recipe_values import ModelReference
from cqd_jax.hub.recipe_vocabulary import Vocabulary

ONE_HAS = {
  "model": {"vocab": {"a": 0, "b": 1}},
  "added_tokens": [{"content": "<s>", "id": 2}, {"content": "<x>", "id": 3}],
}
TWO_HAS = {
  "model": {"vocab": {"a": 0, "b": 1}},
  "added_tokens": [{"content": "<y>", "id": 2}, {"content": "<s>", "id": 4}],
}


@pytest.fixture
def speakers(tmp_path):
  """Models with other numbers of the same tokens, and rows that are of no token."""
  root = tmp_path / "speakers"
  shapes = {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,), "lm_head.weight": (6, 4)}
  made = {name: tensors_of(shapes, seed) for seed, name in enumerate(("one", "two"))}
  for (name, tensors), tokenizer in zip(made.items(), (ONE_HAS, TWO_HAS), strict=True):
    write_model(root / name, tensors, {"vocab_size": 6}, {"tokenizer.json": tokenizer})
  return root, made


def test_a_union_puts_rows_in_the_order_of_its_tokens(speakers, tmp_path, monkeypatch):
  root, made = speakers
  monkeypatch.chdir(root)
  (tmp_path / "recipe.yml").write_text(
    "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: one}, {model: two}]\ntokenizer: {source: union}"
  )
  merge_recipe(tmp_path / "recipe.yml", tmp_path / "merged", Console(file=io.StringIO()), MergeOptions())
  got = load_file(tmp_path / "merged" / "model.safetensors")
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    one, two = (wide(made[model][name]) for model in ("one", "two"))
    # a, b, <s>, and <x> and <y>, of which each is in one model only
    same(got[name], np.stack([(one[0] + two[0]) / 2, (one[1] + two[1]) / 2, (one[2] + two[4]) / 2, one[3], two[2]]))
  same(got["model.norm.weight"], (wide(made["one"]["model.norm.weight"]) + wide(made["two"]["model.norm.weight"])) / 2)
  added = json.loads((tmp_path / "merged" / "tokenizer.json").read_text())["added_tokens"]
  assert {entry["content"]: entry["id"] for entry in added} == {"<s>": 2, "<x>": 3, "<y>": 4}
  assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 5


def test_a_base_has_the_rows_that_others_miss(speakers, tmp_path, monkeypatch):
  root, made = speakers
  monkeypatch.chdir(root)
  (tmp_path / "recipe.yml").write_text("""
merge_method: task_arithmetic
base_model: one
models: [{model: two, parameters: {weight: 0.5}}]
tokenizer_source: base
""")
  merge_recipe(tmp_path / "recipe.yml", tmp_path / "merged", Console(file=io.StringIO()), MergeOptions())
  got = load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"]
  one, two = (wide(made[model]["lm_head.weight"]) for model in ("one", "two"))
  same(got, np.stack([(one[0] + two[0]) / 2, (one[1] + two[1]) / 2, (one[2] + two[4]) / 2, one[3]]))


def test_tokens_of_several_owners_get_their_mean():
  a, b, c = (ModelReference(name) for name in "abc")
  rows = {a: np.array([0, -1, 1]), b: np.array([1, 0, -1]), c: np.array([0, 1, -1])}
  matrices = {model: np.arange(4, dtype=np.float32).reshape(2, 2) + 10 * n for n, model in enumerate((a, b, c))}
  filled = Vocabulary(rows, ()).filled(matrices, None)
  np.testing.assert_array_equal(filled[a], [[0, 1], [16, 17], [2, 3]])
  np.testing.assert_array_equal(filled[c], [[20, 21], [22, 23], [2, 3]])
  np.testing.assert_array_equal(Vocabulary(rows, ()).filled(matrices, c)[a][1], [22, 23])
