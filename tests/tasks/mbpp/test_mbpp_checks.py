"""Tests are divided into what runs beside the answer and what is judged outside; values cross as plain data."""

import collections
import contextlib
import decimal
import enum
import fractions
import math
import random

import pytest

from cqd_jax.tasks.mbpp import harness_mbpp
from cqd_jax.tasks.mbpp.checks import checks_of, functions_of
from cqd_jax.tasks.mbpp.harness_mbpp import encode
from cqd_jax.tasks.mbpp.values import MOST_HASHED, NoValue, decode

PLAIN = [
  None, True, False, 0, -1, 2**53, -(2**53), 3**400, 1.5, -0.0, 1e-310, math.inf, "", "é\0\U0001f600", b"\0\xff", 1j,
  [], [[1, (2,)], {}], (), (1,), {1: 2, "a": [3]}, {(1, 2): {3}}, {1, 2}, {frozenset({1}), frozenset()}, range(0),
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_values_cross_unchanged(value):
  if isinstance(value, range):
    assert encode(value) == ["other", "range"]
    return
  again = decode(encode(value))
  assert again == value
  assert type(again) is type(value)


def test_a_value_that_is_no_number_crosses_too():
  assert math.isnan(decode(encode(math.nan)))
  assert math.copysign(1, decode(encode(-0.0))) == -1


Pair = collections.namedtuple("Pair", "a b")
Color = enum.IntEnum("Color", "RED")
EQUAL = [
  (Pair(1, 2), (1, 2)),
  (Color.RED, 1),
  (collections.Counter("aab"), {"a": 2, "b": 1}),
  (collections.OrderedDict(a=1), {"a": 1}),
  (frozenset({1}), {1}),
  ({1: 2}.keys(), {1}),
  (bytearray(b"a"), b"a"),
  (fractions.Fraction(1, 2), 0.5),
  (decimal.Decimal("0.5"), 0.5),
  (decimal.Decimal("inf"), math.inf),
]


@pytest.mark.parametrize(("value", "plain"), EQUAL, ids=lambda each: type(each).__name__)
def test_what_equals_a_plain_value_is_sent_as_one(value, plain):
  assert decode(encode(value)) == plain


class Always(list):
  """Equal to everything, to Python."""

  def __eq__(self, other):
    return True

  __hash__ = None

  def __iter__(self):
    return iter([4, 5])

  def __len__(self):
    return 2


class Nothing:
  """Equal to everything, and of no known type, whatever it says."""

  __class__ = int

  def __eq__(self, other):
    return True

  __hash__ = None


def test_what_only_says_that_it_is_equal_is_sent_as_what_it_is():
  assert decode(encode(Always([1]))) == [1]
  assert encode(Nothing()) == ["other", "Nothing"]
  for value in (object(), len, iter([]), Nothing, ..., NotImplemented):
    with pytest.raises(NoValue):
      decode(encode(value))


def test_values_without_an_end_are_refused():
  endless = []
  endless.append(endless)
  with pytest.raises(ValueError, match="more than 90 levels"):
    encode(endless)


NO_VALUES = [
  [], {}, 1.5, ["list", 1.5], ["other", "X"], ["nonsense"], [1], [["list"]], ["int"], ["int", 5], ["int", "x"],
  ["int", "1", "2"], ["float", 1.0], ["float", "x"], ["float", "0x1p99999"], ["ratio", "0x1", "0x0"], ["ratio", "0x1"],
  ["bytes", "z"], ["bytes", 1],
  ["complex", "0x1p0"], ["set", ["list"]], ["dict", 1], ["dict", ["list"], 1], ["set", ["dict"]],
  ["set", *range(MOST_HASHED + 1)], ["dict", *range(2 * MOST_HASHED + 2)], {"list": 1}, [None], [True], [["list"], 1],
]  # fmt: skip


@pytest.mark.parametrize("sent", NO_VALUES, ids=lambda sent: repr(sent)[:30])
def test_what_is_no_value_is_refused(sent):
  with pytest.raises(NoValue):
    decode(sent)
  (check,) = checks_of("assert f() == 1", ("f",))
  assert not check.passed([sent])


def test_random_json_is_no_value_and_raises_nothing_else():
  source = random.Random(0)
  words = [None, True, 7, 1.5, "", "0x1", "int", "float", "ratio", "set", "dict", "list", "tuple", "bytes", "complex"]

  def draw(depth):
    if depth == 0 or source.random() < 0.3:
      return source.choice(words)
    return [source.choice(words), *(draw(depth - 1) for _ in range(source.randrange(4)))]

  (check,) = checks_of("assert f() == {1: [2.5, {'x'}]}", ("f",))
  for _ in range(3000):
    sent = draw(4)
    with contextlib.suppress(NoValue):
      decode(sent)
    assert check.passed([sent]) is False
    assert check.passed(sent) is False


def judge(test, **scope):
  """The verdict on a test, whose expressions are evaluated here; and the checks."""
  checks = checks_of(test, ("f",))
  scope = {"math": math, **scope}
  passed = []
  for check in checks:
    exec(check.statements, scope)
    passed.append(check.passed([encode(eval(expression, scope)) for expression in check.expressions]))
  return all(passed), checks


# A test, a right and a wrong `f`, and what is evaluated beside the answer.
DIVIDED = {
  "assert f(2) == [1, 2]": (lambda x: [1, 2], lambda x: (1, 2), ["f(2)"]),
  "assert f(2) == 2": (lambda x: 2.0, lambda x: "2", ["f(2)"]),
  "assert f(2)==True": (lambda x: 1, lambda x: None, ["f(2)"]),
  "assert (f(2)) == -1.5e3": (lambda x: -1500, lambda x: 1500, ["f(2)"]),
  "assert f(2) == set()": (lambda x: frozenset(), lambda x: {}, ["f(2)"]),
  "assert f(2) == {'a': (1,), **{}}": (lambda x: {"a": (1,)}, lambda x: {"a": [1]}, ["f(2)", "{'a': (1,), **{}}"]),
  "assert 4 == f(2)": (lambda x: 4, lambda x: 5, ["f(2)"]),
  "assert f(2) is None": (lambda x: None, lambda x: 0, ["f(2)"]),
  "assert f(2) is True": (lambda x: True, lambda x: 1, ["f(2)"]),
  "assert f(2) is not None": (lambda x: 0, lambda x: None, ["f(2)"]),
  "assert f(2) != 3": (lambda x: 2, lambda x: 3, ["f(2)"]),
  "assert f(2) in (1, 2)": (lambda x: 1, lambda x: [1], ["f(2)"]),
  "assert 3 not in f(2)": (lambda x: [1], lambda x: [3], ["f(2)"]),
  "assert 1 < f(2) <= 3": (lambda x: 3, lambda x: 1, ["f(2)"]),
  "assert set(f(2)) == set([1, 2])": (lambda x: iter([2, 1]), lambda x: [1], ["set(f(2))"]),
  "assert sorted(f(2)) == sorted([2, 1])": (lambda x: (2, 1), lambda x: [], ["sorted(f(2))"]),
  "assert math.isclose(f(2), 1.5, rel_tol=0.001)": (lambda x: 1.5001, lambda x: 1.6, ["f(2)"]),
  "assert math.isclose(f(2), math.sqrt(2) / 2)": (lambda x: 0.5**0.5, lambda x: "x", ["f(2)"]),
  "assert abs(f(2) - 0.5) < 10 ** -3": (lambda x: 0.5001, lambda x: 0.6, ["f(2)"]),
  "assert round(f(2), 2) == 0.33": (lambda x: 1 / 3, lambda x: 0.34, ["f(2)"]),
  "assert f(2)": (lambda x: [0], lambda x: [], ["bool(f(2))"]),
  "assert not f(2)": (lambda x: 0, lambda x: 1, ["bool(f(2))"]),
  "assert f(2) == 1 and not f(2) == 2": (lambda x: 1, lambda x: 2, ["f(2)", "f(2)"]),
  "assert f(2) == 3 or f(2) == 4": (lambda x: 4, lambda x: 5, ["f(2)", "f(2)"]),
  "assert f(2) == 2 ** 70": (lambda x: 1 << 70, lambda x: 1 << 71, ["f(2)"]),
  "assert sum(f(2)) == 3": (lambda x: [1, 2], lambda x: [1], ["sum(f(2))"]),
  "assert f(2)[0].lower() == 'a'": (lambda x: ["A"], lambda x: ["b"], ["f(2)[0].lower()"]),
  "assert (f(2) == 3) == True": (lambda x: 3, lambda x: 4, ["f(2)"]),
  "assert f(2) % 2 == 1": (lambda x: 3, lambda x: "%d", ["f(2)"]),
  "assert f(2) * 10 ** 9 == 1": (lambda x: 1e-9, lambda x: [1], ["f(2)"]),
  r"assert f(2) == 'a\d'": (lambda x: "a\\d", lambda x: "ad", ["f(2)"]),
  "assert f(2) == 'ab' * 2": (lambda x: "abab", lambda x: "ab", ["f(2)"]),
}  # fmt: skip


@pytest.mark.parametrize("test", DIVIDED)
def test_an_assert_is_divided(test):
  right, wrong, expressions = DIVIDED[test]
  verdict, (check,) = judge(test, f=right)
  assert verdict
  assert list(check.expressions) == expressions
  assert check.claimed == ("**{}" in test)
  assert not judge(test, f=wrong)[0]


# What cannot be judged outside: the verdict itself is formed beside the answer.
CLAIMED = {
  "assert all(f(x) == x for x in (1, 2))": (lambda x: x, lambda x: 1),
  "assert isinstance(f(2), int)": (lambda x: x, str),
  "assert sum(f(x) - x for x in (1, 2)) == 0": (lambda x: x, lambda x: 0),
  "assert max(f(2), 3) == 3": (lambda x: x, lambda x: 4),
  "assert f(2) | 1 == 3": (lambda x: x, lambda x: 4),
  "assert f(2) == f(2 + 0)": (lambda x: x, lambda x: float("nan")),
  "assert f(2) == 10 ** 10 ** 5 * 0 + 2": (lambda x: x, lambda x: 3),
  "for x in (1, 2):\n  assert f(x) == x": (lambda x: x, None),
  "f(2)": (lambda x: x, None),
}


@pytest.mark.parametrize("test", CLAIMED)
def test_what_cannot_be_divided_is_marked_as_a_claim(test):
  right, wrong = CLAIMED[test]
  verdict, (check,) = judge(test, f=right)
  assert verdict
  assert check.claimed
  if wrong:
    assert not judge(test, f=wrong)[0]


def test_statements_run_before_the_assert_that_they_are_for():
  first, second = checks_of("a = [1]\nassert f(a) == 1\na.append(2)\nassert f(a) == 2\n", ("f",))
  assert [first.statements, second.statements] == ["a = [1]", "a.append(2)"]
  assert not first.claimed
  assert judge("a = [1]\nassert f(a) == 1\na.append(2)\nassert f(a) == 2\n", f=len)[0]
  with pytest.raises(AssertionError):
    judge("for x in (1, 2):\n  assert f(x) == x\nassert f(3) == 3", f=lambda x: 3)


@pytest.mark.parametrize("sent", [None, [], [1, 1], {}, "1", [[1]], [["list", 1]], [1.0]])
def test_a_check_is_passed_by_nothing_but_its_values(sent):
  (check,) = checks_of("assert f(2) == 1", ("f",))
  assert check.passed([1])
  assert not check.passed(sent)


@pytest.mark.parametrize("test", ["assert f(1) ==", "assert \0", "x ="])
def test_what_is_no_python_is_refused(test):
  with pytest.raises((SyntaxError, ValueError)):
    checks_of(test, ("f",))


SOLUTION = "import math\nclass f: pass\nsum = g = lambda x: x\nif 1:\n  def k(x): pass"


@pytest.mark.parametrize(
  ("test", "solution", "names"),
  [
    ("assert set(f(g(1), h.k(2), n(3))) == sorted([1])", SOLUTION, ("f", "g")),
    ("assert sum(1, 2) == k(set())", SOLUTION, ("sum", "k")),
    ("assert set(f(g(1), h.k(2))) == sorted([1])", "def another(): pass", ("f", "g")),
    ("assert math.isclose(f(1), 2) and isclose(f(1), 2)", "no Python", ("f",)),
    ("assert sum(1, 2) == 3", "", ("sum",)),
    ("assert True", SOLUTION, ()),
  ],
)
def test_functions_that_tests_are_about(test, solution, names):
  assert functions_of([test], solution) == names


def test_an_answers_function_may_bear_the_name_of_pythons_own():
  (check,) = checks_of("assert sum([1, 2]) == 7", ("sum",))
  assert check.expressions == ("sum([1, 2])",)
  assert not check.claimed
  assert check.passed([7])
  assert not check.passed([3])
  assert not check.passed([])


def test_the_harness_returns_values_in_order():
  payload = {
    "before": "import math",
    "code": "def f(x):\n  return math.floor(x)\ncount = 0",
    "after": "count += 1",
    "checks": [["count += 1", ["f(1.5)", "[count]"]], ["", ["{1.5}"]]],
  }
  assert harness_mbpp.run(payload) == [[1, ["list", 2]], [["set", ["float", "0x1.8000000000000p+0"]]]]
