"""The published file is read as it is; what is not in its form is named by file, line and field."""

import json

import pytest
from dbbench_cases import COLUMNS, ENTRIES, TABLE, entry, write

from cqd_jax.tasks.dbbench import is_right, read_samples


def test_a_file_is_read(tmp_path):
  samples = read_samples(write(tmp_path / "data.jsonl"))
  assert [sample.kind for sample in samples] == [each["type"][0] for each in ENTRIES]
  assert samples[1].label == ("2.0",)
  assert samples[0].table.name == TABLE
  assert samples[0].table.columns == COLUMNS
  assert samples[0].table.rows[1][4] is None
  assert samples[3].modifies
  assert samples[3].answer_md5 == ENTRIES[3]["answer_md5"][3:35]
  (tmp_path / "data.json").write_text(json.dumps(ENTRIES))
  assert read_samples(tmp_path / "data.json") == samples


def without(field):
  return {key: value for key, value in ENTRIES[3].items() if key != field}


def with_table(**fields):
  table = {**ENTRIES[0]["table"], **fields}
  return entry("other", "?", label=["x"]) | {"table": table}


WRONG = {
  "description: expected a text, got None": without("description"),
  "add_description: expected a text, got 3": ENTRIES[0] | {"add_description": 3},
  "type: expected a text, or a list of one, got None": without("type"),
  r"type: expected a text, or a list of one, got \[\]": ENTRIES[0] | {"type": []},
  "label: expected a list of texts, got None": {k: v for k, v in ENTRIES[0].items() if k != "label"},
  r"label: expected a list of texts, got \[\['x'\]\]": ENTRIES[0] | {"label": [["x"]]},
  r"answer_md5: expected \[\('MD5',\)\].*got None": without("answer_md5"),
  r"answer_md5: expected .*got '\[\(None,\)\]'": ENTRIES[3] | {"answer_md5": "[(None,)]"},
  "table: expected an object with table_name and table_info": ENTRIES[0] | {"table": {"table_name": "t"}},
  "table.table_name: expected a text, got ''": with_table(table_name=""),
  "columns: expected a list of columns, got": with_table(table_info={"columns": [], "rows": []}),
  r"columns\[0\]: expected a name, got {}": with_table(table_info={"columns": [{}], "rows": []}),
  r"rows\[1\]: expected 1 values, got \['a', 'b'\]": with_table(
    table_info={"columns": [{"name": "a"}], "rows": [["a"], ["a", "b"]]}
  ),
  r"rows\[0\]: expected texts, numbers or null, got {}": with_table(
    table_info={"columns": [{"name": "a"}], "rows": [[{}]]}
  ),
  "expected an object, got 7": 7,
}


@pytest.mark.parametrize(("message", "wrong"), WRONG.items())
def test_what_is_wrong_is_named(tmp_path, message, wrong):
  path = write(tmp_path / "data.jsonl", [ENTRIES[0], wrong])
  with pytest.raises(ValueError, match=f"data.jsonl, line 2: .*{message}"):
    read_samples(path)


def test_files_that_are_none(tmp_path):
  with pytest.raises(ValueError, match=r"data: expected a file of DBBench samples, got .*missing"):
    read_samples(tmp_path / "missing")
  (tmp_path / "broken").write_text(json.dumps(ENTRIES[0]) + "\n\n{")
  with pytest.raises(ValueError, match="broken, line 3: expected JSON"):
    read_samples(tmp_path / "broken")
  (tmp_path / "empty").write_text("\n")
  with pytest.raises(ValueError, match="got an empty file"):
    read_samples(tmp_path / "empty")


def test_every_published_answer_is_right(pytestconfig):
  path = pytestconfig.rootpath.parent / "shared/data/dbbench/standard.jsonl"
  if not path.is_file():
    pytest.skip(f"no data at {path}")
  samples = [sample for sample in read_samples(path) if not sample.modifies]
  assert len(samples) == 100
  for sample in samples:
    assert is_right(str(list(sample.label)), sample.label), sample.index
