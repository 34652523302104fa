"""Dialogues in the history, to be looked at: each text is kept once, whoever said it and however often.

A prompt is the same for all individuals, and most of what they say is; a row of the table `evaluations` only names its
texts.
"""

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterable, Sequence

from cqd_jax.tasks.problem import Transcript

TEXTS = "CREATE TABLE texts (digest TEXT PRIMARY KEY, content BLOB NOT NULL) WITHOUT ROWID"
INSERT_TEXT = "INSERT OR IGNORE INTO texts VALUES (?, ?)"


def pack_transcripts(transcripts: Sequence[Transcript]) -> tuple[str | None, dict[str, str]]:
  """The names of the texts of dialogues, as JSON (None: there is no dialogue); and the texts by name."""
  texts: dict[str, str] = {}

  def named(text: str) -> str:
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    texts[digest] = text
    return digest

  packed = [
    [each.task, each.sample, each.score, each.reason, [[role, named(text)] for role, text in each.turns]]
    for each in transcripts
  ]
  return (json.dumps(packed) if packed else None), texts


def text_rows(texts: Iterable[tuple[str, str]]) -> list[tuple[str, bytes]]:
  """What `INSERT_TEXT` takes."""
  return [(digest, zlib.compress(text.encode(errors="surrogatepass"), 1)) for digest, text in texts]


def read_transcripts(connection: sqlite3.Connection, split: str, problem: str, individual: str) -> list[Transcript]:
  """The dialogues that are kept of an individual; [] where there are none.

  Raises:
    ValueError: if they are damaged.
  """
  query = "SELECT transcripts FROM evaluations WHERE split = ? AND problem = ? AND individual = ?"
  row = connection.execute(query, (split, problem, individual)).fetchone()
  if row is None or row[0] is None:
    return []

  def text_of(digest: str) -> str:
    (content,) = connection.execute("SELECT content FROM texts WHERE digest = ?", (digest,)).fetchone()
    return zlib.decompress(content).decode(errors="surrogatepass")

  try:
    return [
      Transcript(
        int(task),
        int(sample),
        tuple((str(role), text_of(digest)) for role, digest in turns),
        float(score),
        str(reason),
      )
      for task, sample, score, reason, turns in json.loads(row[0])
    ]
  except (zlib.error, ValueError, TypeError) as error:
    raise ValueError(f"the dialogues of an individual cannot be read ({error})") from error
