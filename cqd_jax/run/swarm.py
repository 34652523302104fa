"""`cqd export`: a swarm as Hugging Face models, or as LoRA adapters that a server holds beside their one base."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from cqd_jax.archive import Grid
from cqd_jax.genotypes.space import Space
from cqd_jax.hub.save import whole_folder
from cqd_jax.hub.save_adapter import save_adapter
from cqd_jax.run.artifacts import (
  HubWriter,
  about_aggregate,
  about_elite,
  card_of,
  chosen_slots,
  core_of,
  elite_name,
)
from cqd_jax.run.commands import restored
from cqd_jax.run.compare import aggregated
from cqd_jax.run.context import RunContext
from cqd_jax.run.files import RunFiles, open_run
from cqd_jax.run.loop import Searched
from cqd_jax.store.individuals import Individuals
from cqd_jax.store.markdown import code, escape, markdown_table
from cqd_jax.store.run_dir import RunDirError, locked, write_json, write_text
from cqd_jax.terminal.progress import progress
from cqd_jax.trees import widen
from cqd_jax.types import Genotype

MAP = "swarm.json"

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""

VLLM_EMBEDDINGS = ("LlamaForCausalLM", "MistralForCausalLM")
"""Architectures of which vLLM takes adapters of embedding and head."""

MOST_NAMED = 12
"""Up to so many adapters are named in the command; more are found in the folder by their names."""


@dataclasses.dataclass(frozen=True)
class ExportSettings:
  """How a swarm is written.

  Attributes:
    form: "hf" or "peft".
    elites: "all", "best" (of each archive), "none" (only the best of all), or identities, as "3,17".
    rank: of adapters; None: the smallest that is exact.
    dtype: of the factors of adapters.
    keep_vectors: whether adapters hold changed norms and biases, which vLLM does not take.
    keep_embeddings: whether adapters change embedding and head, which vLLM does not take of every architecture.
  """

  form: str = "hf"
  elites: str = "best"
  rank: int | None = None
  dtype: str = "float32"
  keep_vectors: bool = True
  keep_embeddings: bool = True


@dataclasses.dataclass(frozen=True)
class _Member:
  """One model that is written.

  Attributes:
    name: of its folder.
    about: what `model.json` says.
    genotype: the individual, leaves `[...]`.
    cells: where it is in the archives that hold it.
  """

  name: str
  about: dict[str, Any]
  genotype: Genotype
  cells: dict[str, dict[str, int]]


def export(run_dir: Path, out: Path, settings: ExportSettings, console: Console) -> Path:
  """Writes members of a run's swarm, finished or not, and a map of them; the folder appears whole or not at all.

  Args:
    run_dir: the run.
    out: the folder to write; must not exist.
    settings: which members, and how.
    console: where progress goes.

  Raises:
    ValueError: naming the run directory, the setting, or `out` if it exists.
  """
  files = open_run(run_dir)
  if out.exists():
    raise RunDirError(f"{out}: already exists; nothing was overwritten")
  if settings.form == "hf" and settings != ExportSettings("hf", settings.elites):
    raise ValueError("--rank, --dtype, --drop-vectors and --drop-embeddings are of adapters; expected --format peft")
  with locked(run_dir), restored(files, console) as (context, searched):
    assert isinstance(context.writer, HubWriter)
    base = context.writer.base
    members = _members(context, searched, settings.elites)
    people = context.history.individuals(searched.method.name)
    entries = []
    with whole_folder(out) as unfinished, progress(console, f"writing {settings.form}", len(members)) as advance:
      for member in members:
        entries.append(_write(context, searched.space, unfinished, member, people, settings))
        advance(note=member.name)
      shared = searched.space.share_base
      architecture = (context.writer.interface.settings.get("architectures") or [None])[0]
      readme = _readme(base, entries, settings, files, context.task_names, shared=shared, architecture=architecture)
      write_text(unfinished / "README.md", readme)
      about = {"run": files.path.name, "base": base, "format": settings.form, "tasks": list(context.task_names)}
      write_json(unfinished / MAP, {**about, **_describe_cells(searched), "members": entries})
  console.print(
    f"{len(entries)} models in {out}: {MAP} maps them to cells and scores, README.md says how to serve them"
  )
  return out


def _members(context: RunContext, searched: Searched, which: str) -> list[_Member]:
  """The chosen elites, and the aggregate."""
  repertoire = searched.repertoire
  assert repertoire is not None
  if which in ("all", "best", "none"):
    slots = chosen_slots(repertoire, which)
  else:
    alive = chosen_slots(repertoire, "all")
    identity = np.asarray(repertoire.lineage.identity)
    by_identity = {int(identity[slot]): slot for slot in alive}
    try:
      wanted = [int(text) for text in which.split(",")]
    except ValueError:
      raise ValueError(f"elites: expected all, best, none, or identities as 3,17; got {which!r}") from None
    if absent := [one for one in wanted if one not in by_identity]:
      raise ValueError(
        f"elites: {absent[0]} is no elite of this run; there are {len(by_identity)}, {_some(by_identity)}"
      )
    slots = [by_identity[one] for one in dict.fromkeys(wanted)]
  members = []
  for slot in slots:
    about = about_elite(context, repertoire, slot)
    cells = _cells(context, searched, about)
    members.append(_Member(elite_name(about["identity"]), about, repertoire.individual(slot).genotype, cells))
  return [*members, _Member("aggregate", about_aggregate(context, searched), aggregated(searched), {})]


def _write(
  context: RunContext,
  space: Space,
  out: Path,
  member: _Member,
  people: Individuals,
  settings: ExportSettings,
) -> dict[str, Any]:
  """Writes one model; its entry of the map."""
  about, writer = member.about, context.writer
  assert isinstance(writer, HubWriter)
  entry = {
    "name": member.name,
    "identity": about.get("identity"),
    "scores": about.get("validation_scores"),
    "cells": member.cells,
    "rounding": _rounding(space, member.genotype),
  }
  card = card_of(context, about, member.name, people, adapter=settings.form == "peft")
  if settings.form == "hf":
    writer.whole(out / member.name, space.leaves(member.genotype), {**about, "seed": context.seed}, card)
    return entry
  basis, core = core_of(space, member.genotype)
  written = save_adapter(
    out / member.name,
    basis,
    core,
    writer.interface.config,
    base_name=writer.base,
    rank=settings.rank,
    dtype=settings.dtype,
    keep_vectors=settings.keep_vectors,
    keep_embeddings=settings.keep_embeddings,
    card=card,
  )
  return {**entry, **written._asdict()}


def _rounding(space: Space, genotype: Genotype) -> float:
  """The share of a task vector, by norm, that is lost where base plus task vector is rounded to the base's dtype."""
  base = space.base
  if all(leaf.dtype.itemsize >= 4 for leaf in jax.tree.leaves(base)):
    return 0.0
  own = jax.tree.map(widen, base)  # in whose dtype the task vector is then written out
  basis, core = core_of(space, genotype)
  wide = basis.replace(base=own).task_vector(core)
  lost = norm = 0.0
  for leaf, change, (_, rounded) in zip(
    jax.tree.leaves(own), jax.tree.leaves(wide), space.leaves(genotype), strict=True
  ):
    error = widen(rounded) - leaf - widen(change)
    lost, norm = lost + float(jnp.vdot(error, error)), norm + float(jnp.vdot(widen(change), widen(change)))
  return (lost / norm) ** 0.5 if norm else 0.0


