"""The operating system's samples and dialogues: what is read, what an answer says, what decides."""

import contextlib
import json

import pytest

from cqd_jax.tasks import Episode, Message, Outcome, Service
from cqd_jax.tasks.os_interaction.actions import Action, observation, parse_action
from cqd_jax.tasks.os_interaction.dialogue import OsInteraction, read_instruction
from cqd_jax.tasks.os_interaction.samples import Match, Script, read_samples, share_out

SERVICE = Service("os_interaction", "none", lambda workers, unsafe: contextlib.nullcontext(None))
BLOCK = "```bash\n{}\n```"


@pytest.mark.parametrize(
  ("text", "action"),
  [
    ("Think: look.\n\nAct: bash\n\n```bash\nls -1\n```", Action("bash", "ls -1")),
    ("Act:   BASH\n```bash\ncd /\nls\n```", Action("bash", "cd /\nls")),
    ("Act: bash\n```bash\na\n```\nand\n```bash\nb\n```", Action("bash", "a\n\nb")),
    ("```bash\nls\n```\nAct: bash", Action("bash", "ls")),
    ("Act: bash\n```sh\nls\n```", Action("bash", "")),
    ("Act: bash\n```bash\nls", Action("bash", "")),
    ("Act: bash ls", Action("bash", "")),
    ("Think: done.\nAct: finish", Action("finish")),
    ("Act: Finished!", Action("finish")),
    ("Act: answer(220)", Action("answer", "220")),
    ("Act: answer( a (b) c ) so", Action("answer", " a (b) c ")),
    ("Act: Answer (x)", Action("answer", "x")),
    ("Act: answer()", Action("answer", "")),
    ("Act:\nanswer(7)", Action("answer", "7")),
    ("Act: answer 220", Action("none")),
    ("Act: answer(first\nsecond)", Action("none")),
    ("Act: answer)220(", Action("answer", "")),
    ("Act: bash\n```bash\nls\n```\nAct: answer(2)", Action("answer", "2")),
    ("Act: bash\n```bash\nls\n```\nAct: answer 2", Action("bash", "ls")),
    ("Act: answer(1)\nAct: finish\nAct: dance", Action("finish")),
    ("act: finish", Action("none")),
    ("", Action("none")),
    ("The answer is 5.", Action("none")),
  ],
)
def test_what_an_answer_says(text, action):
  assert parse_action(text) == action


def test_what_is_shown_of_an_output():
  assert observation("") == "The output of the OS is empty."
  assert observation("a\n") == "The output of the OS:\n\na\n"
  assert observation("x" * 800) == "The output of the OS:\n\n" + "x" * 800
  assert (
    observation("x" * 801) == "The output of the OS:\n\n" + "x" * 780 + "\n[truncated because the output is too long]"
  )


@pytest.mark.parametrize(
  ("match", "answer", "fits"),
  [
    (Match("love", "", strip=True), " love\n", True),
    (Match("love", "", strip=False), " love", False),
    (Match("love", "", strip=True), "Love", False),
    (Match(None, "^[0-9]+$", strip=True), " 12 ", True),
    (Match(None, "^[0-9]+$", strip=False), " 12", False),
    (Match(None, "or", strip=False), "this or that", True),
  ],
)
def test_an_answer_matches(match, answer, fits):
  assert match.fits(answer) == fits


CHAIN = {"check": [None, {"language": "python", "file": "check/same.py"}], "example": {"code": "ls | wc -l"}}


def write(folder, group, name, content):
  (folder / "data" / group).mkdir(parents=True, exist_ok=True)
  (folder / "scripts" / group / "check").mkdir(parents=True, exist_ok=True)
  (folder / "scripts" / group / "check" / "same.py").write_text("from sys import argv\nexit(argv[1] != argv[2])\n")
  (folder / "data" / group / name).write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
  asked = [{"description": f"how many {n}", "evaluation": CHAIN} for n in range(9)]
  write(tmp_path, "1", "a.json", asked)
  create = {"local": "default", "init": [{"file": "check/same.py", "language": "python"}, "touch /a"]}
  first = {"description": "q", "create": create, "start": "cd /", "evaluation": {"check": "true", "example": "x"}}
  second = {"description": "r", "create": [None], "evaluation": {"match": {"regex": "a+"}}, "example": {"code": "y"}}
  write(tmp_path, "2", "b.json", [first, second])
  write(tmp_path, "10", "c.json", {"description": "s", "evaluation": {"match": "yes"}})
  write(tmp_path, "backup", "d.json", {"description": "not a group", "evaluation": {"match": "yes"}})
  return tmp_path


