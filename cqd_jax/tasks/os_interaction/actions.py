"""What a model's answer says is to be done, in the published text format; and what it is shown of an output."""

import re
from typing import Literal, NamedTuple

SHOWN = 800
KEPT = 780
CUT = "\n[truncated because the output is too long]"


class Action(NamedTuple):
  """What an answer says is to be done.

  Attributes:
    kind: "bash": execute `content`; "answer": `content` is the answer; "finish": what was asked for is done; "none":
      the answer says nothing of this.
    content: see there.
  """

  kind: Literal["bash", "answer", "finish", "none"]
  content: str = ""


def parse_action(text: str) -> Action:
  """Reads an answer.

  The last line of the form "Act: bash", "Act: finish" or "Act: answer(...)" counts. The answer is what stands between
  the first opening and the last closing parenthesis of that line; without them the line says nothing. What is executed
  are all blocks that begin with "```bash" and a new line, wherever they stand, with an empty line between them.
  """
  for said in reversed(re.findall(r"Act:\s*(.+)", text)):
    kind = said.lower()
    if kind.startswith("bash"):
      return Action("bash", "\n\n".join(re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)))
    if kind.startswith("finish"):
      return Action("finish")
    first, last = said.find("(", len("answer")), said.rfind(")")
    if kind.startswith("answer") and first >= 0 and last >= 0:
      return Action("answer", said[first + 1 : last])
  return Action("none")


def observation(output: str) -> str:
  """What the model is told of the output of a command: of more than 800 characters, the first 780."""
  if not output:
    return "The output of the OS is empty."
  return "The output of the OS:\n\n" + (output[:KEPT] + CUT if len(output) > SHOWN else output)