def _cells(context: RunContext, searched: Searched, about: dict[str, Any]) -> dict[str, dict[str, int]]:
  """By archive that holds an elite, its cell along each of the other tasks."""
  repertoire = searched.repertoire
  grid = None if repertoire is None else repertoire.cells
  if not isinstance(grid, Grid):
    return {name: {} for name in about["archives"]}
  bins = np.asarray(grid.bins(np.array([list(about["validation_scores"].values())], np.float32)))[0].tolist()
  own = dict(zip(context.task_names, bins, strict=True))
  return {name: {task: cell for task, cell in own.items() if task != name} for name in about["archives"]}


def _describe_cells(searched: Searched) -> dict[str, Any]:
  """The edges of the cells along each task."""
  repertoire = searched.repertoire
  grid = None if repertoire is None else repertoire.cells
  if not isinstance(grid, Grid):
    return {}
  return {"edges": [np.asarray(grid.edges(task)).tolist() for task in range(grid.num_tasks)]}


def _readme(
  base: str,
  entries: Sequence[dict[str, Any]],
  settings: ExportSettings,
  files: RunFiles,
  tasks: Sequence[str],
  *,
  shared: bool,
  architecture: str | None,
) -> str:
  """How to serve what was written."""
  lines = [f"# {len(entries)} models of the run {escape(files.path.name)}", ""]
  rounding = max(entry["rounding"] for entry in entries)
  if settings.form == "hf":
    lines += [
      "Each folder is a whole model, for transformers or for a server:",
      "",
      "```",
      f'vllm serve "$PWD"/{shlex.quote(entries[0]["name"])}',
      "```",
      "",
    ]
  else:
    lines += _serving(base, entries, architecture)
  if rounding:
    scored = "unrounded, as adapters are" if shared else "rounded, as whole models are"
    lines += [
      f"Base plus task vector is rounded to the base's dtype in whole models, which loses up to {100 * rounding:.2g}%",
      f"of a task vector here (`rounding` in `{MAP}`). Candidates of this run were scored {scored}.",
      "",
    ]
  lines += [f"`{MAP}` maps each model to its scores and its cells in the archives:", ""]
  header = ["model", *tasks, *(["rank", "relative error"] if settings.form == "peft" else [])]
  rows = []
  for entry in entries:
    scores = [f"{entry['scores'][task]:.3f}" if entry["scores"] else "" for task in tasks]
    more = [str(entry["rank"]), f"{entry['relative_error']:.4f}"] if settings.form == "peft" else []
    rows.append([entry["name"], *scores, *more])
  return "\n".join([*lines, markdown_table(header, rows)])


