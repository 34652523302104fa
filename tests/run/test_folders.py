"""Experiments on Hugging Face folders, end to end: trained, written, read back, evolved, exported; judged elsewhere.

The experts of a small Llama are trained on the skills; one becomes a LoRA adapter. What is exported at the end is asked
by transformers, and by peft on top of the base, and has to give the answers that evolution saw.
"""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from dialogue_cases import write_tokenizer
from experiment_cases import needs_sandbox, task_arithmetic, tiny_evolution, tiny_settings
from rich.console import Console

from cqd_jax.cli.main import main
from cqd_jax.config.plugs import Plug
from cqd_jax.config.settings import ConfigError, MeshSettings, load_settings
from cqd_jax.genotypes import CoreBasis
from cqd_jax.hub.load import load_pretrained, open_pretrained, save_pretrained
from cqd_jax.hub.save_adapter import save_adapter
from cqd_jax.models import DecoderConfig
from cqd_jax.operators import task_vector
from cqd_jax.run.experiment import resume_experiment, run_experiment
from cqd_jax.run.folders import open_folders
from cqd_jax.run.plan import dry_run
from cqd_jax.run.swarm import ExportSettings, export
from cqd_jax.store.run_dir import RunDirError
from cqd_jax.tasks.skills import skills
from cqd_jax.tasks.skills.tokenizer import tokenizer_files
from cqd_jax.tasks.skills.training import Trainer

