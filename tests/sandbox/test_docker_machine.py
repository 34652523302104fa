"""Machines by Docker: what is asked of it, and what is made of its answers. A script stands in its place."""

import contextlib
import shutil
from pathlib import Path

import pytest

from cqd_jax.sandbox.docker_machine import DockerMachine, why_no_docker
from cqd_jax.sandbox.machine import MachineDied, MachineLimits
from cqd_jax.sandbox.on_demand import SandboxOnDemand
from cqd_jax.sandbox.os_interaction import machines
from cqd_jax.sandbox.shell_session import Session, run_script
from cqd_jax.tasks import Job

LIMITS = MachineLimits(command_seconds=1.0, script_seconds=5.0)
needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

# Runs what it is to run with a /run that can be written to, and nothing else that can.
STAND_IN = """#!/bin/bash
echo "$*" >>{state}/asked
inside() {{ exec bwrap --ro-bind / / --dev-bind /dev /dev --bind {state}/run /run --chdir / "$@"; }}
case $1 in
version) echo 99.0 ;;
run)
  while [ "$1" != image ] && [ $# -gt 0 ]; do [ "$1" = --name ] && echo $$ >{state}/$2; shift; done
  [ $# -gt 0 ] || {{ echo "no such image" >&2; exit 125; }}
  shift; inside "$@" ;;
exec)
  while [[ $1 != cqd-* ]]; do shift; done
  shift; inside "$@" ;;
diff) cat {state}/diff ;;
kill) kill -9 $(cat {state}/$2) ;;
esac
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  (tmp_path / "run").mkdir()
  (tmp_path / "diff").write_text("")
  program = tmp_path / "docker"
  program.write_text(STAND_IN.format(state=tmp_path))
  program.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
  return tmp_path


@needs_bubblewrap
def test_a_container_is_played_in(stand_in):
  assert why_no_docker() is None
  with contextlib.closing(DockerMachine("image", LIMITS)) as machine:
    session = Session(machine.spawn, 1.0, 1000)
    assert session.run("cd /tmp; A=5").output == ""
    assert session.run("pwd; echo $A; printf 'no end'").output == "/tmp\n5\nno end"
    assert session.run("echo began; sleep 60") == ("began\n", True)
    assert session.run("pwd") == ("/\n", False)
    session.close()
    assert run_script(machine.spawn, ["/bin/bash", "-c", "echo $1; exit 3", "--", "a b"], 5.0, 1000) == (3, "a b\n")
    (stand_in / "diff").write_text(
      "C /usr\nC /usr/bin\nA /usr/bin/new\nC /root\nC /usr/lib/python3.11\nA /usr/lib/python3.11/__pycache__/x.pyc\n"
    )
    assert machine.changed() == ""
    (stand_in / "diff").write_text("C /usr\nC /usr/bin\nC /usr/bin/python3.11\n")
    assert machine.changed() == "/usr/bin/python3.11"
    process = Path("/proc", (stand_in / machine.name).read_text().strip())
    assert process.exists()
  assert not process.exists()
  asked = (stand_in / "asked").read_text().splitlines()
  (begun,) = [line for line in asked if line.startswith("run ")]
  for word in ("--rm", "--network none", "--pids-limit 128", f"--memory {1 << 30}", "--ulimit cpu=60"):
    assert word in begun
  assert asked[-1] == f"kill {machine.name}"


@needs_bubblewrap
def test_the_service_uses_it(stand_in):
  commands = ["echo $((2 + 3))", "echo $((2 * 3))"]
  jobs = [Job("os_interaction", {"init": [], "start": "", "commands": commands[:n]}) for n in (1, 2)]
  end = {
    "answer": "5",
    "checks": [["bash", "echo 5"], ["python", "from sys import argv\nassert argv[1] == argv[2][:1]"]],
  }
  jobs.append(Job("os_interaction", {**jobs[1].payload, **end}))
  with SandboxOnDemand([machines(driver="docker", image="image", limits=LIMITS)], workers=1) as execute:
    outcomes = [execute([job])[0].value for job in jobs]
  assert outcomes[:2] == [{"output": "5\n"}, {"output": "6\n"}]
  assert (outcomes[2]["codes"], outcomes[2]["changed"]) == ([0, 0], "")
  asked = (stand_in / "asked").read_text()
  assert asked.count("run ") == asked.count("kill cqd-") == 1


@needs_bubblewrap
def test_what_docker_says_is_passed_on(stand_in, monkeypatch):
  with pytest.raises(MachineDied, match="docker run other: no such image"):
    DockerMachine("other", LIMITS)
  (stand_in / "docker").write_text("#!/bin/sh\necho warning >&2\necho 'Cannot connect to the daemon' >&2\nexit 1\n")
  assert why_no_docker() == "docker has no server: Cannot connect to the daemon"
  with SandboxOnDemand([machines(driver="docker")], workers=1) as execute:
    missing = pytest.raises(RuntimeError, match="docker makes no machines here: docker has no server: Cannot connect")
    with missing:
      execute([Job("os_interaction", {"init": [], "start": "", "commands": []})])
  monkeypatch.setenv("PATH", "/nowhere")
  assert why_no_docker() == "there is no program docker"
