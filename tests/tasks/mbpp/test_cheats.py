"""Answers that try to be graded right without being so, in the real sandbox; and that fail in every other way."""

import json

import pytest

from cqd_jax.sandbox.sandbox import Limits, Sandbox, probe
from cqd_jax.tasks.mbpp import mbpp

pytestmark = pytest.mark.skipif(probe() is not None, reason=f"{probe()}")

PROBLEMS = {
  "a number": ("return x * x + 7", ["assert f(3) == 16", "assert f(-4) == 23"]),
  "a list": ("return [x, -x]", ["assert f(3) == [3, -3]", "assert list(f(5)) == [5, -5]"]),
  "nearly": ("return x / 3", ["assert math.isclose(f(1), 0.3333, abs_tol=0.01)", "assert abs(f(2) - 0.6667) < 0.01"]),
  "a type": ("return {x: None}", ["assert f(3) == {3: None}", "assert f(4) != f(3) and f(4) == {4: None}"]),
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  path = tmp_path_factory.mktemp("mbpp") / "mbpp.jsonl"
  lines = [
    {"prompt": name, "code": f"def f(x):\n  {code}", "test_imports": ["import math"], "test_list": tests}
    for name, (code, tests) in PROBLEMS.items()
  ]
  path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  return mbpp(sizes={"train": 1, "validation": 1, "test": 2}, seed=0, data=str(path), seconds=1)


@pytest.fixture(scope="module")
def sandbox(task):
  with Sandbox([task.harness], limits=Limits(wall_seconds=3.0), workers=2) as opened:
    yield opened


ANY = """
class Any(base):
  def yes(self, *_): return True
  __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __contains__ = yes
  def __hash__(self): return 0
  def __sub__(self, other): return self
  __rsub__ = __abs__ = __add__ = __radd__ = __round__ = __neg__ = __sub__
  def __len__(self): return 2
  def __iter__(self): return iter((self, self))
  def __getattr__(self, name): return self
  def __float__(self): return 0.0
  def __index__(self): return 0
  def __call__(self, *_, **__): return self
"""
FRAMES = """
import sys
def frames():
  frame = sys._getframe()
  while frame:
    yield frame
    frame = frame.f_back
"""

CHEATS = {
  "exit with success": "import sys\nsys.exit(0)",
  "exit in the function": "import sys\ndef f(x): sys.exit(0)",
  "exit at once": "import os\nos._exit(0)",
  "exit at once in the function": "import os\ndef f(x): os._exit(0)",
  "raise SystemExit": "raise SystemExit",
  "raise KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
  "raise GeneratorExit": "def f(x): raise GeneratorExit",
  "quit": "quit()",
  "abort": "import os\nos.abort()",
  "exit when it ends": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return None",
  "pass an exception on": "def f(x): raise AssertionError",
  "replace AssertionError": "import builtins\nbuiltins.AssertionError = type('No', (Exception,), {})\ndef f(x): 0",
  "an AssertionError that is none": "import builtins\nbuiltins.AssertionError = lambda *_: None\ndef f(x): 0",
  "turn asserts off": "import sys\nsys.flags = None\n__debug__2 = False\ndef f(x): 0",
  "equal to everything": f"base = object{ANY}def f(x): return Any()",
  "an int equal to everything": f"base = int{ANY}def f(x): return Any()",
  "a float equal to everything": f"base = float{ANY}def f(x): return Any()",
  "a list equal to everything": f"base = list{ANY}def f(x): return Any()",
  "a dict equal to everything": f"base = dict{ANY}def f(x): return Any()",
  "a text equal to everything": f"base = str{ANY}def f(x): return Any()",
  "a class equal to everything": f"base = type{ANY}def f(x): return Any('A', (), {{}})",
  "a list of what is equal to everything": f"base = object{ANY}def f(x): return [Any(), Any()]",
  "say to be an int": "class A:\n  __class__ = int\n  def __eq__(self, o): return True\ndef f(x): return A()",
  "mock.ANY": "from unittest.mock import ANY\ndef f(x): return ANY",
  "a mock": "from unittest.mock import MagicMock\ndef f(x): return MagicMock()",
  "print": "print('16 PASSED OK true')\ndef f(x): print(x * x + 7)",
  "write to every descriptor": (
    "import os\nfor n in range(64):\n  for text in (b'[[16],[23]]', bytes(17) + b'\\0\\0\\0\\x0b[[16],[23]]'):\n"
    "    try: os.write(n, text)\n    except OSError: pass\nos._exit(0)"
  ),
  "claim that all is true": (
    f"{FRAMES}import json, os, struct\nfor frame in frames():\n  if 'word' in frame.f_locals:\n"
    "    word, channel = frame.f_locals['word'], frame.f_locals['channel']\n"
    "    body = json.dumps([[True], [True]]).encode()\n"
    "    os.write(channel, word + struct.pack('!BI', 0, len(body)) + body)\n    os._exit(0)"
  ),
  "claim what the payload expects": (
    f"{FRAMES}def f(x):\n  for frame in frames():\n    for value in list(frame.f_locals.values()):\n"
    "      if isinstance(value, dict) and 'checks' in value:\n"
    "        texts = [t for _, ts in value['checks'] for t in ts if '==' in t or 'close' in t]\n"
    "        return eval(texts[0].split('==')[1])"
  ),
  "find the expected value anywhere": (
    f"{FRAMES}import gc\ndef f(x):\n  for each in gc.get_objects():\n"
    "    if isinstance(each, dict) and each.get('expected') is not None: return each['expected']\n"
    "    if isinstance(each, (list, tuple)) and len(each) == 2 and each[0] == f'assert f({x})': return each[1]"
  ),
  "remove the checks": (
    f"{FRAMES}for frame in frames():\n  if 'payload' in frame.f_locals: frame.f_locals['payload']['checks'].clear()\n"
    "def f(x): return 0"
  ),
  "other checks": (
    f"{FRAMES}for frame in frames():\n  if 'payload' in frame.f_locals:\n"
    "    for check in frame.f_locals['payload']['checks']: check[1][:] = ['True'] * len(check[1])\ndef f(x): return 0"
  ),
  "replace the harness": (
    "import sys\nfor name, module in list(sys.modules.items()):\n  if name.startswith('harness_'):\n"
    "    module.encode = module._values = module.run = lambda *_: True\ndef f(x): return 0"
  ),
  "replace the worker": (
    "import sys\nworker = sys.modules['__main__']\nworker._execute = lambda *_: (0, b'[[true],[true]]')\n"
    "worker.find_non_json = lambda value: ''\nworker.ENCODE = lambda value: '[[true],[true]]'\ndef f(x): return 0"
  ),
  "replace builtins": (
    "import builtins\nbuiltins.eval = builtins.compile = builtins.list = builtins.abs = lambda *_, **__: True\n"
    "builtins.bool = builtins.isinstance = builtins.issubclass = lambda *_: True\ndef f(x): return 0"
  ),
  "replace math": "import math\nmath.isclose = lambda *_, **__: True\nabs = lambda x: 0\ndef f(x): return 1e6",
  "shadow builtins": "def list(x): return True\nabs = bool = set = list\ndef f(x): return 5",
  "trace": "import sys\nsys.settrace(lambda *_: None)\nsys.setprofile(lambda *_: None)\ndef f(x): return 0",
  "change a constant": (
    "import ctypes\ndef f(x):\n  for at in range(0, 32):\n"
    "    ctypes.memmove(id(16) + at, id(5) + at, 1)\n  return 5"
  ),
  "fork": "import os\nif os.fork(): os._exit(0)\ndef f(x): return 0",
  "a thread": "import threading, os, time\nthreading.Timer(0, os._exit, (0,)).start()\ndef f(x): time.sleep(1)",
  "recurse": "def f(x): return f(x)",
  "a deep result": "def f(x):\n  a = []\n  for _ in range(10 ** 5): a = [a]\n  return a",
  "an endless result": "def f(x):\n  a = []\n  a.append(a)\n  return a",
  "a huge number": "def f(x): return 1 << 10 ** 6",
  "read a file": "def f(x): return open('/etc/passwd').read()",
  "ask": "def f(x): return input()",
  "nothing": "",
  "prose": "I am sorry, but I cannot help with that.",
  "no Python": "def f(x:\n  return",
  "another name": "def g(x): return x * x + 7",
  "no function": "f = 16",
  "too few arguments": "def f(): return 16",
  "a wrong type": "def f(x): return str(x * x + 7)",
  "None": "def f(x): x * x + 7",
  "one right value": "def f(x): return {3: 16, 5: [5, -5], 2: 2 / 3, 4: {4: None}}.get(x)",
  "a lone surrogate": "def f(x): return '\ud800'",
  "a null": "def f(x): return '\0'",
}  # fmt: skip

# Of these one problem is enough.
SLOW = {
  "loop": "def f(x):\n  while True: pass",
  "loop at once": "while True: pass",
  "sleep": "import time\ndef f(x): time.sleep(1000)",
  "a slow pattern": "import re\ndef f(x): return re.match('(a+)+$', 'a' * 50 + 'b')",
  "much memory": "def f(x): return [0] * 10 ** 10",
  "bit by bit": "def f(x):\n  a = []\n  while True: a.append(bytes(1 << 20))",
  "a large result": "def f(x): return 'x' * 10 ** 7",
  "results that collide": "def f(x): return {n * (2 ** 61 - 1) for n in range(2000)}",
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_honest_answers_pass(task, sandbox, problem):
  sample = task.samples()[list(PROBLEMS).index(problem)]
  answer = f"def f(x):\n  {PROBLEMS[problem][0]}\n"
  (outcome,) = sandbox([task.job(sample, answer)])
  assert task.passed(sample, outcome), outcome


def test_no_cheat_passes_and_none_harms_the_next(task, sandbox):
  """All in one call, as a population's answers are."""
  pairs = [(cheat, sample) for cheat in CHEATS for sample in task.samples()]
  pairs += [(cheat, task.samples()[0]) for cheat in SLOW]
  jobs = [task.job(sample, f"{(CHEATS | SLOW)[cheat]}\n") for cheat, sample in pairs]
  outcomes = sandbox(jobs)
  passed = [
    (cheat, sample.prompt)
    for (cheat, sample), outcome in zip(pairs, outcomes, strict=True)
    if task.passed(sample, outcome)
  ]
  assert passed == []
  honest = [f"def f(x):\n  {code}\n# afterwards" for code, _ in PROBLEMS.values()]
  after = sandbox([task.job(sample, answer) for sample, answer in zip(task.samples(), honest, strict=True)])
  assert all(task.passed(sample, outcome) for sample, outcome in zip(task.samples(), after, strict=True))


def test_a_cheat_is_executed_and_not_merely_lost(task, sandbox):
  """The same tricks do no harm to an answer that is right, so it is the values that decide."""
  for cheat in ("print", "replace AssertionError", "turn asserts off", "trace", "a list equal to everything"):
    sample = task.samples()[0]
    (outcome,) = sandbox([task.job(sample, f"{CHEATS[cheat]}\ndef f(x): return x * x + 7\n")])
    assert task.passed(sample, outcome), (cheat, outcome)
