"""YAML 1.2's types, each key once, and nothing that a person would not write."""

import json
import random
import time

import pytest
import yaml

from cqd_jax.store.yaml_text import MOST_CHARACTERS, YAMLTextError, read_yaml, write_yaml


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("1:30", "1:30"), ("yes", "yes"), ("on", "on"), ("No", "No"), ("true", True), ("False", False), ("010", 10),
    ("0o10", 8), ("0x1F", 31), ("-3", -3), ("+3", 3), ("1e-3", 1e-3), ("2.", 2.0), (".5", 0.5), ("1_000", "1_000"),
    (".inf", float("inf")), ("-.INF", -float("inf")), ("~", None), ("", None), ("null", None),
    ("2001-01-01", "2001-01-01"),
    ("2001-99-99", "2001-99-99"), ("=", "="), ("'1'", "1"), ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
    ("a: &x {c: 1}\nb: {<<: *x, d: 2}\ne: {<<: *x, c: 3}", {"a": {"c": 1}, "b": {"c": 1, "d": 2}, "e": {"c": 3}}),
  ],
)  # fmt: skip
def test_values_have_the_types_of_yaml_1_2(text, value):
  assert read_yaml(text) == value
  assert type(read_yaml(text)) is type(value)


BOMB = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [
  f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)
])  # fmt: skip


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (BOMB, "at most 100,000 values, aliases written out; got 1[0-9,]{12,}"),
    ("a: &a [*a]", "an alias in line 1 stands for what it is part of"),
    ("[" * 5000, "nested deeper than 100 levels"),
    ("a: " + "[" * 200 + "]" * 200, "nested deeper than 100 levels"),
    ("a: " + "9" * 5000, "a number of 5000 digits in line 1, column 4"),
    ("seed: 1\nname: b\nseed: 2", "'seed' is given twice in line 3, column 1"),
    ("{a: 1, a: 1}", "'a' is given twice"),
    ("? [a]\n: 1", "expected a name before the colon in line 1"),
    ("a: [1", "not YAML: .* in line 1"),
    ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ("a: !!int x", "not YAML: invalid literal"),
    ("a: !!timestamp x", "could not determine|not YAML"),
    ("x: " + "a" * MOST_CHARACTERS, "at most 1,048,576 characters"),
    ('a: {b: ["c\\0d"]}', r"a\.b: expected text without NUL and lone surrogates, got 'c\\x00d'"),
    ('a: "\\ud800"', r"a: expected text without NUL and lone surrogates, got '\\ud800'"),
    ('"\\0": 1', "without NUL"),
    ("\x01", "not YAML: .*special characters are not allowed"),
    ("a: *missing", "undefined alias"),
    ("--- 1\n--- 2", "but found another document in line 2"),
  ],
)
def test_what_is_refused_is_one_short_line(text, message):
  began = time.monotonic()
  with pytest.raises(YAMLTextError, match=message) as caught:
    read_yaml(text)
  assert time.monotonic() - began < 20
  assert len(str(caught.value)) < 600
  assert "\n" not in str(caught.value)


def test_what_is_written_is_read_back_by_both_versions():
  draw = random.Random(0)
  texts = [
    "1e5",
    "0o7",
    "1:30",
    "yes",
    "010",
    "null",
    "~",
    "",
    "2001-01-01",
    "a: b",
    "- a",
    "#",
    "é☃",
    "a\nb",
    " a",
    ".inf",
    "=",
    "<<",
  ]

  def anything(depth):
    kind = draw.choice(["text", "number", "list", "dict"] if depth else ["text", "number"])
    if kind == "text":
      return draw.choice([*texts, "".join(draw.choices("ab:{}[]\"'0123456789.eE-+ #&*!|>%@`,?", k=draw.randrange(6)))])
    if kind == "number":
      return draw.choice(
        [draw.randrange(-(10**9), 10**9), draw.random() * 10 ** draw.randrange(-9, 9), True, False, None]
      )
    if kind == "list":
      return [anything(depth - 1) for _ in range(draw.randrange(4))]
    return {draw.choice(texts) + str(number): anything(depth - 1) for number in range(draw.randrange(4))}

  for _ in range(300):
    content = anything(3)
    for one_line in (False, True):
      text = write_yaml(content, one_line=one_line)
      assert json.dumps(read_yaml(text)) == json.dumps(content), text
      assert json.dumps(yaml.safe_load(text)) == json.dumps(content), text
