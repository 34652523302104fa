"""Samples in the published form, with hashes worked out here, and statements whose results MySQL's manual gives."""

import hashlib
import json

COLUMNS = ("Nation", "Gold", "Silver", "Total", "Notes")
ROWS = (
  ("Norway", "16", "8", "37", "Host, 1994"),
  ("Österreich", "7", "7", "18", None),
  ("Japan", "3", "6", "18", "it's"),
  ("1,000", "-1", "2.50", "n/a", "50% off_x"),
)
TABLE = "Medal Table"


def entry(kind, question, **fields):
  """A line of the file."""
  info = {"columns": [{"name": name, "type": "TEXT"} for name in COLUMNS], "rows": [list(row) for row in ROWS]}
  table = {"table_name": TABLE, "table_info": info}
  return {
    "description": question,
    "add_description": f"The table is {TABLE}.",
    "type": [kind],
    "table": table,
    **fields,
  }


def hash_of(rows):
  """As the published hashes were made."""
  joined = [",".join(cell for cell in row if cell is not None) for row in rows]
  prefixes = sorted(hashlib.md5(each.encode()).hexdigest()[:5] for each in joined)
  return f"[('{hashlib.md5(','.join(prefixes).encode()).hexdigest()}',)]"


INSERTED = (*ROWS, ("Italy", "2", "7", "17", ""))
UPDATED = (*ROWS[:2], ("Japan", "3", "6", "19", "it's\nso"), ROWS[3])
DELETED = (ROWS[0], ROWS[3])

ENTRIES = (
  entry("other", "Which nation has 37 medals?", label=["Norway"]),
  entry("counting", "How many nations have 18 medals?", label=["2.0"]),
  entry("ranking", "Which nations have 18 medals?", label=["Österreich", "Japan"]),
  entry(
    "INSERT",
    "Add Italy.",
    label=[f"INSERT INTO `{TABLE}` VALUES ('Italy', 2, '7', 17, '')"],
    answer_md5=hash_of(INSERTED),
  ),
  entry(
    "UPDATE",
    "Japan won one more.",
    label=[f"UPDATE `{TABLE}` SET Total = Total + 1, Notes = 'it''s\\nso' WHERE Nation = \"japan\" LIMIT 1;"],
    answer_md5=hash_of(UPDATED),
  ),
  entry(
    "DELETE",
    "Remove all with 18 medals.",
    label=[f"DELETE FROM `{TABLE}` WHERE Total = 18"],
    answer_md5=hash_of(DELETED),
  ),
)


def write(path, entries=ENTRIES):
  """Writes a file of samples."""
  path.write_text("".join(json.dumps(each) + "\n" for each in entries), encoding="utf-8")
  return path


def payload(*statements, hashed=False):
  """A job's, on the table."""
  rows = [list(row) for row in ROWS]
  return {"table": TABLE, "columns": list(COLUMNS), "rows": rows, "statements": list(statements), "hash": hashed}


