"""The card of a model: its ancestors, with all that is known of how each was made."""

import numpy as np
import yaml
from markdown_it import MarkdownIt

from cqd_jax.hub.model_card import Parent, model_card
from cqd_jax.store.individuals import Individuals

TASKS = ("coding", "os")


def family(**changes):
  """Two experts, their child, and a child of that and the second expert."""
  fields = {
    "born": np.array([0, 0, 1, 2]),
    "archive": np.array([-1, -1, 0, 1]),
    "parents": np.array([[-1, -1], [-1, -1], [0, 1], [2, 1]]),
    "notes": [{}, {}, {"weights": [[0.25, 0.75], [0.75, 0.25]]}, {"rate": 0.12345, "kind": "line"}],
    "mutation": ["", "", "svd 2", ""],
    "scores": np.array([[0.5, 0.1], [0.1, 0.5], [0.4, 0.4], [0.45, 0.5]]),
    "taken": np.ones((4, 2), bool),
    "seconds": np.ones(4),
  }
  return Individuals(**fields | changes)


def card_of(individuals, tasks=TASKS, name="elite-000003", **changes):
  about = {"kind": "elite", "identity": 3, "archives": list(tasks), "validation_scores": dict.fromkeys(tasks, 0.5)}
  experts = {task: Parent(f"expert of {task}", "mit") for task in tasks}
  return model_card(about | changes, name=name, base=Parent("base", "mit"), experts=experts, individuals=individuals)


def rows_of(card):
  return [line for line in card.splitlines() if line.startswith("|")]


def test_the_lineage_tells_how_each_was_made():
  card = card_of(family())
  assert rows_of(card)[-5:] == [
    "|---|---|---|---|---|",
    "| 3 | 2 | 2 + 1 | rate 0.123, kind line | 0.450, 0.500 |",
    "| 2 | 1 | 0.500 x 0 + 0.500 x 1 | svd 2 | 0.400, 0.400 |",
    "| 1 | 0 | expert os |  | 0.100, 0.500 |",
    "| 0 | 0 | expert coding |  | 0.500, 0.100 |",
  ]
  assert yaml.safe_load(card.split("---")[1])["license"] == "mit"


HOSTILE = "a|b `c` *d* <e>\n# f \udc80"


def test_names_stay_text_and_in_their_place():
  card = card_of(
    family(mutation=["", "", HOSTILE, HOSTILE], notes=[{}, {}, {}, {HOSTILE: HOSTILE}]),
    tasks=(HOSTILE, "os"),
    name=HOSTILE,
  )
  card.encode("utf-8")
  tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
  shown = "a|b `c` *d* <e> # f \ufffd"
  headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
  assert len(headings) == 4
  texts = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
  for token in tokens:
    assert {child.type for child in token.children or ()} <= {"text", "text_special", "softbreak"}
  assert texts[0] == shown
  assert f"an elite of the archives {shown}, os." in texts[1]
  assert sum(token.type == "table_open" for token in tokens) == 3
  sizes = [sum(token.type == kind for token in tokens) for kind in ("th_open", "tr_open")]
  assert sizes == [3 + 3 + 5, 2 + 4 + 5]
  for text in (f"expert {shown}", f"expert of {shown}", f"{shown}, {shown} {shown}", f"scores ({shown}, os)"):
    assert text in texts


def test_the_parents_of_an_aggregate_are_escaped():
  card = card_of(family(), kind="aggregate", identity=3, of={HOSTILE: 3, "os": 1})
  assert "weighted sum of 3 (a\\|b" in card
  assert "run (\\`x\\`)" in card_of(family(), kind="`x`")
