"""A run as one HTML file to look at: nothing else is needed, and nothing is fetched, to open it.

The file holds the record as JSON, which a script in it draws. Names, questions and answers are untrusted text; they can
not become markup: JSON is embedded without a single `<`, the script makes nothing but text nodes of them, and the
page's Content-Security-Policy forbids every request and every script but that one. Pictures are in the file as well.
"""

import base64
import dataclasses
import hashlib
import html
import json
import string
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from cqd_jax.report.record import RunRecord, Sample
from cqd_jax.store.individuals import Individuals
from cqd_jax.store.run_dir import write_text

SCRIPTS = ("elements", "individuals", "pointing", "archives", "progress", "family", "report")
"""In the order in which they are joined to one script: each uses those before it."""

DECIMALS = 5
"""Of scores and other figures: finer than any share of questions answered right."""


def render_report(record: RunRecord) -> str:
  """The page.

  Args:
    record: of a run, finished or not. Where a stage was not reached, the page says so.

  Returns:
    A whole HTML document, for a file in UTF-8.
  """
  style = _asset("report.css")
  script = "\n".join(['"use strict";', *(_asset(f"{name}.js") for name in SCRIPTS)])
  allowed = f"style-src {_digest(style)}; script-src {_digest(script)}; img-src data:"
  policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
  # One pass over the template: what looks like a place to fill inside of the contents stays as it is.
  return string.Template(_asset("report.html")).substitute(
    policy=policy, title=html.escape(record.name), style=style, script=script, record=_as_json(_content(record))
  )


def write_report(record: RunRecord, path: Path) -> None:
  """Writes the page to `path`; a file that is there is replaced whole or not at all."""
  write_text(path, render_report(record))


def _asset(name: str) -> str:
  return (resources.files("cqd_jax.report") / "assets" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
  """Names the one inline style or script that the page's policy lets in."""
  return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _as_json(content: Any) -> str:
  """JSON that a script element can hold: without `<` neither `</script>` nor `<!--` can end it."""
  return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _content(record: RunRecord) -> dict[str, Any]:
  """All that the page shows. Individuals are columns, one entry per individual; tasks come before individuals."""
  return {
    "name": record.name,
    "finished": record.finished,
    "tasks": list(record.task_names),
    "planned": record.num_planned,
    "experts": record.num_experts,
    "facts": list(record.facts.items()),
    "settings": record.settings,
    "edges": None if record.edges is None else [_numbers(edges) for edges in record.edges],
    "bins": None if record.bins is None else np.asarray(record.bins).T.tolist(),
    **_columns(record.individuals),
    "metrics": {name: _numbers(np.asarray(values, float).T) for name, values in record.metrics.items()},
    "rows": [_row(row) for row in record.rows],
    "swarms": list(record.swarm_sizes),
    "samples": [_sample(one) for one in record.samples],
    "best": record.best,
    "aggregated": [int(identity) for identity in record.aggregated],
    "costs": [dataclasses.asdict(cost) for cost in record.costs],
  }


def _columns(individuals: Individuals) -> dict[str, Any]:
  mutations = sorted(set(individuals.mutation))
  return {
    "born": individuals.born.tolist(),
    "archive": individuals.archive.tolist(),
    "parents": individuals.parents.T.tolist(),
    "weights": [_weights(individuals.weights(one)) for one in range(len(individuals))],
    "notes": [[list(remark) for remark in individuals.remarks(one)] for one in range(len(individuals))],
    "mutations": mutations,
    "mutation": [mutations.index(text) for text in individuals.mutation],
    "scores": _numbers(individuals.scores.T),
    "taken": individuals.taken.T.astype(int).tolist(),
  }


def _sample(sample: Sample) -> list[Any]:
  """Its score is not rounded: what is nearly right is not right."""
  score = float(sample.score) if np.isfinite(sample.score) else None
  pictures = [[caption, png] for caption, png in sample.pictures]
  turns = [[role, text] for role, text in sample.turns]
  return [sample.task, sample.prompt, sample.gold, sample.answer, score, pictures, turns, sample.reason]


def _weights(pair: np.ndarray | None) -> list[Any] | None:
  """For each parent its weight; where there are G groups: mean, least and largest weight, and G."""
  if pair is None:
    return None
  pair = np.asarray(pair, float).reshape(2, -1)
  if pair.shape[1] == 1:
    return _numbers(pair[:, 0])
  return [[*_numbers(np.array([row.mean(), row.min(), row.max()])), len(row)] for row in pair]


def _row(row: Any) -> dict[str, Any]:
  """A row of the score table without what is not finite."""
  return {
    "name": str(row["name"]),
    "scores": {name: _number(value) for name, value in row["scores"].items()},
    "mean": _number(row["mean"]),
    "minimum": _number(row["minimum"]),
    "evaluations": row.get("evaluations", 0),
    "answers": row.get("answers", 0),
    "solved": {str(size): _number(share) for size, share in row.get("solved", {}).items()},
    "chosen": {name: _number(value) for name, value in row.get("chosen", {}).items()},
  }


def _numbers(values: np.ndarray | Sequence[float]) -> Any:
  """Nested lists of rounded numbers; null where they are not finite."""
  rounded = np.round(np.asarray(values, float), DECIMALS)
  shown = rounded.astype(object)
  shown[~np.isfinite(rounded)] = None
  return shown.tolist()


def _number(value: float | None) -> float | None:
  return None if value is None else _numbers([value])[0]