def test_all_forms_are_read(folder):
  samples = read_samples(folder)
  names = [sample.name for sample in samples[-4:]]
  assert names == ["std-001-a-00008", "std-002-b-00000", "std-002-b-00001", "std-010-c-00000"]
  chain, first, second, third = samples[-4:]
  assert chain.steps == (
    Script("bash", "ls | wc -l"),
    Script("python", "from sys import argv\nexit(argv[1] != argv[2])\n"),
  )
  assert first.init[0].language == "python"
  assert (first.init[1], first.start) == (Script("bash", "touch /a"), "cd /")
  assert (first.steps, first.example) == ((Script("bash", "true"),), Script("bash", "x"))
  assert (second.init, second.match, second.example) == ((), Match(None, "a+", strip=False), Script("bash", "y"))
  assert (third.match, third.example) == (Match("yes", "", strip=True), None)
  assert chain.languages == {"bash", "python"}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("[", "x.json: expected JSON"),
    ([3], "x.json: sample 0: sample: expected a mapping, got int"),
    ([{"evaluation": {}}], "sample 0: description: expected text, got None"),
    ([{"description": "d"}], "sample 0: evaluation: expected a mapping, got NoneType"),
    ([{"description": "d", "evaluation": {}}], "sample 0: evaluation: expected match or check"),
    ([{"description": "d", "evaluation": {"check": [None]}}], "a check is the example, and there is none"),
    ([{"description": "d", "evaluation": {"match": {}}}], "match: expected the text of an answer or a regex"),
    ([{"description": "d", "evaluation": {"match": {"regex": "("}}}], "match.regex: "),
    (
      [{"description": "d", "evaluation": {"check": {"language": "perl", "code": ""}}}],
      "check.language: expected one of",
    ),
    ([{"description": "d", "evaluation": {"check": {}}}], "check: expected code or file, got nothing"),
    ([{"description": "d", "evaluation": {"check": {"file": "no.sh"}}}], "check.file: expected a file in"),
    ([{"description": "d", "evaluation": {"check": {"file": "../1/check/same.py"}}}], "check.file: expected a file in"),
    ([{"description": "d", "create": {"init": 3}, "evaluation": {"match": ""}}], "init: expected a mapping, got int"),
  ],
)
def test_what_cannot_be_read_is_named(folder, content, message):
  write(folder, "3", "x.json", content)
  if isinstance(content, str):
    (folder / "data" / "3" / "x.json").write_text(content)
  with pytest.raises(ValueError, match=r"x\.json") as caught:
    read_samples(folder)
  assert message in str(caught.value)


def test_a_folder_without_samples_is_named(tmp_path):
  with pytest.raises(ValueError, match=f"data: expected data/1.* in {tmp_path}, found none"):
    read_samples(tmp_path)


def test_splits_share_nothing_and_depend_on_the_seed(folder):
  samples = read_samples(folder)
  write(folder, "11", "again.json", {"description": "s", "evaluation": {"match": "yes"}})
  samples += read_samples(folder)[-1:]
  sizes = {"train": 6, "validation": 3, "test": 3}
  for seed in range(20):
    shared = share_out(samples, sizes, seed, "here")
    assert {split: len(own) for split, own in shared.items()} == sizes
    asked = [{sample.description for sample in own} for own in shared.values()]
    assert not asked[0] & asked[1] | asked[0] & asked[2] | asked[1] & asked[2]
  assert share_out(samples, sizes, 1, "here") == share_out(samples, sizes, 1, "here")
  assert share_out(samples, sizes, 1, "here") != share_out(samples, sizes, 2, "here")


def test_too_few_samples_are_shared_in_proportion(folder):
  samples = read_samples(folder)
  shared = share_out(samples, {"train": 120, "validation": 60, "test": 60}, 0, "here")
  assert [len(own) for own in shared.values()] == [6, 3, 3]
  with pytest.raises(ValueError, match="here: expected at least one sample for each of train, validation, test, got 2"):
    share_out(samples[:2], {"train": 2, "validation": 2, "test": 2}, 0, "here")


@pytest.fixture
def task(folder):
  return OsInteraction({"train": read_samples(folder), "validation": (), "test": ()}, SERVICE, rounds=3)


def test_all_samples_come_in_the_order_of_the_files_and_can_be_played(folder):
  samples = read_samples(folder)
  splits = share_out(samples, {"train": 0, "validation": 0, "test": 1}, 0, "here")
  task = OsInteraction(splits, SERVICE, in_order=samples)
  assert len(task.examples("test")) == 1
  assert [example.expected["name"] for example in task.samples()] == [sample.name for sample in samples]
  assert all(task.job(example, [LOOK]) is not None for example in task.samples())


LOOK = f"Act: bash\n\n{BLOCK.format('ls')}"


