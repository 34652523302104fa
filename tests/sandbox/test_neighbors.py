"""Nothing of another job is in the process that an answer runs in: not in frames, objects, memory or descriptors.

A thousand jobs whose payloads and results carry a mark have been executed by the same worker when an answer looks for
them. The looking itself is checked: it finds the mark of its own payload.
"""

import secrets
import sys

import pytest
from call_cases import HARNESS

from cqd_jax.sandbox.sandbox import Sandbox, probe
from cqd_jax.tasks.execution import Harness, Job, Outcome
from cqd_jax.tasks.skills.coding import coding
from cqd_jax.tasks.task import grade_population

pytestmark = pytest.mark.skipif(probe() is not None, reason=f"{probe()}")

JOBS = 1000
OWN = "9999"

SHELL = Harness(
  "shell",
  """
import subprocess
def run(payload):
  return subprocess.run(["sh", "-c", payload["code"]], capture_output=True, text=True).stdout
""",
)

# Marks are `half + half + four digits`; the digits of all that is found are returned, in order.
LOOKING = """
import ctypes, gc, os, sys
HALVES = {halves!r}
def marks(content):
  needle, found, place = "".join(HALVES).encode(), set(), -1
  while (place := content.find(needle, place + 1)) >= 0:
    digits = content[place + len(needle):][:4]
    if len(digits) == 4 and digits.isdigit():
      found.add(digits.decode())
  return found
def text(value):
  try:
    return repr(value).encode(errors="replace")
  except BaseException:
    return b""
"""

WAYS = {
  "frames": """
def f(mark):
  frame, found = sys._getframe(), set()
  while frame:
    found |= marks(text(frame.f_locals)) | marks(text(frame.f_globals))
    frame = frame.f_back
  return sorted(found)
""",
  "objects": """
def f(mark):
  held, found = [mark, []], set()
  for known in gc.get_objects():
    for value in [known, *gc.get_referents(known)]:
      if type(value) in (str, bytes, bytearray, memoryview, list, tuple, dict):
        found |= marks(bytes(value) if type(value) in (bytearray, memoryview) else text(value))
  return sorted(found)
""",
  "memory": """
PAGE = 4096
def f(mark):
  libc = ctypes.CDLL(None, use_errno=True)
  libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
  libc.sbrk.restype = ctypes.c_void_p
  reader, writer = os.pipe()
  def there(page):  # the kernel says so
    return libc.write(writer, page * PAGE, 1) == 1 and os.read(reader, 1) is not None
  def read(page):
    return os.read(reader, PAGE) if libc.write(writer, page * PAGE, PAGE) == PAGE else b""
  starts = {id(o) // PAGE for known in gc.get_objects() for o in [known, *gc.get_referents(known)]}
  starts |= {(libc.sbrk(0) - 1) // PAGE, ctypes.c_void_p.in_dll(libc, "environ").value // PAGE}
  starts |= {ctypes.cast(libc.write, ctypes.c_void_p).value // PAGE}
  end, pages, found = 0, 0, set()
  for start in sorted(starts):
    if start < end:
      continue
    while there(start - 1):
      start -= 1
    end, tail = start, b""
    while content := read(end):
      found |= marks(tail + content)
      tail, end, pages = content[-64:], end + 1, pages + 1
  assert pages * PAGE > 4 << 20, pages
  return sorted(found)
""",
  "descriptors": """
def f(mark):
  found = marks(mark.encode())
  for descriptor in range(1024):
    try:
      os.set_blocking(descriptor, False)
      found |= marks(os.read(descriptor, 1 << 20))
    except OSError:
      pass
  return sorted(found)
""",
}


@pytest.fixture(scope="module")
def halves():
  return [secrets.token_hex(6), secrets.token_hex(6)]


@pytest.fixture(scope="module")
def sandbox(halves):
  """A worker after a thousand jobs; more wait behind the one that looks."""
  with Sandbox([HARNESS, SHELL], workers=1) as opened:
    outcomes = opened.run([marked(halves, index) for index in range(JOBS)])
    assert [outcome.value for outcome in outcomes] == ["".join(halves) + f"{index:04}" for index in range(JOBS)]
    yield opened


def marked(halves, index):
  mark = "".join(halves) + f"{index:04}"
  return Job("call", {"code": "def f(mark):\n  return mark", "argument": mark})


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_finds_no_mark_but_its_own(sandbox, halves, way):
  looking = Job("call", {"code": LOOKING.format(halves=halves) + WAYS[way], "argument": "".join(halves) + OWN})
  behind = [marked(halves, JOBS + index) for index in range(20)]
  outcome, *others = sandbox.run([looking, *behind])
  assert outcome == Outcome("ok", [OWN]), outcome
  assert all(other.status == "ok" for other in others)


@pytest.mark.parametrize("way", ["memory", "descriptors"])
def test_nor_does_a_program_that_an_answer_starts(sandbox, halves, way):
  mark = "".join(halves) + OWN
  program = LOOKING.format(halves=halves) + WAYS[way] + f"print(*f(HALVES[0] + HALVES[1] + {OWN!r}))"
  code = f"{sys.executable if sys.base_prefix == sys.prefix else 'python3'} - <<'PROGRAM'\n{program}\nPROGRAM"
  outcome = sandbox.run([Job("shell", {"code": code, "argument": mark})])[0]
  assert outcome == Outcome("ok", f"{OWN}\n"), outcome


CHEAT = """return 0
import sys, json
frame = sys._getframe()
while frame:
  for name in ("body", "got", "payload", "value"):
    try:
      sys.modules["harness_coding"].INPUTS[:] = json.loads(frame.f_locals[name])
    except Exception:
      pass
  frame = frame.f_back
class Same(str):
  __repr__ = str.__str__
def f(xs): return Same("".join(xs))
"""


def test_who_copies_the_answer_before_it_is_graded_wrong():
  task = coding(sizes={"train": 0, "validation": 1, "test": 0})
  (example,) = task.examples("validation")
  with Sandbox([task.harness], workers=1) as opened:
    grades = grade_population([task], [[example]], [[[example.answer]], [[CHEAT]]], opened)
  assert grades.ravel().tolist() == [True, False]
