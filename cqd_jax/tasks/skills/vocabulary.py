"""The frozen vocabulary of the miniature skills: 128 pieces of text, greedy longest match.

The file `vocabulary.txt` (a JSON string a line; the line's number is the id) is part of the package and never derived
again: a vocabulary built from drawn examples differs with the seed and silently makes trained weights useless. It holds
four specials, every character of the skills' prompts and answers, and the pieces that shorten these most, with answers
counted twice because they are decoded token by token.
"""

import json
import re
from collections.abc import Iterable
from importlib import resources
from typing import SupportsIndex

TOKENS: tuple[str, ...] = tuple(
  json.loads(line)
  for line in resources.files(__package__).joinpath("vocabulary.txt").read_text(encoding="utf-8").splitlines()
)
"""The piece of text of each id, specials first."""

VOCABULARY_SIZE = len(TOKENS)

PAD, BEGIN, SEPARATOR, END = range(4)
"""Specials. A training sequence is BEGIN, prompt, SEPARATOR, answer, END; a model is asked with its first half."""

_IDS = {token: index for index, token in enumerate(TOKENS) if index > END}
_LONGEST_FIRST = re.compile("|".join(map(re.escape, sorted(_IDS, key=len, reverse=True))))


def encode(text: str) -> list[int]:
  """Token ids of `text`, without specials (which no text gives).

  Raises:
    ValueError: at a character outside the vocabulary.
  """
  token_ids = []
  position = 0
  while position < len(text):
    match = _LONGEST_FIRST.match(text, position)
    if match is None:
      raise ValueError(f"text: {text[position]!r} at {position} of {text!r} is not in the vocabulary")
    token_ids.append(_IDS[match.group()])
    position = match.end()
  return token_ids


def decode(token_ids: Iterable[SupportsIndex]) -> str:
  """Text of `token_ids` up to the first END; other specials and ids outside the vocabulary give nothing."""
  pieces = []
  for token_id in map(int, token_ids):
    if token_id == END:
      break
    if END < token_id < VOCABULARY_SIZE:
      pieces.append(TOKENS[token_id])
  return "".join(pieces)