pytestmark = [
  needs_sandbox,
  # Experts this small may all fail one task; the grid says so.
  pytest.mark.filterwarnings("ignore:task .* all experts score 0"),
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

QUIET = Console(quiet=True)
LLAMA = DecoderConfig(128, 64, 96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, rope_theta=1000.0)
END_IDS = {"eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 1}
TASKS = ("coding", "database", "os")
SIZES = {"train": 400, "validation": 6, "test": 8}


def train_models():
  """A base that knows the format, and an expert a task."""
  trainer = Trainer(LLAMA, batch_size=8, row_length=96)
  examples = {task.name: list(task.examples("train")) for task in skills(sizes=SIZES, seed=5)}
  every = [example for own in examples.values() for example in own]
  base = trainer.fit(trainer.init(jax.random.key(0)), every, steps=30, schedule_steps=60, peak=4e-3, seed=0)
  return base, {
    name: trainer.fit(base, own, steps=60, schedule_steps=60, peak=4e-3, seed=index)
    for index, (name, own) in enumerate(examples.items())
  }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """The base and its experts: coding and database whole models, os an adapter."""
  folder = tmp_path_factory.mktemp("models")
  base, experts = train_models()
  for name, params in {"base": base, "coding": experts["coding"], "database": experts["database"]}.items():
    card = f"---\nlicense: {'apache-2.0' if name == 'base' else 'mit'}\n---\n"
    settings = END_IDS | ({"_name_or_path": "somebody/base"} if name == "base" else {})
    save_pretrained(
      folder / name, params, LLAMA, tokenizer_files(), settings=settings, generation=END_IDS, card=card,
      max_shard_bytes=200_000,
    )  # fmt: skip
  own = CoreBasis.from_experts(base, [task_vector(experts["os"], base)], rank=8)
  genotype = jax.tree.map(lambda leaf: leaf[0], own.experts)
  written = save_adapter(folder / "os", own, genotype, LLAMA, base_name=str(folder / "base"), keep_vectors=False)
  assert written.rank == 8
  return folder


def settings_for(folders, folder, **changes):
  settings = tiny_settings(
    folder,
    name="folders",
    base=folders / "base",
    experts=tuple(folders / name for name in TASKS),
    evolution=tiny_evolution(genotype=Plug("core", {"rank": 0, "share_base": True})),
    methods=(task_arithmetic(0.5),),
  )
  return dataclasses.replace(settings, **changes)


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
  """A run in core space, whose candidates share the base, and one of dense weights."""
  folder = tmp_path_factory.mktemp("runs")
  evolution = settings_for(folders, folder).evolution
  kinds = {"core": evolution, "dense": dataclasses.replace(evolution, genotype=Plug("dense"))}
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="task .* all experts score 0")
    return {
      kind: run_experiment(settings_for(folders, folder, name=kind, evolution=own), QUIET)
      for kind, own in kinds.items()
    }


def questions():
  return [example.prompt for task in skills(sizes=SIZES, seed=0) for example in task.examples("validation")]


def judged_answers(model, tokenizer):
  """The answers of a model of transformers to the validation questions."""
  batch = tokenizer(questions(), return_tensors="pt", padding=True)
  batch.pop("token_type_ids", None)
  tokens = model.generate(**batch, do_sample=False, max_new_tokens=20)[:, batch["input_ids"].shape[1] :]
  return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def our_answers(params, config, tokenizer):
  from cqd_jax.models import bucket_prompts, decode_population

  prompts = bucket_prompts([tokenizer(text)["input_ids"] for text in questions()], num_buckets=1, pad_id=0)
  population = jax.tree.map(lambda leaf: leaf[None], params)
  tokens, lengths = decode_population(population, config, prompts, max_new_tokens=20, end_ids=(3,), pad_id=0)
  return [
    tokenizer.decode(row[:length], skip_special_tokens=True)
    for row, length in zip(np.asarray(tokens)[0].tolist(), np.asarray(lengths)[0].tolist(), strict=True)
  ]


def test_both_ways_find_the_same_children(runs):
  scores = {}
  for kind, result in runs.items():
    content = json.loads((result.run_dir / "scores.json").read_text())
    scores[kind] = [(row["name"], row["scores"]) for row in content["test"]]
    assert sum(row[1].get("coding", 0) for row in scores[kind]) > 0
  assert scores["core"] == scores["dense"]
  assert (runs["core"].run_dir / "basis.safetensors").is_file()
  assert not (runs["core"].run_dir / "models" / "base").exists()  # it is where it was


def test_models_that_are_exported_give_the_same_answers_in_transformers(runs, tmp_path):
  from transformers import AutoModelForCausalLM, AutoTokenizer

  out = export(runs["core"].run_dir, tmp_path / "merged", ExportSettings("hf", "best"), QUIET)
  about = json.loads((out / "swarm.json").read_text())
  assert about["tasks"] == list(TASKS)
  assert len(about["edges"]) == 3
  names = [member["name"] for member in about["members"]]
  assert names[-1] == "aggregate"
  assert len(names) >= 2
  different = set()
  for name in names:
    own = load_pretrained(out / name)
    model = AutoModelForCausalLM.from_pretrained(out / name, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / name)
    judged = judged_answers(model, tokenizer)
    assert judged == our_answers(own.params, own.config, tokenizer)
    different.add(tuple(judged))
  assert len(different) > 1
  best = runs["core"].run_dir / "models" / "best"
  card = (best / "README.md").read_text()
  front = yaml.safe_load(card.split("---")[1])
  assert front["base_model"] == ["somebody/base"]  # by its config; the others tell no name on the hub
  assert "license" not in front  # the parents differ
  for text in ("apache-2.0", "mit", "not stated", "## Lineage", "## Scores"):
    assert text in card
  for file in ("config.json", "generation_config.json", "tokenizer.json", "model.json"):
    assert (best / file).is_file()


@pytest.mark.parametrize("kind", ["core", "dense"])
def test_adapters_that_are_exported_give_the_same_answers_in_peft(runs, folders, tmp_path, kind):
  from peft import PeftModel
  from transformers import AutoModelForCausalLM, AutoTokenizer

  run_dir = runs[kind].run_dir
  which = "all" if kind == "core" else "none"
  assert main(["export", str(run_dir), str(tmp_path / "swarm"), "--format", "peft", "--elites", which]) == 0
  assert main(["export", str(run_dir), str(tmp_path / "whole"), "--format", "hf", "--elites", which]) == 0
  about = json.loads((tmp_path / "swarm" / "swarm.json").read_text())
  assert about["base"] == str(folders / "base")
  tokenizer = AutoTokenizer.from_pretrained(folders / "base")
  for member in about["members"]:
    whole = load_pretrained(tmp_path / "whole" / member["name"])
    base = AutoModelForCausalLM.from_pretrained(folders / "base", attn_implementation="eager")
    model = PeftModel.from_pretrained(base, tmp_path / "swarm" / member["name"]).eval()
    assert judged_answers(model, tokenizer) == our_answers(whole.params, whole.config, tokenizer)
    assert member["relative_error"] == 0
    assert member["name"] == "aggregate" or set(member["cells"]) <= set(TASKS)
  readme = (tmp_path / "swarm" / "README.md").read_text()
  assert "hold changed norms or biases" in readme  # of the experts that are whole models


def test_adapters_for_vllm_tell_what_they_leave_out(runs, tmp_path, capsys):
  arguments = ["export", str(runs["core"].run_dir), str(tmp_path / "swarm"), "--format", "peft", "--rank", "4"]
  assert main([*arguments, "--drop-vectors", "--elites", "none", "--dtype", "bfloat16"]) == 0
  (best, aggregate) = json.loads((tmp_path / "swarm" / "swarm.json").read_text())["members"]
  assert best["rank"] == 4
  assert 0 < best["relative_error"] < 1
  assert "final_norm/scale" in best["left_out"]
  readme = (tmp_path / "swarm" / "README.md").read_text()
  assert "vllm serve" in readme
  assert readme.startswith("# 2 models of the run ")
  assert "--max-lora-rank 8" in readme
  assert aggregate["name"] in readme
  content = json.loads((tmp_path / "swarm" / best["name"] / "adapter_config.json").read_text())
  assert content["modules_to_save"] is None
  assert main([*arguments]) == 2
  assert "already exists" in capsys.readouterr().err
  assert main(["export", str(runs["core"].run_dir), str(tmp_path / "x"), "--elites", "99"]) == 2
  assert "99 is no elite of this run" in capsys.readouterr().err


def test_a_run_knows_the_models_that_it_began_with(runs, folders, tmp_path):
  run_dir = tmp_path / "run"
  shutil.copytree(runs["core"].run_dir, run_dir)
  (run_dir / "scores.json").unlink()
  facts = json.loads((run_dir / "run.json").read_text())
  assert set(facts["models"]) == {str(folders / name) for name in ("base", *TASKS)}
  assert resume_experiment(run_dir, QUIET).rows == runs["core"].rows
  (run_dir / "scores.json").unlink()
  facts["models"][str(folders / "os")] = "another"
  (run_dir / "run.json").write_text(json.dumps(facts))
  with pytest.raises(RunDirError, match="os: is not the model with which"):
    resume_experiment(run_dir, QUIET)


def test_relative_folders_are_found_from_elsewhere(folders, tmp_path, monkeypatch):
  monkeypatch.chdir(folders)
  settings = settings_for(Path(), tmp_path)
  assert not settings.base.is_absolute()
  opened = open_folders(settings)
  assert set(opened.fingerprints()) == {str(folders / name) for name in ("base", *TASKS)}


def test_what_cannot_run_is_told_before_there_is_a_run_directory(folders, tmp_path):
  settings = settings_for(folders, tmp_path)
  for changes, message in (
    ({"experts": ()}, "experts: expected at least one folder, got none"),
    (
      {"experts": settings.experts[:2], "evolution": tiny_evolution(mutation=Plug("expert_svd", {"rate": 0.3}))},
      "mutation: expert_svd adds part of the expert of the active task.*as many experts as tasks; got 2 and 3",
    ),
    ({"base": None}, "base: expected the folder of the experts' base model"),
    ({"base": tmp_path / "none"}, "none: no such model folder"),
    ({"experts": (*settings.experts[:2], tmp_path)}, "not a Hugging Face model folder"),
    ({"base": folders / "os"}, "it is a PEFT adapter, which belongs to a base model"),
    ({"mesh": MeshSettings(population=3)}, "mesh: expected at most"),
    ({"tasks": dataclasses.replace(settings.tasks, names=(Plug("os"),))}, "expected 2 to 8 tasks"),
    (
      {"tasks": dataclasses.replace(settings.tasks, names=(Plug("coding"), Plug("shell"), Plug("os")))},
      "tasks.names: no tasks 'shell'; there are",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      run_experiment(dataclasses.replace(settings, **changes), QUIET)
  assert not (tmp_path / "runs").exists()


def test_a_dry_run_reads_nothing_and_tells_memory_and_work(folders, tmp_path, capsys):
  config = tmp_path / "experiment.yaml"
  experts = [str(folders / name) for name in TASKS]
  config.write_text(yaml.safe_dump({"base": str(folders / "base"), "experts": experts, "runs_dir": str(tmp_path)}))
  assert main(["evolve", str(config), "--dry-run", "--evolution.genotype", "core"]) == 0
  printed = capsys.readouterr().out
  for text in (
    "LlamaForCausalLM",
    "LoRA adapter of rank 8",
    "full model",
    "in all",
    "FLOPs",
    "Disk",
    "experiment can run",
  ):
    assert text in printed
  assert list(tmp_path.iterdir()) == [config]
  assert (
    main(["evolve", str(config), "--dry-run", "--experts", experts[0], "nowhere", "--tasks.names", "a:b", "os"]) == 2
  )
  told = capsys.readouterr().err
  assert "nowhere: no such expert folder" in told
  assert "'a:b' cannot be imported" in told


def sparse_llama_8b(folder):
  """Llama 3 8B by its config and the headers of its files; the weights are holes."""
  folder.mkdir()
  config = DecoderConfig(128_256, 4096, 14_336, 32, 32, 8, 128, rope_theta=5e5)
  from cqd_jax.models.hf_config import hf_config
  from cqd_jax.models.hf_layout import placements

  (folder / "config.json").write_text(json.dumps({**hf_config(config), "eos_token_id": 3}))
  header, end = {}, 0
  for placement in placements(config):
    for name in placement.names:
      size = 2 * int(np.prod(placement.tensor_shape))
      header[name] = {"dtype": "BF16", "shape": placement.tensor_shape, "data_offsets": [end, end + size]}
      end += size
  text = json.dumps(header).encode()
  with (folder / "model.safetensors").open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
  for name, content in tokenizer_files().items():
    (folder / name).write_text(content)
  return folder


def test_the_setting_of_the_paper_is_planned_for_real_shapes(tmp_path, pytestconfig, monkeypatch, shared_data, capsys):
  for name in ("mbpp/mbpp.jsonl", "dbbench/standard.jsonl", "os_interaction"):
    shared_data(name)
  (tmp_path / "data").symlink_to(shared_data(""))
  monkeypatch.chdir(tmp_path)
  base = sparse_llama_8b(tmp_path / "llama")
  assert open_pretrained(base).num_bytes == 16_060_522_496
  settings = load_settings(Path(pytestconfig.rootpath) / "experiments" / "llama3_agentbench.yaml")
  assert settings.evolution.children == 1200
  assert [plug.use for plug in settings.tasks.names] == ["mbpp", "dbbench", "os_interaction"]
  write_tokenizer(base)  # the miniature's cannot write these questions
  settings = dataclasses.replace(settings, tasks=dataclasses.replace(settings.tasks, validation=10, test=10))
  dry_run(dataclasses.replace(settings, base=base, experts=(base,) * 3), Console(width=140))
  printed = capsys.readouterr().out
  for text in ("8,030,261,248 parameters", "16.1 GB", "1,203 elites", "FLOPs", "5 adapters at most"):
    assert text in printed
  with pytest.raises(ConfigError, match="Meta-Llama-3-8B-Instruct: no such model folder"):
    dry_run(settings, QUIET)
