"""Which names Python code gives to what follows it."""

import ast
from collections.abc import Iterator

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_BLOCKS = (ast.If, ast.Try, ast.With, ast.For, ast.While)


def names_bound(node: ast.AST) -> Iterator[str]:
  """Names that a statement gives to what follows it."""
  if isinstance(node, _DEFINITIONS):
    yield node.name
  elif isinstance(node, ast.Import | ast.ImportFrom):
    yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
  elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    yield from (each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name))
  elif isinstance(node, _BLOCKS):
    yield from (name for child in ast.iter_child_nodes(node) for name in names_bound(child))