T = f"`{TABLE}`"
RESULTS = {
  f"SELECT Nation FROM {T} WHERE Total = 18 ORDER BY Nation": "[('Japan',), ('Österreich',)]",
  f"SELECT Nation FROM {T} WHERE Nation = 'osterreich'": "[('Österreich',)]",
  f"SELECT COUNT(*) FROM {T} WHERE Nation LIKE 'N%' AND Gold > 9": "[(1,)]",
  f"SELECT Nation FROM {T} WHERE Notes LIKE '50\\% off\\_x'": "[('1,000',)]",
  f"SELECT Nation FROM {T} WHERE Gold BETWEEN 3 AND 7 ORDER BY Gold": "[('Japan',), ('Österreich',)]",
  f"SELECT Nation FROM {T} WHERE Gold NOT BETWEEN 0 AND 9 AND Gold >= 0": "[('Norway',)]",
  f"SELECT Nation FROM {T} WHERE Gold < -0.5 || Silver = 8 && Total = 37 ORDER BY Gold": "[('1,000',), ('Norway',)]",
  f"SELECT SUM(Gold), AVG(Silver), MAX(Gold), MIN(Nation) FROM {T}": "[(25.0, 5.875, '7', '1,000')]",
  f"SELECT SUM(Gold) FROM {T} WHERE Nation = 'Nowhere'": "[(None,)]",
  f"SELECT MAX(CAST(Gold AS SIGNED)) FROM {T}": "[(16,)]",
  f"SELECT Nation FROM {T} ORDER BY CAST(Gold AS SIGNED) DESC LIMIT 1, 2": "[('Österreich',), ('Japan',)]",
  f"SELECT Nation FROM {T} WHERE Notes <=> NULL": "[('Österreich',)]",
  f"SELECT CONCAT(Nation, \"-\", Gold), CONCAT(Notes, 'x') FROM {T} WHERE Gold = 7": "[('Österreich-7', None)]",
  f"SELECT CONCAT_WS(';', Nation, Notes, Gold) FROM {T} WHERE Gold = 7": "[('Österreich;7',)]",
  f"SELECT CHAR_LENGTH(Nation), LENGTH(Nation) FROM {T} WHERE Gold = 7": "[(10, 11)]",
  f"SELECT GROUP_CONCAT(Nation ORDER BY Total DESC, Nation SEPARATOR ' / ') FROM {T} WHERE Gold > 7": "[('Norway',)]",
  f"SELECT GROUP_CONCAT(Nation ORDER BY Nation DESC SEPARATOR ' / ') FROM {T} WHERE Gold > 2": (
    "[('Österreich / Norway / Japan',)]"
  ),
  f"SELECT GROUP_CONCAT(DISTINCT Total ORDER BY Total) FROM {T}": "[('18,37,n/a',)]",
  f"SELECT Total, COUNT(*) AS c FROM {T} GROUP BY Total HAVING c > 1": "[('18', 2)]",
  f"SELECT COUNT(*) FROM {T} AS a JOIN {T} AS b ON a.Total = b.Total": "[(6,)]",
  f"SELECT IF(Gold = 7, 'x', 'y') FROM {T} WHERE Silver = 7": "[('x',)]",
  "SELECT MD5('a'), LEFT('abc', 2), RIGHT('abc', 2), SUBSTRING('abcd', 2, 2), SUBSTRING('abcd' FROM -2)": (
    "[('0cc175b9c0f1b6a831c399e269772661', 'ab', 'bc', 'bc', 'cd')]"
  ),
  "SELECT SUBSTRING_INDEX('a.b.c', '.', 2), SUBSTRING_INDEX('a.b.c', '.', -1), LOCATE('B', 'abc')": (
    "[('a.b', 'c', 2)]"
  ),
  "SELECT TRIM(LEADING 'x' FROM 'xxaxx'), TRIM('  a '), REPLACE('aXa', 'x', ''), REVERSE('ab')": (
    "[('axx', 'a', 'aXa', 'ba')]"
  ),
  "SELECT LPAD('7', 3, '0'), RPAD('7', 3, 'ab'), REPEAT('ab', 2), UPPER('é'), INSERT('abcd', 2, 2, 'X')": (
    "[('007', '7ab', 'abab', 'É', 'aXd')]"
  ),
  "SELECT FIND_IN_SET('B', 'a,b'), FIELD('b', 'a', 'b'), ELT(2, 'a', 'b'), STRCMP('a', 'B'), ISNULL(NULL)": (
    "[(2, 2, 'b', -1, 1)]"
  ),
  "SELECT 'a' REGEXP '^A$', 'ab' RLIKE 'c', 7 MOD 4, FLOOR(2.5), CEIL(2.5), GREATEST(1, 3), IFNULL(NULL, 'x')": (
    "[(1, 0, 3, 2, 3, 3, 'x')]"
  ),
  "SELECT 'it''s', \"say \"\"hi\"\"\", 'a\\'b', 'tab\\tend', 'x' /* so */ -- and so on": (
    "[(\"it's\", 'say \"hi\"', \"a'b\", 'tab\\tend', 'x')]"
  ),
  "SELECT YEAR('2009-12-31'), MONTHNAME('2009-12-31'), DATE_FORMAT('2009-01-02', '%M %e, %Y'), DATEDIFF('2009-03-01', "
  "'2009-02-01')": "[(2009, 'December', 'January 2, 2009', 28)]",
  f"SELECT RANK() OVER (ORDER BY Gold + 0 DESC), SUM(Gold) OVER (ORDER BY Gold + 0) FROM {T} WHERE Gold > 3 "
  "ORDER BY 1": "[(1, 23.0), (2, 7.0)]",
  f"WITH big AS (SELECT * FROM {T} WHERE Gold > 3) SELECT COUNT(*) FROM big": "[(2,)]",
  "SHOW TABLES": f"[('{TABLE}',)]",
  f"SELECT Nation FROM {TABLE}": None,
  f"SELECT Nation FROM '{TABLE}'": None,
  f"SELECT Nation FROM {T.lower()}": None,
  f"SELECT Metal FROM {T}": None,
  f"UPDATE {T} SET 'Gold' = 1": None,
  f"INSERT INTO {T} ('Gold') VALUES (1)": None,
  f"SELECT 1; DROP TABLE {T}": None,
  "": None,
}
"""What a statement gives; None: an error of some kind."""

