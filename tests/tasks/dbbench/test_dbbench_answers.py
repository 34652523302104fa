"""Turns of every form are read as the published program reads them, and final answers are graded by its rules."""

import pytest

from cqd_jax.tasks.dbbench.answers import final_answer, is_right, observed, operation, table_hash

OPERATIONS = {
  "Action: Operation\n```sql\nSELECT 1\n```": "SELECT 1",
  "I think.\n\nAction: Operation\n```sql\nSELECT a\nFROM t\n```\nThat is it.": "SELECT a FROM t",
  "Action: Operation  \r\n```sql\r\nSELECT 1;\r\n```": "SELECT 1;",
  "Action: Operation\n```sql\nSELECT 1\n```\n```sql\nSELECT 2\n```": "SELECT 1",
  "Action: Operation\n```python\n1\n```\n```sql\nSELECT 2\n```": "SELECT 2",
  "Action: Operation\n```sql\n\n```": "",
  "Action: Operation\n```sql SELECT 1 ```": "SELECT 1",
  "Action: Operation\n```sql\nSELECT 1\n```\nAction: Answer\nFinal Answer: [1]": "SELECT 1",
  "Action: Answer\nFinal Answer: [1]\nAction: Operation\n```sql\nSELECT 1\n```": None,
  "Action: Operation\n```sql\nSELECT 1": None,
  "Action: Operation\n```\nSELECT 1\n```": None,
  "Action: Operation\nSELECT 1": None,
  "Action: operation\n```sql\nSELECT 1\n```": None,
  "Action: Operations\n```sql\nSELECT 1\n```": None,
  "Action: Operation.\n```sql\nSELECT 1\n```": None,
  "Action Operation\n```sql\nSELECT 1\n```": None,
  "Action:\nOperation\n```sql\nSELECT 1\n```": None,
  "**Action: Operation**\n```sql\nSELECT 1\n```": None,
  "```sql\nSELECT 1\n```": None,
  "": None,
}

FINAL = {
  'Action: Answer\nFinal Answer: ["a"]': '["a"]',
  'Action: Answer\nFinal Answer:["a"]\nand more': '["a"]',
  'Action: Answer Final Answer: ["a"]': '["a"]',
  'So the Final Answer: is near.\nFinal Answer: ["b"]': '["b"]',
  'Final Answer: ["a"]\nFinal Answer: ["b"]': '["a"]',
  'Final Answer:\n["a"]': "",
  'final answer: ["a"]': None,
  '["a"]': None,
  "": None,
}

RIGHT = [
  ("['27']", ["27.0"]),
  ("[27]", ["27"]),
  ("[2.7e1]", ["27"]),
  ("27", ["27.0"]),
  ("['Chelsea']", ["Chelsea"]),
  ("('Chelsea',)", ["Chelsea"]),
  ("Chelsea", ["Chelsea"]),
  ("['3,729.7']", ["3,729.7"]),
  ("['nan']", ["nan"]),
  ("['\\d']", ["\\d"]),
  ('["b", "a"]', ["a", "b"]),
  ('["b", "a", "b"]', ["a", "b"]),
  ("{'a', 'b'}", ["a", "b"]),
  ('["a", "a"]', ["a"]),
]

WRONG = [
  ("['27.01']", ["27"]),
  ("[]", ["27"]),
  ("", ["27"]),
  ("[None]", ["none"]),
  ("['chelsea']", ["Chelsea"]),
  ("['Chelsea ']", ["Chelsea"]),
  ("[('Chelsea',)]", ["Chelsea"]),
  ("[['Chelsea']]", ["Chelsea"]),
  ('"Chelsea"', ["Chelsea"]),
  ("[3,729.7]", ["3,729.7"]),
  ("['3729.7']", ["3,729.7"]),
  ("[1, 2]", ["1", "2"]),
  ("['a']", ["a", "b"]),
  ("['a', 'b', 'c']", ["a", "b"]),
  ("[['a'], ['b']]", ["a", "b"]),
  ("[x for x in ['a']]", ["a"]),
  ("[str(27)]", ["27"]),
  ("[__import__('os').getpid()]", ["27"]),
  ("[" * 5000 + "]" * 5000, ["a"]),
  ("-" * 15_000 + "1", ["1"]),
  ("[" + "9" * 5000 + "]", ["a"]),
  ("[1e999]", ["27"]),
  ("['27'", ["27"]),
  ("{'27': 1}", ["27"]),
]


@pytest.mark.parametrize(("answer", "statement"), OPERATIONS.items())
def test_what_is_an_operation(answer, statement):
  assert operation(answer) == statement


@pytest.mark.parametrize(("answer", "final"), FINAL.items())
def test_what_is_the_final_answer(answer, final):
  assert final_answer(answer) == final


@pytest.mark.parametrize(("answer", "label"), RIGHT)
def test_right_answers(answer, label):
  assert is_right(answer, label)


@pytest.mark.parametrize(("answer", "label"), WRONG, ids=[answer[:20] for answer, _ in WRONG])
def test_wrong_answers(answer, label):
  assert not is_right(answer, label)


def test_long_results_are_cut():
  assert observed("x" * 800) == "x" * 800
  assert observed("x" * 801) == "x" * 800 + "[TRUNCATED]"


def test_a_hash_knows_no_order_of_rows():
  # md5 of "0cc17,92eb5": the beginnings of md5("a") and md5("b")
  assert table_hash(["92eb5", "0cc17"]) == table_hash(["0cc17", "92eb5"]) == "cc7f7ee521807dc90b2c940ace622608"
  assert table_hash([]) is None
