"""Evolves a tiny decoder in core space on a mesh; run by test_placement.py in processes of their own.

Each iteration asks, scores the children by logits and by the tokens that they decode, and tells. There is a checkpoint
in the middle, from which the second half is run again. What came of it is written by the first process.
"""

import argparse
import functools
import json
import os
import re
import sys
from pathlib import Path


def parse():
  parser = argparse.ArgumentParser()
  for name in ("devices", "population", "model", "process", "processes", "port"):
    parser.add_argument(f"--{name}", type=int, required=True)
  parser.add_argument("--out", type=Path, required=True)
  return parser.parse_args()


ARGUMENTS = parse()
# Virtual devices share the threads of one pool: where products wait for others' threads, collectives can take them all.
os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={ARGUMENTS.devices} "
  "--xla_cpu_multi_thread_eigen=false"
)

import jax  # noqa: E402 (after the flag)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from cqd_jax.archive import Grid  # noqa: E402
from cqd_jax.genotypes import CoreBasis  # noqa: E402
from cqd_jax.genotypes.placement import (  # noqa: E402
  make_mesh,
  over_population,
  place_basis,
  place_replicated,
  replicated,
)
from cqd_jax.low_rank import combine_shared, partition_shared  # noqa: E402
from cqd_jax.models import DecoderConfig, bucket_prompts, decode_population, forward, init_params  # noqa: E402
from cqd_jax.operators import expert_svd_mutation, factorize, linear_merge  # noqa: E402
from cqd_jax.search import CycleQD, CycleQDEmitter  # noqa: E402
from cqd_jax.store.checkpoints import Checkpoints  # noqa: E402
from cqd_jax.trees import fingerprint  # noqa: E402

CONFIG = DecoderConfig(64, 32, 48, 2, 4, 2, 8)
CHILDREN, HALF = 4, 3
GRID = Grid(lower=[0.0] * 3, upper=[1.0] * 3, shape=(5, 5, 5))
BUCKETS = bucket_prompts([[3, 4, 5], [6, 7], [9, 8, 7, 6]], num_buckets=1)


def make_basis():
  shapes = jax.eval_shape(functools.partial(init_params, config=CONFIG), jax.random.key(0))

  def model(seed):
    """Drawn by NumPy: each process would compile a generator for each shape."""
    source = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(source.normal(scale=0.2, size=leaf.shape).astype(np.float32)), shapes)

  experts = jax.tree.map(lambda *leaves: 0.5 * jnp.stack(leaves), *map(model, (1, 2, 3)))
  return CoreBasis.from_experts(model(0), experts, rank=3)


def score(basis, genotypes):
  """How likely three tokens are at the end of a sequence, and how many different tokens a child says."""
  own, shared = partition_shared(basis.apply(genotypes))
  ids = jnp.arange(14).reshape(2, 7)
  logits = jax.vmap(lambda mine: forward(combine_shared(mine, shared), CONFIG, ids))(own)
  tokens, _ = decode_population(
    basis.apply(genotypes), CONFIG, BUCKETS, max_new_tokens=5, end_ids=(), group_size=CHILDREN
  )
  return jax.nn.sigmoid(logits[:, 0, -1, 5:8]), tokens


def gathers(compiled):
  """The results of all all-gathers in a compiled program, as shapes."""
  return re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", compiled.as_text())


def inspect(moment, basis, ask, rate, tell):
  """Some more children, and what each of the three programs gathers."""
  repertoire, state, key = moment
  children, info = ask(repertoire, state, key)
  if ARGUMENTS.process != 0 or ARGUMENTS.population * ARGUMENTS.model == 1:
    return children, {}  # nobody reads it; the programs are compiled once more for it
  scores = jnp.full((CHILDREN, 3), 0.5)
  programs = {
    "ask": ask.lower(repertoire, state, key),
    "score": rate.lower(basis, children),
    "tell": tell.lower(genotypes=children, scores=scores, repertoire=repertoire, emitter_state=state, extra_info=info),
  }
  return children, {name: gathers(program.compile()) for name, program in programs.items()}


def main():
  if ARGUMENTS.processes > 1:
    jax.distributed.initialize(f"localhost:{ARGUMENTS.port}", ARGUMENTS.processes, ARGUMENTS.process)
  mesh = make_mesh(population=ARGUMENTS.population, model=ARGUMENTS.model)
  basis = make_basis()
  factors = jax.vmap(functools.partial(factorize, rank=3))(basis.experts)
  emitter = CycleQDEmitter(
    batch_size=CHILDREN,
    crossover=functools.partial(linear_merge, std=0.3),
    mutation=functools.partial(expert_svd_mutation, rate=0.3),
    task_context=factors,
  )
  cycleqd = CycleQD(None, emitter)
  first_scores = jnp.array([[0.6, 0.2, 0.3], [0.1, 0.7, 0.4], [0.2, 0.3, 0.8]])
  repertoire, state, _ = cycleqd.init_ask_tell(basis.experts, first_scores, GRID, jax.random.key(0))

  basis = place_basis(basis, mesh)
  moment = place_replicated((repertoire, state, jax.random.key(1)), mesh)
  ask = jax.jit(cycleqd.ask, out_shardings=(over_population(mesh), None))
  tell = jax.jit(cycleqd.tell, out_shardings=replicated(mesh), donate_argnames=("repertoire", "emitter_state"))
  rate = jax.jit(score, out_shardings=(over_population(mesh), replicated(mesh)))
  compilations = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: compilations.append(event) if "backend_compile" in event else None
  )

  def iterate(moment):
    repertoire, state, key = moment
    key, ask_key = jax.random.split(key)
    children, info = ask(repertoire, state, ask_key)
    scores, tokens = rate(basis, children)
    repertoire, state, _ = tell(
      genotypes=children, scores=scores, repertoire=repertoire, emitter_state=state, extra_info=info
    )
    return (repertoire, state, key), np.asarray(tokens)

  said = []
  counts = []
  with Checkpoints(ARGUMENTS.out / "checkpoints", keep=5) as checkpoints:
    checkpoints.save(0, moment)
    for number in range(1, 2 * HALF + 1):
      moment, tokens = iterate(moment)
      said.append(tokens)
      counts.append(len(compilations))
      if number == HALF:
        checkpoints.save(HALF, moment)
    checkpoints.save(2 * HALF, moment)
    checkpoints.wait()
    again = checkpoints.load(HALF, moment)
    for _ in range(HALF):
      again, _ = iterate(again)
  prints = [np.asarray(fingerprint(each)) for each in (moment, again)]

  children, all_gathers = inspect(moment, basis, ask, rate, tell)
  facts = {
    "gathers": all_gathers,
    "resumed_the_same": bool(np.array_equal(*prints)),
    "compilations": counts,
    "shards": {
      "kernel": basis.base["layers"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape,
      "left": basis.left["layers"]["mlp"]["down"]["kernel"].addressable_shards[0].data.shape,
      "children": jax.tree.leaves(children)[0].addressable_shards[0].data.shape,
    },
  }
  if ARGUMENTS.process == 0:
    (ARGUMENTS.out / "facts.json").write_text(json.dumps(facts))
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(moment[0]))}
    np.savez(ARGUMENTS.out / "result.npz", tokens=np.stack(said), **leaves)


if __name__ == "__main__":
  main()
  sys.stdout.flush()
