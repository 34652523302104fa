"""YAML as configuration files use it: the types of YAML 1.2, each key once, and of a size that a person wrote.

PyYAML reads YAML 1.1, in which `1:30` is the number 90, `yes` is true and 010 is eight; it keeps the last of two equal
keys, and ten lines of aliases can stand for a billion values.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

MOST_CHARACTERS = 1 << 20
MOST_VALUES = 100_000
"""Values that a file may have, each alias counted as all that it stands for."""

MOST_LEVELS = 100
MOST_DIGITS = 300


class YAMLTextError(ValueError):
  """Text that is no YAML, or none that this program reads; the message is one line."""


class _Loader(yaml.SafeLoader):
  """YAML 1.2's core schema."""

  yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)

  def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys = set()
    for key, _ in node.value:
      if key.tag == "tag:yaml.org,2002:merge":
        continue
      name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
      if name is None:
        raise yaml.constructor.ConstructorError(None, None, "expected a name before the colon", key.start_mark)
      if name in keys:
        raise yaml.constructor.ConstructorError(None, None, f"{shortened(key.value)!r} is given twice", key.start_mark)
      keys.add(name)
    content: dict[Any, Any] = super().construct_mapping(node, deep=deep)
    return content

  def construct_int(self, node: yaml.ScalarNode) -> int:
    text = node.value
    if len(text) > MOST_DIGITS:
      raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text)} digits", node.start_mark)
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)

  def construct_float(self, node: yaml.ScalarNode) -> float:
    text = node.value.lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_float)
for _tag, _pattern, _first in (
  ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
  ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
  ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
  (
    "float",
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    list("-+0123456789."),
  ),
  ("merge", r"<<", ["<"]),
):
  _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(text: str) -> Any:
  """What YAML text says, in Python's types.

  Raises:
    YAMLTextError: in one line, with the place where there is one.
  """
  return _read(text, _only_document)


def read_yaml_documents(text: str) -> list[Any]:
  """As `read_yaml`, of text that may hold several documents between lines `---`."""
  documents: list[Any] = _read(text, _all_documents)
  return documents


def _only_document(loader: _Loader) -> Any:
  node = loader.get_single_node()
  if node is None:
    return None
  _check_size(node)
  return loader.construct_document(node)


def _all_documents(loader: _Loader) -> list[Any]:
  documents = []
  while loader.check_node():
    node = loader.get_node()
    _check_size(node)
    documents.append(loader.construct_document(node))
  return documents


def _read(text: str, construct: Callable[[_Loader], Any]) -> Any:
  if len(text) > MOST_CHARACTERS:
    raise YAMLTextError(f"expected at most {MOST_CHARACTERS:,} characters, got {len(text):,}")
  loader = None
  try:
    loader = _Loader(text)
    content = construct(loader)
  except YAMLTextError:
    raise
  except yaml.MarkedYAMLError as error:
    mark = error.problem_mark or error.context_mark
    place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    raise YAMLTextError(f"not YAML: {shortened(error.problem or str(error))}{place}") from error
  except RecursionError as error:
    raise YAMLTextError(f"not YAML: nested deeper than {MOST_LEVELS} levels") from error
  except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError) as error:
    raise YAMLTextError(f"not YAML: {shortened(' '.join(str(error).split()))}") from error
  finally:
    if loader is not None:
      loader.dispose()
  _check_texts(content, "")
  return content


class _Dumper(yaml.SafeDumper):
  """Quotes what either version of YAML would take for something else than text."""

  yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own name)
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
  }


def write_yaml(content: Any, *, one_line: bool = False) -> str:
  """Content of JSON's types as YAML that `read_yaml` and readers of YAML 1.1 read back."""
  width = 1 << 20 if one_line else 80
  text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, default_flow_style=one_line, width=width)
  return text


def shortened(text: str, most: int = 200) -> str:
  """Text of a message that quotes what it was given."""
  return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def _check_size(root: yaml.Node) -> None:
  """Raises for a document that is too large once its aliases are written out, or that contains itself."""
  sizes: dict[int, int] = {}
  open_nodes: set[int] = set()

  def size_of(node: yaml.Node, level: int) -> int:
    if isinstance(node, yaml.ScalarNode):
      return 1
    if id(node) in open_nodes:
      raise YAMLTextError(f"an alias in line {node.start_mark.line + 1} stands for what it is part of")
    if level > MOST_LEVELS:
      raise YAMLTextError(f"not YAML: nested deeper than {MOST_LEVELS} levels")
    if id(node) not in sizes:
      open_nodes.add(id(node))
      parts = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
      sizes[id(node)] = 1 + sum(size_of(part, level + 1) for part in parts)
      open_nodes.discard(id(node))
    return sizes[id(node)]

  if (size := size_of(root, 0)) > MOST_VALUES:
    raise YAMLTextError(f"expected at most {MOST_VALUES:,} values, aliases written out; got {size:,}")


def _check_texts(value: Any, name: str) -> None:
  """Raises for text that no file system and no JSON file takes."""
  if isinstance(value, dict):
    for key, entry in value.items():
      _check_texts(key, name)
      _check_texts(entry, f"{name}.{key}" if name else str(key))
  elif isinstance(value, list):
    for entry in value:
      _check_texts(entry, name)
  elif isinstance(value, str) and ("\0" in value or any("\ud800" <= character <= "\udfff" for character in value)):
    where = f"{shortened(name.encode(errors='replace').decode())}: " if name else ""
    raise YAMLTextError(f"{where}expected text without NUL and lone surrogates, got {shortened(ascii(value))}")
