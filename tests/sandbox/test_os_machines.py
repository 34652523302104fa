"""Machines that the task "os_interaction" is played in: models that are scripts get the scores that they must get."""

import collections
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from os_cases import NEED_USERS, SAMPLES, Scripted, acts, gold, scores, write_samples

from cqd_jax.config.plugs import Plug, PlugError, resolve
from cqd_jax.sandbox import os_interaction as service_module
from cqd_jax.sandbox.machine import MachineLimits, find_mode
from cqd_jax.sandbox.on_demand import SandboxOnDemand
from cqd_jax.sandbox.os_interaction import machines, os_interaction
from cqd_jax.tasks import Job, Outcome, TextProblem
from cqd_jax.tasks.os_interaction.dialogue import OsInteraction
from cqd_jax.tasks.os_interaction.samples import read_samples

MODE, REASON = find_mode()
pytestmark = pytest.mark.skipif(MODE is None, reason=REASON)

LIMITS = MachineLimits(command_seconds=4.0, script_seconds=20.0, memory_bytes=256 << 20, disk_bytes=32 << 20)
EXAMPLES = {
  each["description"]: given if isinstance(given, str) else given["code"]
  for own in SAMPLES.values()
  for each in own
  for given in [each["evaluation"]["example"]]
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
  read = read_samples(write_samples(tmp_path_factory.mktemp("os"), SAMPLES))
  fit = [each for each in read if MODE != "user" or each.description not in NEED_USERS]
  return [each for each in fit if "c++" not in each.languages or shutil.which("g++")]


@pytest.fixture(scope="module")
def task(samples):
  return make_task(samples)


def make_task(samples, rounds=3):
  return OsInteraction({"train": samples, "validation": (), "test": ()}, machines(limits=LIMITS), rounds=rounds)


@pytest.fixture(scope="module")
def execute(task):
  with SandboxOnDemand([task.harness], workers=2) as opened:
    yield opened


def test_the_examples_succeed(task, execute):
  assert scores(task, execute, gold(EXAMPLES)).tolist() == [1.0] * len(task.examples("train"))


def ruins(problem, told):
  """Ruins its system, and the next turn finds a system all the same."""
  return [acts("rm -rf /usr/bin /etc /root 2>/dev/null; kill -9 -1"), acts("ls"), "Act: finish"][len(told)]


REPLACE = "{}; printf '#!/bin/sh\\nexit 0\\n' >/tmp/yes; chmod +x /tmp/yes; cp --remove-destination /tmp/yes {}"
CHEATS = {
  "python": REPLACE.format("true", "/usr/bin/python3.11 && cp --remove-destination /tmp/yes /usr/bin/python3"),
  "bash": REPLACE.format("cp /bin/bash /usr/bin/b", "/bin/bash"),
  "where libraries are": "cp /etc/ld.so.cache /x && cat /x >/etc/ld.so.cache",
  "a library": "echo /lib/x.so >/etc/ld.so.preload",
  "a module": "for d in /usr/lib/python3*; do echo 'import os; os._exit(0)' >$d/sitecustomize.py; done",
}


@pytest.mark.parametrize(
  "policy",
  [
    pytest.param(lambda problem, told: "", id="empty"),
    pytest.param(lambda problem, told: "ls /\n```bash\nls\n```\nFinal Answer: 5", id="malformed"),
    pytest.param(lambda problem, told: "Act: answer(-77)", id="always wrong"),
    pytest.param(lambda problem, told: acts("sleep 0.01; ls /"), id="looping"),
    pytest.param(ruins, id="ruins"),
  ],
)
def test_what_must_fail_fails(task, execute, policy):
  assert not scores(task, execute, policy).any()


def test_a_model_that_waits_for_ever_fails_in_time(samples, execute):
  one = make_task(samples[:1])
  began = time.monotonic()
  assert not scores(one, execute, lambda problem, told: "Act: finish" if told else acts("while :; do :; done")).any()
  assert time.monotonic() - began < 3 * LIMITS.command_seconds + 10


def test_scores_are_told_apart_by_all_that_they_depend_on(samples):
  def fingerprint(**settings):
    service = machines(limits=settings.pop("limits", LIMITS), driver=settings.pop("driver", "bubblewrap"))
    task = OsInteraction({"train": samples}, service, **settings)
    return TextProblem([task], Scripted(len), lambda jobs: [], max_new_tokens=8).fingerprint("train")

  docker = {"driver": "docker"}
  assert fingerprint() == fingerprint()
  kinds = ({}, {"rounds": 5}, {"instruction": "Do."}, {"limits": MachineLimits()}, docker)
  assert len({fingerprint(**kind) for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("cheat", CHEATS)
def test_who_replaces_what_checks_fails(task, execute, cheat):
  counted = task.examples("train")[0]
  outcome = play(task, execute, counted, [acts(CHEATS[cheat]), "Act: answer(-1)"])
  assert task.reply(counted, ["", "Act: answer(-1)"], outcome) == 0.0
  assert outcome.value["changed"], outcome


def play(task, execute, example, answers):
  for count in range(1, len(answers) + 1):
    (outcome,) = execute([task.job(example, answers[:count])])
  return outcome


STATE = [
  acts("cd /tmp; A=5; export B=6; f() { echo f$1; }; echo $RANDOM; (sleep 0.2; echo late >>/tmp/late) &"),
  acts("pwd; echo $A; bash -c 'echo $B'; f 7; sleep 0.4; cat late; cat /usr/orders.log | md5sum"),
]


def test_a_shell_keeps_its_state_and_is_replayed_to_the_same(task, execute):
  counted = task.examples("train")[0]
  live = play(task, execute, counted, STATE)
  assert live.value["output"].startswith("/tmp\n5\n6\nf7\nlate\n")
  (again,) = execute([task.job(counted, STATE)])  # what was live went on, so this begins anew
  assert again == live
  first = [execute([task.job(counted, STATE[:1])])[0] for _ in range(2)]
  assert first[0] == first[1]  # $RANDOM too


def test_what_is_random_is_alike_until_the_dialogue_begins(execute):
  init = [["bash", "head -c 1000 /dev/urandom >/first; head -c 9 /dev/random >>/first; echo $RANDOM >>/first"]]
  first, later = (
    [execute([Job("os_interaction", {"init": init, "start": "", "commands": [code]})])[0] for _ in range(2)]
    for code in ("cat /first | md5sum", "head -c 1000 /dev/urandom | md5sum; [ -c /dev/random ] && echo device")
  )
  assert first[0] == first[1]
  assert later[0] != later[1]
  assert all(outcome.value["output"].endswith("\ndevice\n") for outcome in later)


def test_no_machine_is_another_s(task, execute):
  jobs = [Job("os_interaction", {"init": [], "start": "", "commands": [code]}) for code in ("echo 1 >/m; ls /", "ls /")]
  outcomes = execute(jobs * 3)
  assert [("\nm\n" in outcome.value["output"]) for outcome in outcomes] == [True, False] * 3


def test_a_command_in_bad_bash_or_that_waits_is_told_of(task, execute):
  def run(*commands):
    return execute([Job("os_interaction", {"init": [], "start": "", "commands": list(commands)})])[0].value["output"]

  assert "syntax error" in run("if ; then")
  assert "unexpected EOF" in run("echo 'open")
  assert run("cat") == "[ended: it took more than 4 s]"
  assert run("cat", "echo next") == "next\n"
  assert run("exit 3", "echo next") == "next\n"
  assert run("") == ""
  assert run("printf 'no end'; printf 'err' >&2") == "no enderr"
  assert run("printf '\\377\\000x'") == "\ufffd\0x"


def test_the_plug_reads_its_settings(tmp_path):
  data = str(write_samples(tmp_path, SAMPLES))
  make = resolve("tasks", Plug("os_interaction", {"data": data, "rounds": 5}), "tasks")
  task = make(sizes={"train": 2, "validation": 1, "test": 1}, seed=0)
  assert (task.name, task.max_turns, len(task.examples("train"))) == ("os_interaction", 5, 2)
  assert task.harness.fingerprint != make.func(sizes={"train": 2}, data=data, command_seconds=3.0).harness.fingerprint
  with pytest.raises(PlugError, match="os_interaction needs the setting 'data'"):
    resolve("tasks", Plug("os_interaction"), "tasks")
  with pytest.raises(PlugError, match="'bubblewrap' or 'docker', got 'podman'"):
    resolve("tasks", Plug("os_interaction", {"data": data, "driver": "podman"}), "tasks")
  with pytest.raises(ValueError, match="command_seconds: expected"):
    make.func(sizes={"train": 2}, data=data, command_seconds=0.0)


def test_what_the_host_lacks_is_named(tmp_path, monkeypatch):
  data = str(write_samples(tmp_path, SAMPLES))
  monkeypatch.setattr(service_module.shutil, "which", lambda name: None)
  with pytest.raises(ValueError, match=r"data: std-002-own-00003 has a script in c\+\+, and g\+\+ is not installed"):
    os_interaction(sizes={"train": 6}, data=data)
  monkeypatch.setattr(service_module, "find_mode", lambda: (None, "there is no way"))
  for unsafe in (False, True):  # nobody can agree to this
    missing = pytest.raises(RuntimeError, match="os_interaction: nothing makes machines here: there is no way")
    with SandboxOnDemand([machines()], workers=1, unsafe=unsafe) as execute, missing:
      execute([Job("os_interaction", {"init": [], "start": "", "commands": ["ls"]})])


PARENT = """
import sys, time
from cqd_jax.sandbox.os_interaction import machines
from cqd_jax.tasks import Job
with machines().start(1, False) as execute:
  command = "(exec -a {sleeper} sleep 1000) & for i in 1 2; do setsid nohup sleep {sleeper} & done; echo began"
  print(execute([Job("os_interaction", dict(init=[], start="", commands=[command]))])[0].value, flush=True)
  time.sleep(100)
"""


def holders(word):
  found = []
  for folder in Path("/proc").glob("[0-9]*"):
    try:
      if word in (folder / "cmdline").read_text() and int(folder.name) != os.getpid():
        found.append(int(folder.name))
    except OSError:
      continue
  return found


def wait_until(holds):
  deadline = time.monotonic() + 10
  while not holds() and time.monotonic() < deadline:
    time.sleep(0.05)
  return holds()


@pytest.mark.parametrize("ending", ["kill", "interrupt"])
def test_nothing_stays_when_the_parent_is_gone(tmp_path, ending):
  sleeper = f"2718.{os.getpid()}{len(ending)}"
  program = tmp_path / "parent.py"
  program.write_text(PARENT.format(sleeper=sleeper))
  with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
    try:
      assert "began" in parent.stdout.readline().decode()
      assert wait_until(lambda: len(holders(sleeper)) >= 3)
    finally:
      parent.send_signal(signal.SIGKILL if ending == "kill" else signal.SIGINT)
    parent.wait(timeout=20)
  assert wait_until(lambda: not holders(sleeper))


def test_an_interrupt_waits_for_no_command():
  began = time.monotonic()
  slow = MachineLimits(command_seconds=60.0)
  timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
  job = Job("os_interaction", {"init": [], "start": "", "commands": ["sleep 50"]})
  timer.start()
  with pytest.raises(KeyboardInterrupt), machines(limits=slow).start(2, False) as execute:
    execute([job])
  assert time.monotonic() - began < 20


def test_published_samples_of_each_group(pytestconfig, execute):
  folder = pytestconfig.rootpath.parent / "shared/data/os_interaction"
  if not folder.is_dir():
    pytest.skip(f"no data in {folder}")
  wanted = {"std-001-stock-00000", "std-002-environment-00000", "std-003-ac-00000", "std-004-Q09-00000"}
  wanted |= {"std-004-Q49-00001", "std-005-new-00002", "std-006-new-00004", "std-007-bootstrap-00002"}
  wanted |= {"std-004-N4-00000", "std-006-new-00002"} if MODE != "user" else set()
  wanted |= {"std-006-new-00003"} if MODE == "root" else set()
  samples = [sample for sample in read_samples(folder) if sample.name in wanted]
  assert len(samples) == len(wanted)
  task = make_task(samples, rounds=5)
  given = scores(task, execute, gold({sample.description: sample.example.code for sample in samples}))
  assert given.tolist() == [1.0] * len(samples)


HOSTS_SUDO = {f"std-006-new-{n:05}" for n in (5, 6, 8)}
UNSTEADY = {f"std-007-bootstrap-{n:05}" for n in (0, 1, 6, 8, 9, 18, 29, 75)}  # what is counted is not the same later
MISTAKEN = {"std-006-new-00000", "std-006-new-00001"}  # of another user's home
OF_THE_HOST = {"std-005-new-00001", "std-005-new-00005"}  # a large /usr: too long to look through, or "5.6G"


@pytest.mark.soak
def test_the_published_examples_succeed(pytestconfig):
  folder = pytestconfig.rootpath.parent / "shared/data/os_interaction"
  if not folder.is_dir():
    pytest.skip(f"no data in {folder}")
  samples = [sample for sample in read_samples(folder) if sample.example]
  patient = MachineLimits(command_seconds=60.0, script_seconds=200.0)  # some look at each file that there is
  task = OsInteraction({"train": samples}, machines(limits=patient), rounds=5)
  codes = collections.defaultdict(list)  # of one description there may be several samples, which are played in turn
  for sample in samples:
    codes[sample.description].append(sample.example.code)
  assert all(len(set(own)) == 1 for own in codes.values())
  with SandboxOnDemand([task.harness], workers=2) as execute:
    given = scores(task, execute, gold({description: own[0] for description, own in codes.items()}))
  failed = {sample.name for sample, score in zip(samples, given, strict=True) if score != 1.0}
  assert failed <= HOSTS_SUDO | UNSTEADY | MISTAKEN | OF_THE_HOST
  if shutil.which("sudo"):
    assert not failed & HOSTS_SUDO
    assert given.mean() >= 0.9


def test_outcomes_come_in_the_order_of_jobs(execute):
  jobs = [Job("os_interaction", {"init": [], "start": "", "commands": [f"echo {n}"]}) for n in range(5)]
  assert execute(jobs) == [Outcome("ok", {"output": f"{n}\n"}) for n in range(5)]
