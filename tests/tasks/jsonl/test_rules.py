"""Rules compare texts with what was expected."""

import sys
import types
from decimal import Decimal

import pytest

from cqd_jax.tasks.jsonl.rules import RULES, check_expected, last_number, rule_named, score_by

CASES = [
  ("exact", "42", " 42\n", True), ("exact", "42", "42.", False), ("exact", 42, "42", True),
  ("exact", "Yes", "yes", False), ("exact", "", "  ", True), ("exact", 1.5, "1.5", True),
  ("exact", "é", "é", True), ("contains", "Paris", "It is Paris, of course.", True),
  ("contains", "Paris", "paris", False), ("contains", 7, "17", True), ("numeric", 42, "The answer is 42.", True),
  ("numeric", 42, "42 or 43", False), ("numeric", 42, "43, no: 42", True),
  ("numeric", "#### 1,234", "so $1234.00", True), ("numeric", 1234, "1,234,5", False),
  ("numeric", -5, "x = -5", True), ("numeric", 5, "10-5", True), ("numeric", -5, "\N{MINUS SIGN}5 degrees", True),
  ("numeric", 0.5, ".5", True), ("numeric", 5, "5%", True), ("numeric", 1e6, "1e6", True),
  ("numeric", 1e6, "1,000,000", True), ("numeric", 0, "-0.0", True), ("numeric", 10 / 3, "3.3333333", True),
  ("numeric", 10 / 3, "3.33", False), ("numeric", 2**70, str(2**70), True),
  ("numeric", 2**70, str(2**70 + 1), False), ("numeric", 3, "none", False), ("numeric", 3, "", False),
  ("numeric", 3, "3.14", False), ("numeric", 3, "1e999999", False), ("numeric", 0.1, "1e-999999", False),
  ("numeric", 3, "9" * 100_000, False), ("numeric", 18, "#### 18\n\nQuestion: none", True),
  ("numeric", 1.2, "v1.2", True), ("numeric", 1234, "1,234, that is", True), ("numeric", 3, "1, 2, 3", True),
  ("regex", r"^(yes|no)$", "yes", True), ("regex", r"^(yes|no)$", "yes!", False),
  ("regex", r"\b42\b", "it is 42", True), ("regex", "(?i)paris", "PARIS", True),
  ("regex", r"\d{4}-\d\d", "no date", False),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "expected", "text", "right"), CASES)
def test_rules(rule, expected, text, right):
  check_expected(rule, expected, "here")
  assert score_by(rule_named(rule), text, expected) == float(right)


@pytest.mark.parametrize(
  ("text", "number"),
  [
    ("1," * 9 + "111," * 50_000 + "1111", "1111"),
    ("1.", "1"),
    ("a1b2", "2"),
    ("1.2.3", "3"),
    ("-", None),
    ("1,23", "23"),
    ("(3)-4", "4"),
    ("3e", "3"),
    ("+7", "7"),
  ],
)
def test_numbers_in_texts(text, number):
  assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("hostile", [r"(a+)+$", r"(.*b){25}", r"(?:a?){40}a{40}$", r"^(([a-z])+.)+[A-Z]([a-z])+$"])
def test_a_pattern_without_an_end_is_ended(hostile, recwarn):
  """Most need centuries on this text. Whatever the outcome, there is one, and a stop is said."""
  text = "a" * 60 + "!"
  score = score_by(RULES["regex"], text, hostile)
  stopped = [str(each.message) for each in recwarn]
  assert all("took more than 1 s on an answer, which counts as wrong" in each for each in stopped)
  assert score == 0.0


def test_a_pattern_that_is_stopped_is_named():
  with pytest.warns(UserWarning, match=r"the pattern '\(a\|aa\)\+\$' took more than 1 s"):
    assert score_by(RULES["regex"], "a" * 100 + "!", "(a|aa)+$") == 0.0


@pytest.mark.parametrize(
  ("rule", "expected", "message"),
  [
    ("numeric", "many", "here: answer: expected a number for the rule numeric, got 'many'"),
    ("exact", [1], r"here: answer: expected text or a number for the rule exact, got \[1\]"),
    ("exact", True, "expected text or a number for the rule exact, got True"),
    ("numeric", float("nan"), "expected text or a number for the rule numeric, got nan"),
    ("contains", "", "here: answer: expected some text for the rule contains, got none, which is in every answer"),
    ("regex", "(a", r"here: answer: expected a regular expression, got '\(a'"),
  ],
)
def test_what_a_rule_cannot_compare_with_is_named(rule, expected, message):
  with pytest.raises(ValueError, match=message):
    check_expected(rule, expected, "here")


@pytest.fixture
def own(monkeypatch):
  module = types.ModuleType("own_rules")
  module.half = lambda text, expected: 0.5 if text == expected["a"] else 0
  module.words = lambda text, expected: "yes"
  module.number = 3
  monkeypatch.setitem(sys.modules, "own_rules", module)


@pytest.mark.usefixtures("own")
def test_anybodys_function_is_a_rule():
  rule = rule_named("own_rules:half")
  check_expected("own_rules:half", {"a": "x"}, "here")
  assert score_by(rule, "x", {"a": "x"}) == 0.5
  assert score_by(rule, "y", {"a": "x"}) == 0.0
  with pytest.raises(ValueError, match="rule: expected True, False or a number of <lambda>, got 'yes'"):
    score_by(rule_named("own_rules:words"), "x", 1)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("equal", "rule: expected one of exact, contains, numeric, regex, or package.module:function, got 'equal'"),
    ("no_such_rules:f", r"rule: 'no_such_rules:f' cannot be imported \(No module"),
    ("own_rules:f", "rule: 'own_rules:f' cannot be imported"),
    (":f", "rule: ':f' cannot be imported"),
    ("own_rules:number", "rule: 'own_rules:number' is no function, but int"),
  ],
)
def test_what_is_no_rule_is_named(name, message):
  with pytest.raises(ValueError, match=message):
    rule_named(name)
