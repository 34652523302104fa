"""Code is found in answers however models wrap it. What is found is executed, and `f(2)` has to be 4."""

import ast
import warnings

import pytest

from cqd_jax.tasks.mbpp.extract import LONGEST, MOST_PARSED, extract_code

CODE = "def f(x):\n    return 2 * x"
HELPED = "def f(x):\n    return double(x)"
HELPER = "def double(x):\n    return 2 * x"
WRONG = "def f(x):\n    return 0"

RIGHT = {
  "the code alone": CODE,
  "a fence": f"```python\n{CODE}\n```",
  "a fence without a label": f"```\n{CODE}\n```",
  "a label nobody knows": f"```Python3 {{.numberLines}}\n{CODE}\n```",
  "a label of another language": f"```js\n{CODE}\n```",
  "a fence of tildes": f"~~~py\n{CODE}\n~~~",
  "a long fence": f"````python\n{CODE}\n````",
  "a fence that is not closed": f"Sure!\n\n```python\n{CODE}\n",
  "a fence that is not closed, and prose": f"```python\n{CODE}\n\nThis doubles x, as asked.\n",
  "a fence that was opened by the prompt": f"{CODE}\n```\nThis doubles x.",
  "a fence after words": f"Here it is: ```python\n{CODE}\n```",
  "a fence that closes after the last word": f"```python\n{CODE}```",
  "a fence on one line": "Use ```python f = lambda x: 2 * x``` for it.",
  "prose before and after": f"Of course. The function:\n\n{CODE}\n\nIt doubles x. Any questions?",
  "prose that is Python": f"Solution\n\n{CODE}\n\nExplanation\nNote: fast",
  "prose around a fence": f"Of course.\n\n```python\n{CODE}\n```\n\nIt doubles x:\n\n* fast\n* short",
  "prose that begins with from": f"from what you say, doubling is meant:\n\n{CODE}",
  "marks": f"[BEGIN]\n{CODE}\n[DONE]",
  "an end mark": f"{CODE}\n[DONE]\n\nYou are an expert, and here is your task\n[BEGIN]\n{WRONG}\n[DONE]",
  "marks around a fence": f"Sure. [BEGIN]\n```python\n{CODE}\n```\n[DONE] Done.",
  "line ends of Windows": f"```python\n{CODE}\n```".replace("\n", "\r\n"),
  "line ends of old": CODE.replace("\n", "\r"),
  "a byte order mark": "\ufeff" + CODE,
  "an indented fence": "1. First:\n\n   ```python\n   " + CODE.replace("\n", "\n   ") + "\n   ```\n2. Done.",
  "an indented block": "    " + CODE.replace("\n", "\n    "),
  "an indented first line": " " + CODE,
  "tabs": "```python\ndef f(x):\n\tif x:\n\t\treturn 2 * x\n```",
  "an example of use": f"```python\n{CODE}\n```\n\nFor example:\n\n```python\nprint(f(3))\n```\n```\n6\n```",
  "a shell command first": f"```bash\npip install double\n```\n```python\n{CODE}\n```",
  "a correction": f"```python\n{WRONG}\n```\nThat is wrong. Rather:\n```python\n{CODE}\n```",
  "a correction that was cut off": f"```python\n{CODE}\n```\nOr:\n```python\ndef f(x):\n    return [0",
  "helpers in a block before": f"```python\n{HELPER}\n```\nand with it\n```python\n{HELPED}\n```",
  "helpers in a block after": f"```python\n{HELPED}\n```\nwhere\n```python\n{HELPER}\nprint(f(1))\n```",
  "helpers of helpers": (
    "```python\nimport operator\n```\n```python\ndef double(x):\n    return operator.mul(2, x)\n"
    f"print(double(f(1)))\n```\n```python\n{HELPED}\n```"
  ),
  "an import in a block of its own": (
    "```python\nimport math\n```\n```python\ndef f(x):\n    return x * int(math.sqrt(4))\n```"
  ),
  "two functions with prose between": f"First a helper.\n{HELPER}\n\nThen:\n\n{HELPED}\n\nThat is all.",
  "a last function that is cut off": f"{CODE}\n\ndef test():\n    assert f(2) == (4",
  "a last def alone": f"{CODE}\n\ndef",
  "a text that goes on after def": "f(x):\n    return 2 * x\n",
  "the same in a fence": "```python\nf(x):\n    return 2 * x\n```",
  "a lambda": "f = lambda x: 2 * x",
  "a class with a call": "```python\nclass Twice:\n    def __call__(self, x):\n        return 2 * x\nf = Twice()\n```",
  "decorators": "```python\nimport functools\n@functools.cache\ndef f(x):\n    return 2 * x\n```",
  "a fence in a docstring": '```python\ndef f(x):\n    """\n    ```\n    f(2)\n    ```\n    """\n    return x * 2\n```',
  "backticks in a text": "```python\ndef f(x):\n    text = '```'\n    return 2 * x\n```",
  "two fences without a close between": f"```python\n{HELPER}\n```python\n{HELPED}\n```",
  "a definition within if": "```python\nif True:\n    def f(x):\n        return 2 * x\n```",
  "a program at the end": f"```python\n{CODE}\n\nif __name__ == '__main__':\n    print(f(int(input())))\n```",
  "odd escapes": '```python\ndef f(x):\n    "\\d"\n    return 2 * x\n```',
  "a comment first": f"# doubles\n{CODE}",
  "special tokens at the end": f"```python\n{CODE}\n```<|im_end|>\n</s>",
  "a special token after the last word": f"{CODE}<|eot_id|>",
  "thoughts": f"<think>\nPerhaps\n```python\n{WRONG}\n```\n</think>\n{CODE}",
  "on the line of the prose": f"Here it is: {CODE}\n\nIt doubles.",
  "within backticks": "It is `def f(x): return 2 * x`, which doubles.",
  "a label without a fence": f"python\n{CODE}",
  "helpers with a long sum": f"```\nn = {'1+' * 900}1\ndef double(x):\n  return 2 * x\n```\n```\n{HELPED} + 0 * n\n```",

  "a decorated helper": f"```\n@staticmethod\n{HELPER}\nprint(f(2))\n```\n```\n{HELPED}\n```",
  "a name that is built in": "```python\ndef sum(x):\n    return 2 * x\nf = sum\n```",
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_code_is_found(case):
  scope = {"__name__": "answer"}
  code = extract_code(RIGHT[case], ["f"])
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the answer
    exec(code, scope)
  assert scope["f"](2) == 4


@pytest.mark.parametrize(
  "answer",
  ["", "I cannot help with that.", "```python\n```", "```", "[BEGIN]", "[DONE]", "def", "\0", "def f(\0): 1", "\ud800"],
)
def test_where_there_is_no_code_there_is_none(answer):
  scope = {}
  exec(extract_code(answer, ["f"]), scope)
  assert "f" not in scope


def test_code_that_defines_something_else_is_still_executed():
  assert extract_code("```python\ndef g(x):\n    return 1\n```", ["f"]) == "def g(x):\n    return 1"
  assert extract_code("globals().update(f=max)", ["f"]) == "globals().update(f=max)"


def test_without_names_all_blocks_are_taken():
  assert extract_code("```\nx = 1\n```\nand\n```\ny = 2\n```", []) == "x = 1\ny = 2"


def test_only_the_beginning_of_a_long_answer_is_looked_at():
  assert extract_code(f"{CODE}\n{'# and so on' * LONGEST}", ["f"]).startswith(CODE)
  assert set(extract_code("#" * LONGEST + f"\n{CODE}", ["f"])) == {"#"}


DEEP = 20_000
HOSTILE = {
  "brackets": "f = " + "(" * DEEP,
  "signs": "f = " + "-" * DEEP + "1",
  "sums": "f = " + "1+" * DEEP + "1",
  "attributes": "f = a" + ".a" * DEEP,
  "calls": "f = a" + "()" * DEEP,
  "indents": "\n".join(" " * depth + "if 1:" for depth in range(300)) + "\ndef f(x): pass",
  "many fences": "```\n" * (DEEP // 10),
  "fences on a line": "```" * DEEP,
  "many beginnings": "def f(x):\n" * (DEEP // 3),
  "many imports": "import\n" * DEEP,
  "quotes": "'''" * DEEP,
  "f-strings": "f'{" * DEEP,
  "half a word": "from " * DEEP,
  "one line": "x" * LONGEST,
  "blanks": " " * (LONGEST - 1) + "x",
  "blanks after a name": "a:" + " " * (LONGEST - 2),
  "blanks after def": "def " * DEEP + " " * DEEP + "f (",
  "blanks after async": ("async" + " " * 300) * 200,
  "special tokens": "<|" * DEEP + "</s>" * DEEP,
  "blocks that need each other": "\n".join(f"```\ndef f{n}(x):\n return f{n + 1}(x)\n```" for n in range(1500)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_made_to_be_hard_to_read_is_read_in_bounded_time(case, monkeypatch):
  parsed = []

  def parse(source):
    parsed.append(len(source))
    return real(source)

  real = ast.parse
  monkeypatch.setattr(ast, "parse", parse)
  extract_code(HOSTILE[case], ["f", "f0"])
  assert sum(parsed) <= MOST_PARSED
  assert len(parsed) <= MOST_PARSED / 100
