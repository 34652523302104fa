"""Patterns of adapters: those that PEFT's users write mean what they mean there; none is matched for long."""

import re

import pytest

from cqd_jax.hub.patterns import UnsupportedPattern, compile_pattern

NAME = "model.layers.11.self_attn.q_proj"


@pytest.mark.parametrize(
  ("pattern", "matches"),
  [
    ("q_proj", True),
    ("self_attn.q_proj", True),
    ("proj", False),  # no whole component
    (r".*self_attn\.(q|k)_proj", True),
    (r"model\.layers\.(0|1|2)\.self_attn\.q_proj", False),
    (r"layers\.\d+\..*q_proj", True),
    (r"layers\.[0-9]{1,2}\.self_attn\.[qkv]_proj", True),
    (r"^model\.layers\.1[01]\.(self_attn)?\.?q_proj", True),
    ("[*+]{1}", False),
    (r"\)*q_proj", True),
    (r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)", True),
    (r".*layers.*attn.*(q|k|v|o)_proj", True),
  ],
)
def test_usual_patterns_mean_what_they_mean_to_peft(pattern, matches):
  assert bool(compile_pattern(pattern).match(NAME)) == matches == bool(re.match(rf"(.*\.)?({pattern})$", NAME))


@pytest.mark.parametrize(
  "pattern",
  [
    "(a+)+b",
    "(.*)*(.*)*x",
    "(?:a|a)*b",
    "(a|b){3,}c",
    "(x)\\1",
    "a*b*c*d*",
    "y" * 301,
    "(.|.)" * 30 + "!",
    ".?" * 31 + "!",
    "(.|..)" * 32 + "!",
  ],
)
def test_what_could_be_matched_for_ever_is_refused(pattern):
  with pytest.raises(UnsupportedPattern):
    compile_pattern(pattern)


def test_the_worst_that_passes_is_decided():
  """Three repetitions of anything and the one before them: of a name of 60 characters at most 60^4 / 24 ways."""
  assert not compile_pattern(".*.*.*x").match("a." * 30)