def test_a_dialogue(task):
  assert isinstance(task, Episode)
  example = task.examples("train")[0]
  opening = task.opening(example)
  assert [message.role for message in opening] == ["user", "assistant", "user", "assistant", "user"]
  assert opening[-1].content.endswith("my problem:\n\nhow many 0")
  assert all(parse_action(message.content).kind in ("bash", "answer") for message in opening if message.role != "user")
  job = task.job(example, [LOOK])
  assert job.payload == {"init": [], "start": "", "commands": ["ls"]}  # nothing of what is checked in the end
  assert task.reply(example, [LOOK], Outcome("ok", {"output": "a\n"})) == Message(
    "user", "The output of the OS:\n\na\n"
  )
  job = task.job(example, [LOOK, LOOK.replace("ls", "pwd"), "Act: answer(1)"])
  assert job.payload["commands"] == ["ls", "pwd"]
  assert job.payload["answer"] == "1"
  assert [language for language, _ in job.payload["checks"]] == ["bash", "python"]
  assert task.job(example, ["Act: finish"]).payload["answer"] == "None"


@pytest.mark.parametrize(
  ("outcome", "score"),
  [
    (Outcome("ok", {"codes": [0, 0], "changed": ""}), 1.0),
    (Outcome("ok", {"codes": [0, 1], "changed": ""}), 0.0),
    (Outcome("ok", {"codes": [0], "changed": ""}), 0.0),
    (Outcome("ok", {"codes": [0, 0, 0], "changed": ""}), 0.0),
    (Outcome("ok", {"codes": [0, False], "changed": ""}), 0.0),
    (Outcome("ok", {"codes": [0, None], "changed": ""}), 0.0),
    (Outcome("ok", {"codes": [0, 0], "changed": "/usr/bin/python3"}), 0.0),
    (Outcome("ok", {"codes": [0, 0]}), 0.0),
    (Outcome("ok", {"codes": "00", "changed": ""}), 0.0),
    (Outcome("ok", [0, 0]), 0.0),
    (Outcome("killed", {"codes": [0, 0], "changed": ""}), 0.0),
    (Outcome("timeout"), 0.0),
  ],
)
def test_what_checks_decide(task, outcome, score):
  assert task.reply(task.examples("train")[0], ["Act: answer(1)"], outcome) == score


def test_what_ends_a_dialogue(task):
  counted, matched = task.examples("train")[0], task.examples("train")[-1]
  for example in (counted, matched):
    for said in ("", "hello", "Act: jump"):
      assert task.job(example, [said]) is None
      assert task.reply(example, [said], Outcome("ok")) == 0.0
    assert task.job(example, [LOOK] * 3) is None  # the rounds are used up: nobody would hear of it
    assert task.reply(example, [LOOK] * 3, Outcome("ok", {"output": ""})) == 0.0
    assert task.reply(example, [LOOK], Outcome("killed", detail="its memory")) == 0.0
  assert task.job(matched, ["Act: answer(yes)"]) is None
  assert task.reply(matched, [LOOK, "Act: answer( yes )"], Outcome("ok")) == 1.0
  assert task.reply(matched, ["Act: answer(no)"], Outcome("ok")) == 0.0
  assert task.reply(matched, ["Act: finish"], Outcome("ok")) == 0.0


def test_what_is_executed_is_said(task):
  (example, *_) = task.examples("train")
  assert task.action(example, [LOOK]) == parse_action(LOOK).content != ""
  assert task.action(example, [LOOK, "Act: finish"]) == ""
  assert task.action(example, [LOOK] * 3) == ""


def test_settings_are_checked_and_an_instruction_of_ones_own_is_used(folder, tmp_path):
  splits = {"train": read_samples(folder), "validation": (), "test": ()}
  with pytest.raises(ValueError, match="rounds: expected rounds >= 1, got 0"):
    OsInteraction(splits, SERVICE, rounds=0)
  (tmp_path / "own.txt").write_text("Do as I say.\n")
  own = OsInteraction(splits, SERVICE, instruction=read_instruction(str(tmp_path / "own.txt")))
  (message,) = own.opening(own.examples("train")[0])
  assert message == Message("user", "Do as I say.\n\nHere is my problem:\n\nhow many 0")
  assert own.max_turns == 8
  (tmp_path / "empty.txt").write_text("\n")
  for path in ("empty.txt", "none.txt"):
    with pytest.raises(ValueError, match="instruction: expected"):
      read_instruction(str(tmp_path / path))
  assert read_instruction("") == ""


def test_the_published_samples(pytestconfig):
  folder = pytestconfig.rootpath.parent / "shared/data/os_interaction"
  if not folder.is_dir():
    pytest.skip(f"no data in {folder}")
  samples = read_samples(folder)
  assert len(samples) == len({sample.name for sample in samples}) == 144
  assert sum(sample.example is not None for sample in samples) == 140
  assert sum(sample.match is not None for sample in samples) == 9
  shared = share_out(samples, {"train": 99, "validation": 22, "test": 22}, 0, "here")
  assert [len(own) for own in shared.values()] == [99, 22, 22]  # two ask the same
