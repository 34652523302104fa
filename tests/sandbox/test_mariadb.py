"""The private server: nobody's, gone with its owner however that ends, started again where an answer ends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sql_cases import need

from cqd_jax.sandbox.mariadb import SERVER, MariaDBUnavailable, PrivateServer
from cqd_jax.sandbox.on_demand import SandboxOnDemand
from cqd_jax.sandbox.sql_service import Servers, sql_service
from cqd_jax.tasks import Job

PAYLOAD = {"table": "t", "columns": ["a"], "rows": [["x"]], "statements": ["SELECT a FROM t"], "hash": False}

OWNER = """
import sys, time
from cqd_jax.sandbox.mariadb import PrivateServer
server = PrivateServer()
print(server.pid, server.folder, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _server():
  need("mariadb")


@pytest.fixture
def private():
  with PrivateServer() as server:
    yield server


def gone(pid, folder):
  """Whether a server and its folder go within seconds."""
  deadline = time.monotonic() + 20
  while time.monotonic() < deadline:
    if not Path(f"/proc/{pid}").exists() and not Path(folder).exists():
      return True
    time.sleep(0.05)
  return False


def test_a_server_is_nobodys_and_leaves_nothing(private):
  import pymysql

  status = Path(f"/proc/{private.pid}/status").read_text()
  owners = next(line.split()[1:] for line in status.splitlines() if line.startswith("Uid:"))
  assert "0" not in owners
  assert os.stat(private.folder).st_mode & 0o077 == 0
  listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
  mine = {line.split()[9] for line in listening if line.split()[7] == owners[0]}
  assert not mine or os.geteuid() != 0
  connection = pymysql.connect(unix_socket=private.socket, user="root", ssl_disabled=True)
  with connection, connection.cursor() as cursor:
    cursor.execute("SELECT @@skip_networking, @@character_set_server, @@local_infile")
    assert cursor.fetchall() == ((1, "utf8mb4", 0),)
    cursor.execute("SELECT COUNT(*) FROM mysql.global_priv WHERE user = ''")
    assert cursor.fetchall() == ((0,),)
  private.close()
  assert gone(private.pid, private.folder)
  private.close()


def test_a_server_goes_with_an_owner_that_is_killed():
  owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
  with owner:
    try:
      pid, folder = owner.stdout.readline().split()
      assert Path(f"/proc/{pid}").exists()
    finally:
      owner.kill()
  assert gone(pid, folder)


def test_a_server_goes_with_its_guardian(private):
  status = Path(f"/proc/{private.pid}/status").read_text()
  os.kill(int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:"))), signal.SIGKILL)
  assert private.ended(within=10.0)
  private.close()
  assert gone(private.pid, private.folder)


def test_jobs_survive_the_end_of_the_server(monkeypatch):
  made = []

  class Noted(PrivateServer):
    def __init__(self):
      super().__init__()
      made.append(self)

  monkeypatch.setattr("cqd_jax.sandbox.sql_service.PrivateServer", Noted)
  service = sql_service("x")
  with SandboxOnDemand([service], workers=2) as run:
    assert run([Job("x", PAYLOAD)])[0].value["observation"] == "[('x',)]"
    os.kill(made[0].pid, signal.SIGKILL)
    assert made[0].ended(within=20.0)
    assert [outcome.value["observation"] for outcome in run([Job("x", PAYLOAD)] * 3)] == ["[('x',)]"] * 3
  assert len(made) == 2
  assert all(gone(server.pid, server.folder) for server in made)


def test_a_given_server_keeps_nothing_of_the_answers(private):
  import pymysql

  service = sql_service("x", dsn=f"mysql://root@/?unix_socket={private.socket}", seconds=0.5)
  hostile = {**PAYLOAD, "statements": ["CREATE TABLE u (a INT)", "SET PASSWORD = PASSWORD('x')", "SELECT SLEEP(100)"]}
  with SandboxOnDemand([service], workers=2) as run:
    plain, tried = run([Job("x", PAYLOAD), Job("x", hostile)])
  assert plain.value["observation"] == "[('x',)]"
  assert tried.value["observation"].startswith("1317: Query execution was interrupted")
  connection = pymysql.connect(unix_socket=private.socket, user="root", ssl_disabled=True)
  with connection, connection.cursor() as cursor:
    cursor.execute("SHOW DATABASES LIKE 'cqd%'")
    assert cursor.fetchall() == ()
    cursor.execute("SELECT user FROM mysql.user WHERE user LIKE 'cqd%'")
    assert cursor.fetchall() == ()


def test_a_server_that_cannot_start_says_why(monkeypatch):
  monkeypatch.setattr("cqd_jax.sandbox.mariadb.SERVER", (*SERVER, "--no-such-option"))
  with pytest.raises(MariaDBUnavailable, match=r"did not start: .*no-such-option"):
    Servers(None)
