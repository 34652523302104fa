"""DBBench by name in a configuration: the task of `cqd_jax.tasks.dbbench` on the database of one's choice."""

import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from cqd_jax.sandbox.mariadb import check_client, programs, unprivileged_user
from cqd_jax.sandbox.sql_service import sql_service
from cqd_jax.tasks.dbbench.episode import INSTRUCTION, DBBench
from cqd_jax.tasks.dbbench.samples import read_samples
from cqd_jax.tasks.execution import Harness, Service
from cqd_jax.tasks.task import Split


def dbbench(
  *,
  sizes: Mapping[Split, int],
  seed: int,
  data: str,
  database: str = "sqlite",
  operations: int = 5,
  seconds: float = 5.0,
  instruction: str | None = None,
  name: str = "dbbench",
) -> DBBench:
  """AgentBench's questions about a table, worked on by SQL; success rate.

  Args:
    sizes: samples of each split.
    seed: by which they are drawn.
    data: path of the published samples (JSON lines, or a JSON list).
    database: sqlite, embedded and with MySQL's functions; mariadb, a private server; or mysql://USER:PASSWORD@HOST:PORT
      of a server where the user may make databases and users.
    operations: most operations that are executed in a dialogue.
    seconds: after which a statement on a server is ended; on sqlite it is steps that are counted.
    instruction: path of a text that stands for the instruction before each question.
    name: of the task.

  Raises:
    ValueError: if a setting or the data cannot be used.
    MariaDBUnavailable: if the database is not installed, or its client.
  """
  told = INSTRUCTION
  if instruction is not None:
    try:
      told = Path(instruction).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(f"instruction: expected a text file, got {instruction} ({error})") from error
  return DBBench(
    read_samples(data),
    executor(database, seconds),
    sizes=sizes,
    seed=seed,
    name=name,
    operations=operations,
    instruction=told,
  )


def executor(database: str, seconds: float = 5.0) -> Harness | Service:
  """What executes operations on a database.

  Raises:
    ValueError: if there is no such database.
    MariaDBUnavailable: if it is not installed, or its client.
  """
  if database == "sqlite":
    return Harness("dbbench sqlite", harness_source())
  check_client()
  if database == "mariadb":
    programs()
    unprivileged_user()
    return sql_service("dbbench mariadb", seconds=seconds)
  digest = hashlib.sha256(database.encode()).hexdigest()[:8]
  return sql_service(f"dbbench server {digest}", dsn=database, seconds=seconds)


def harness_source() -> str:
  """The modules of the SQLite harness as one, which imports nothing of this package."""
  folder = resources.files("cqd_jax.tasks.dbbench")
  texts = [folder.joinpath(f"{name}.py").read_text(encoding="utf-8") for name in ("dialect", "functions", "harness")]
  lines = [line for text in texts for line in text.splitlines() if not line.startswith("from cqd_jax.")]
  return "\n".join(lines) + "\n"