def _serving(base: str, entries: Sequence[dict[str, Any]], architecture: str | None) -> list[str]:
  rank = max(entry["rank"] for entry in entries)
  embedded = [entry["name"] for entry in entries if entry["embeddings"] and architecture not in VLLM_EMBEDDINGS]
  served = [entry for entry in entries if not entry["vectors"] and entry["name"] not in embedded] or list(entries)
  refused = [entry["name"] for entry in entries if entry["vectors"]]
  lines = [
    f"Each folder is a PEFT LoRA adapter of {code(base)}, of rank at most {rank}; one server holds the base once and",
    "all of them. `relative error` is what the adapter lacks of its individual's task vector, over that one's norm.",
    "",
  ]
  if refused:
    lines += [
      f"{len(refused)} of them ({escape(refused[0])}, ...) hold changed norms or biases, which peft takes and vLLM "
      "refuses:",
      "for vLLM export with `--drop-vectors`; the table then reports what that leaves out.",
      "",
    ]
  if embedded:
    lines += [
      f"{len(embedded)} of them ({escape(embedded[0])}, ...) change the embedding or the head, which vLLM refuses of "
      f"{escape(architecture or 'this architecture')}:",
      "for vLLM export with `--drop-embeddings`; the table then reports what that leaves out.",
      "",
    ]
  if rank > VLLM_RANKS[-1]:
    lines += [f"vLLM takes ranks up to {VLLM_RANKS[-1]}: for vLLM export with such a `--rank`.", ""]
  limit = next((size for size in VLLM_RANKS if size >= rank), VLLM_RANKS[-1])
  options = f"--enable-lora --max-lora-rank {limit} --max-loras {min(len(served), 8)} --max-cpu-loras {len(served)}"
  lines += ["From this folder, with all adapters found by their names as requests come:", "", "```"]
  lines += [
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_PLUGINS=lora_filesystem_resolver \\",
    f'  VLLM_LORA_RESOLVER_CACHE_DIR="$PWD" vllm serve {shlex.quote(base)} {options}',
    "```",
    "",
  ]
  if len(served) <= MOST_NAMED:
    modules = " ".join(f'{shlex.quote(entry["name"])}="$PWD"/{shlex.quote(entry["name"])}' for entry in served)
    lines += ["or with all of them named:", "", "```"]
    lines += [f"vllm serve {shlex.quote(base)} {options} \\", f"  --lora-modules {modules}", "```", ""]
  request = json.dumps({"model": served[0]["name"], "prompt": "...", "max_tokens": 64, "temperature": 0})
  lines += ["A request names its adapter as the model:", "", "```"]
  lines += [
    f"curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(request)}",
    "```",
    "",
  ]
  return lines


def _some(identities: Sequence[int] | dict[int, int]) -> str:
  shown = sorted(identities)
  return ", ".join(map(str, shown[:8])) + (", ..." if shown[8:] else "")