REST = ROWS[1:]
CHANGES = {
  f"UPDATE {T} SET Gold = 7.50, Silver = -.5, Total = 007, Notes = NULL WHERE Gold = 16": (
    ("Norway", "7.50", "-0.5", "7", None),
    *REST,
  ),
  f"UPDATE {T} SET Gold = Gold + 1, Total = Gold * 2 WHERE Nation = 'NORWAY'": (
    ("Norway", "17", "8", "34", "Host, 1994"),
    *REST,
  ),
  f"UPDATE {T} SET Gold = Silver / 3, Total = '1.0' + 1 WHERE Silver = 8": (
    ("Norway", "2.6666666666666665", "8", "2", "Host, 1994"),
    *REST,
  ),
  f'UPDATE {T} AS m SET m.Notes = CONCAT(m.Nation, " \'", m.Gold, "\'") WHERE m.Gold = 16': (
    ("Norway", "16", "8", "37", "Norway '16'"),
    *REST,
  ),
  f"UPDATE {T} SET Notes = 'first' ORDER BY Gold + 0 DESC LIMIT 1": (("Norway", "16", "8", "37", "first"), *REST),
  f"UPDATE {T} SET Notes = (SELECT 'x') WHERE Gold IN (16, 99)": (("Norway", "16", "8", "37", "x"), *REST),
  f"INSERT INTO {T} (Nation, Gold) VALUES (\"New\\tland\", 1), ('B', DEFAULT)": (
    *ROWS,
    ("New\tland", "1", None, None, None),
    ("B", None, None, None, None),
  ),
  f"INSERT INTO {T} SET Nation = 'Set', Gold = 1 + 1": (*ROWS, ("Set", "2", None, None, None)),
  f"INSERT INTO {T} SELECT * FROM {T} WHERE Gold = 16": (*ROWS, ROWS[0]),
  f"REPLACE INTO {T} VALUES ('a', 'b', 'c', 'd', 'e')": (*ROWS, ("a", "b", "c", "d", "e")),
  f"DELETE FROM {T} WHERE Gold < 0 LIMIT 5": ROWS[:3],
  f"DELETE FROM {T} ORDER BY Gold + 0 DESC LIMIT 1": REST,
  f"ALTER TABLE {T} ADD COLUMN Extra TEXT": ROWS,
}
"""The rows that a statement leaves."""
