"""`cqd plugs`: what a configuration can name."""

import difflib
import inspect
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cqd_jax.config.plugs import KINDS, PlugError, find, in_words, settings_of


def show_plugs(kind: str | None, console: Console) -> None:
  """Prints the plugs of one kind, or of all, with their settings and defaults.

  Raises:
    PlugError: naming a kind that there is not.
  """
  if kind is not None and kind not in KINDS:
    near = difflib.get_close_matches(kind, KINDS, n=1)
    raise PlugError(
      f"plugs: no kind {kind!r}; there are {', '.join(KINDS)}" + (f"; did you mean {near[0]!r}?" if near else "")
    )
  for name, own in KINDS.items():
    if kind not in (None, name):
      continue
    table = Table(title=f"{name}: {own.what}", title_justify="left", show_edge=False, pad_edge=False)
    for column in ("use", "setting", "default", "what it is"):
      table.add_column(column, overflow="fold")
    for use in own.table:
      function = find(name, use, name)
      table.add_row(f"[bold]{use}[/bold]", "", "", escape(_first_paragraph(function)))
      for setting in settings_of(name, function).values():
        default = "required" if setting.required else in_words(setting.default)
        table.add_row("", setting.name, escape(default), escape(setting.text))
    if not own.table:
      table.add_row("package.module:function", "", "", "")
    console.print(table)
    console.print()


def _first_paragraph(function: Any) -> str:
  """Of a docstring, on one line."""
  return (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
