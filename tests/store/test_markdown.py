"""Texts in Markdown, judged by markdown-it-py: whatever they are, they stay text in their place."""

import numpy as np
import pytest
from markdown_it import MarkdownIt

from cqd_jax.store.markdown import code, escape, markdown_table

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])

HOSTILE = [
  "a|b",
  "a\\|b",
  "a\\\\|b\\",
  "two\nlines\r\n\tand\u2028more",
  "`code` ``more",
  "**bold** _it_ __x__ *y*",
  "<b>x</b> <!-- y --> <http://x.y>",
  "[x](javascript:alert(1)) ![y](z)",
  "&amp; &lt; &#124;",
  "~~gone~~",
  "# heading",
  "#",
  "closing #",
  "closing ##  ",
  "---",
  "===",
  "***",
  "- item",
  "+ item",
  "1. item",
  "12) item",
  "> quote",
  "```",
  "$x$",
  "| a | b |",
  "|---|",
  "-0.013",
  "+.010 ±.002",
  "expert_svd 0.3",
  "_",
  "",
  " ",
  "a  b ",
]


def plain(text):
  """What of a text can be seen."""
  return " ".join(text.split())


def shown(inline):
  """The text of an inline token; anything but text in it is a failure."""
  assert {child.type for child in inline.children} <= {"text", "text_special"}
  return "".join(child.content for child in inline.children)


def cells(table):
  tokens = READER.parse(table)
  assert [token.type for token in tokens if token.level == 0] == ["table_open", "table_close"]
  rows = []
  for token in tokens:
    if token.type == "tr_open":
      rows.append([])
    elif token.type == "inline":
      rows[-1].append(shown(token))
  return rows


def test_a_table_of_plain_text():
  assert markdown_table(["model", "a_b"], [["x", ".700 ±.058"], ["", "-1"]]) == (
    "| model | a_b |\n|---|---|\n| x | .700 ±.058 |\n|  | -1 |\n"
  )


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_any_text_stays_in_its_cell(text):
  table = markdown_table([text, "b"], [["a", text], [text, text]])
  assert cells(table) == [[plain(text), "b"], ["a", plain(text)], [plain(text), plain(text)]]


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_any_text_stays_in_its_heading_list_or_paragraph(text):
  for prefix, kinds in (
    ("# ", ["heading_open", "inline", "heading_close"]),
    ("", ["paragraph_open", "inline", "paragraph_close"]),
    ("- ", ["bullet_list_open", "list_item_open", "paragraph_open", "inline"]),
  ):
    tokens = READER.parse(f"{prefix}{escape(text)}\n")
    if plain(text):
      assert [token.type for token in tokens][: len(kinds)] == kinds
    assert [shown(token) for token in tokens if token.type == "inline" and token.content] == [plain(text)] * bool(
      plain(text)
    )


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_any_text_stays_in_its_code(text):
  if not plain(text):
    return
  (inline,) = [token for token in READER.parse(f"of {code(text)}, as it is") if token.type == "inline"]
  assert [child.type for child in inline.children] == ["text", "code_inline", "text"]
  assert inline.children[1].content.strip() == plain(text)


def test_any_text_of_special_characters_stays_in_its_cell():
  """1000 texts of a fixed seed."""
  alphabet = list("|\\`*_[]()<>!&;#~$-+.1a \n:=\"'{}")
  chance = np.random.default_rng(0)
  texts = ["".join(chance.choice(alphabet, chance.integers(1, 12))) for _ in range(1000)]
  rows = cells(markdown_table(["text"], [[text] for text in texts]))
  assert rows[1:] == [[plain(text)] for text in texts]
  for text in texts:
    (inline,) = [token for token in READER.parse(f"# {escape(text)} #\n") if token.type == "inline"]
    assert shown(inline) == plain(text) if plain(text) else True


def test_usual_names_read_as_they_are():
  for name in ("elite-000042", "expert_svd 0.3", "/home/some_one/models/base.v2", "0.5 x 3 + 0.5 x 4", "it's (a) b"):
    assert escape(name) == name


def test_what_no_file_can_hold_is_replaced():
  assert escape("a\ud800b\U0001f600") == "a\ufffdb\U0001f600"
