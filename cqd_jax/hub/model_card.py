"""The card of a merged model: what it was made of and how, its scores, and the licenses of its parents."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cqd_jax.store.individuals import Individuals
from cqd_jax.store.markdown import escape, markdown_table
from cqd_jax.store.run_dir import read_json
from cqd_jax.store.yaml_text import YAMLTextError, read_yaml, write_yaml

MOST_ANCESTORS = 40
"""The rows of a table of ancestors: the individual itself, and those that were born last."""


@dataclasses.dataclass(frozen=True)
class Parent:
  """A model that another was made of.

  Attributes:
    name: a folder, or in words.
    license: as its card says; None if it does not.
    repository: its name on the hub, as its config says; None if it does not.
  """

  name: str
  license: str | None
  repository: str | None = None


def parent_of(folder: Path) -> Parent:
  """A model folder as a parent, with the license in its card and the name in its config, where it has them."""
  card = folder / "README.md"
  front: Any = None
  if card.is_file():
    found = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
      front = read_yaml(found[1]) if found else None
    except YAMLTextError:
      front = None
  license = front.get("license_name") or front.get("license") if isinstance(front, dict) else None
  license = ", ".join(map(str, license)) if isinstance(license, list) else license
  config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
  name = config.get("_name_or_path") if isinstance(config, dict) else None
  repository = name if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else None
  return Parent(str(folder), str(license) if license else None, repository)


def model_card(
  about: Mapping[str, Any],
  *,
  name: str,
  base: Parent,
  experts: Mapping[str, Parent],
  individuals: Individuals | None = None,
  adapter: bool = False,
) -> str:
  """A README.md in Markdown with the hub's front matter.

  Args:
    about: the model: "kind" (elite, aggregate, ...), "identity", "validation_scores", "archives", "of".
    name: of the model.
    base: the base model.
    experts: by task.
    individuals: everyone of the run, for the ancestors; None: no such table.
    adapter: whether it is a PEFT adapter.
  """
  parents = [base, *experts.values()]
  front = _front_matter(parents, [base] if adapter else parents, adapter=adapter)
  lines = ["---", write_yaml(front).strip(), "---", ""]
  lines += [f"# {escape(name)}", "", _what(about, base), ""]
  if scores := about.get("validation_scores"):
    lines += ["## Scores", "", "Share of validation questions answered right; each answer was executed.", ""]
    mean = sum(scores.values()) / len(scores)
    lines.append(markdown_table([*scores, "mean"], [[f"{score:.3f}" for score in (*scores.values(), mean)]]))
  lines += ["## Parents", ""]
  rows = [["base", base.name, base.license or "not stated"]]
  rows += [[f"expert {task}", parent.name, parent.license or "not stated"] for task, parent in experts.items()]
  lines.append(markdown_table(["", "model", "license"], rows))
  lines += ["What may be done with this model follows from the licenses of all its parents.", ""]
  if individuals is not None and (founders := _founders(about)):
    lines += _lineage(individuals, founders, list(experts))
  lines += ["Made by CycleQD (Kuroki et al. 2025, arXiv:2410.14735) with cqd_jax.", ""]
  return "\n".join(lines)


def recipe_card(
  name: str, recipe: str, parents: Sequence[Parent], *, kept: Sequence[str] = (), remarks: Sequence[str] = ()
) -> str:
  """The card of a model that was merged by a recipe: its parents with their licenses, and the recipe itself.

  Args:
    name: of the model.
    recipe: its text.
    parents: the models that were merged.
    kept: tensors that not all of them have.
    remarks: what the recipe says without effect.
  """
  lines = ["---", write_yaml(_front_matter(parents, parents, adapter=False)).strip(), "---", ""]
  lines += [f"# {escape(name)}", "", "A merge of the models below, by the recipe below.", "", "## Parents", ""]
  lines.append(markdown_table(["model", "license"], [[each.name, each.license or "not stated"] for each in parents]))
  lines += ["What may be done with this model follows from the licenses of all its parents.", ""]
  fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0))  # longer than any within
  lines += ["## Recipe", "", f"{fence}yaml", recipe.rstrip("\n"), fence, ""]
  if remarks:
    lines += [*(f"- {escape(remark)}" for remark in remarks), ""]
  if kept:
    lines += ["## Tensors that not all have", "", "Each is as it was in the base, or the first parent that has it.", ""]
    lines += [*(f"- {escape(each)}" for each in kept), ""]
  lines += ["Made by `cqd merge` of cqd_jax.", ""]
  return "\n".join(lines)


def _front_matter(parents: Sequence[Parent], named: Sequence[Parent], *, adapter: bool) -> dict[str, Any]:
  """What the hub reads; of the licenses that which all parents have."""
  licenses = sorted({parent.license for parent in parents if parent.license})
  # The hub takes only names of its own.
  repositories = [parent.repository for parent in named if parent.repository]
  relation = {"base_model": repositories, "base_model_relation": "adapter" if adapter else "merge"}
  front: dict[str, Any] = {
    **(relation if repositories else {}),
    "library_name": "peft" if adapter else "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["merge", "cqd_jax", *(["lora"] if adapter else [])],
  }
  if len(licenses) == 1 and all(parent.license for parent in parents):
    front["license"] = licenses[0]
  return front


def _what(about: Mapping[str, Any], base: Parent) -> str:
  kind = about.get("kind")
  if kind == "elite":
    archives = about["archives"]
    where = f", an elite of the archive{'s' * (len(archives) != 1)} {', '.join(map(escape, archives))}"
    return f"Individual {about['identity']} of an evolved population of merges of {escape(base.name)}'s experts{where}."
  if kind == "aggregate":
    of = ", ".join(f"{identity} ({escape(task)})" for task, identity in about["of"].items())
    return f"The aggregate of the best elites of an evolved population: base plus the weighted sum of {of}."
  return f"A model of the run ({escape(str(kind))})."


def _founders(about: Mapping[str, Any]) -> list[int]:
  """The individuals of which a model is made."""
  return [about["identity"]] if "identity" in about else list(dict.fromkeys(about.get("of", {}).values()))


def _lineage(individuals: Individuals, founders: Sequence[int], experts: Sequence[str]) -> list[str]:
  """The ancestors as a table, the youngest first."""
  family = sorted({one for founder in founders for one in individuals.ancestors(founder)}, reverse=True)
  shown = family[:MOST_ANCESTORS]
  rows = []
  for one in shown:
    parents = [int(parent) for parent in individuals.parents[one] if parent >= 0]
    weights = individuals.weights(one)
    made = " + ".join(f"{parent}" for parent in parents)
    if parents and weights is not None:
      shares = [f"{float(share.mean()):.3f}" for share in weights]
      made = " + ".join(f"{share} x {parent}" for share, parent in zip(shares, parents, strict=True))
    if not parents:
      made = f"expert {experts[one]}" if one < len(experts) else individuals.mutation[one]
    change = [individuals.mutation[one]] if parents and individuals.mutation[one] else []
    change += [f"{name} {text}" for name, text in individuals.remarks(one)]
    scores = ", ".join(f"{score:.3f}" for score in individuals.scores[one])
    rows.append([str(one), str(int(individuals.born[one])), made, ", ".join(change), scores])
  lines = ["## Lineage", "", "The youngest first; 'a x 5' is a times the task vector of individual 5."]
  if len(family) > len(shown):
    lines[-1] += f" The {len(shown)} youngest of {len(family)} are shown."
  told = f" ({', '.join(experts)})" if len(experts) == individuals.scores.shape[1] else ""
  header = ["individual", "born in batch", "made of", "mutation and notes", f"scores{told}"]
  return [*lines, "", markdown_table(header, rows)]
