"""Imports go down only: reads every import of the package and fails on one that climbs or crosses."""

import ast
from pathlib import Path

import pytest

import cqd_jax

PACKAGE = Path(cqd_jax.__file__).parent

LAYERS = {
  "types": 0,
  "checks": 0,
  "trees": 0,
  "low_rank": 0,
  "operators": 1,
  "genotypes": 1,
  "archive": 1,
  "models": 1,
  "tasks": 2,
  "search": 2,
  "sandbox": 3,
  "hub": 3,
  "store": 3,
  "report": 3,
  "terminal": 3,
  "engines": 3,
  "io": 4,
  "config": 4,
  "run": 5,
  "inspect": 5,
  "cli": 6,
}

# Packages of one layer that may import each other, and which way.
SIDEWAYS = {
  ("checks", "types"),
  ("trees", "types"),
  ("low_rank", "types"),
  ("genotypes", "operators"),
  ("search", "tasks"),
  ("report", "store"),
  ("hub", "store"),
  ("hub", "terminal"),
  ("engines", "hub"),
}


def module_of(path: Path) -> str:
  """The file or package at the top of cqd_jax to which a file belongs."""
  return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> list[str]:
  names = []
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names += [node.module or ""]
  return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_go_down_only(path):
  importer = module_of(path)
  if importer == "__init__":
    assert not [name for name in imports_of(path) if name.startswith("cqd_jax")]
    return
  assert importer in LAYERS, f"{importer} has no layer: give it one here and in the design"
  for name in imports_of(path):
    if not name.startswith("cqd_jax."):
      continue
    imported = name.split(".")[1]
    lower = LAYERS[imported] < LAYERS[importer]
    assert lower or imported == importer or (importer, imported) in SIDEWAYS, f"{path} imports {name}"


def test_torch_and_peft_are_never_imported():
  for path in FILES:
    assert not [name for name in imports_of(path) if name.split(".")[0] in ("torch", "peft")], path
