"""CycleQD on a suite: the loop around ask, executed answers and tell; it can be killed at any moment and goes on."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from qdax.core.emitters.mutation_operators import isoline_variation

from cqd_jax.archive import (
  CyclingRepertoire,
  Grid,
  elite_sampling,
  holders,
  reference_elite_sampling,
  uniform_sampling,
)
from cqd_jax.config.settings import ConfigError, EvolutionSettings, MeshSettings, settings_as_json
from cqd_jax.genotypes.placement import make_mesh, over_population, place_replicated, replicated
from cqd_jax.operators import (
  aggregate,
  expert_svd_mutation,
  gaussian_mutation,
  linear_merge,
  svd_mutation,
)
from cqd_jax.run.context import Method, RunContext
from cqd_jax.run.space import Space, describe_basis, make_space
from cqd_jax.search import CycleQD, CycleQDEmitter
from cqd_jax.store.checkpoints import Checkpoints
from cqd_jax.store.history import Batch
from cqd_jax.store.loggers import MetricsLogger, TensorBoardLogger, WandbLogger, all_closed
from cqd_jax.store.run_dir import RunDirError, write_text
from cqd_jax.terminal.progress import progress
from cqd_jax.types import ArrayField, Genotype, Metrics, PRNGKey

BASIS = "basis.safetensors"
"""The file of a run directory that keeps its core space."""

RULES = {
  "elite": elite_sampling,
  "reference_elite": reference_elite_sampling,
  "uniform": uniform_sampling,
}


class LoopState(flax.struct.PyTreeNode):
  """All that the next iteration depends on; what a checkpoint holds.

  Attributes:
    repertoire: the archives; extra score "passed" `[M, K, B]`: the validation questions answered right.
    emitter_state: of `CycleQDEmitter`.
    key: for the next iteration.
  """

  repertoire: CyclingRepertoire
  emitter_state: Any
  key: ArrayField


class Evolved(NamedTuple):
  """What evolution ends with.

  Attributes:
    repertoire: the archives, as in `LoopState`.
    evaluations: children scored.
    expert_scores: `[K, K]` validation scores of the initial experts.
    space: what the genotypes mean.
  """

  repertoire: CyclingRepertoire
  evaluations: int
  expert_scores: np.ndarray
  space: Space

  def merged(self, slot: int) -> Genotype:
    """What a slot of the pool holds, as an individual of the merge space."""
    return self.space.merged(self.repertoire.individual(slot).genotype)


def make_emitter(settings: EvolutionSettings, space: Space) -> CycleQDEmitter:
  """The emitter that the settings describe. Where parents are merged it tells their weights as "crossover"."""
  archives: dict[str, Any] = {
    "rule": RULES[settings.selection],
    "schedule": settings.schedule,
    "flip_interval": settings.flip_interval,
  }
  if settings.genotype == "coefficients":
    lines = functools.partial(line_crossover, iso_sigma=settings.iso_sigma, line_sigma=settings.line_sigma)
    return CycleQDEmitter(batch_size=settings.batch_size, crossover=lines, **archives)
  mutations = {
    "none": None,
    "gaussian": functools.partial(gaussian_mutation, std=settings.mutation_size),
    "svd": functools.partial(svd_mutation, max_scale=settings.mutation_size),
    "expert_svd": functools.partial(expert_svd_mutation, rate=settings.mutation_size),
  }
  return CycleQDEmitter(
    batch_size=settings.batch_size,
    crossover=functools.partial(
      linear_merge,
      mean=settings.merge_mean,
      std=settings.merge_std,
      granularity=settings.merge_granularity,
      normalize=settings.merge_normalize,
      with_weights=True,
    ),
    crossover_has_aux=True,
    mutation=mutations[settings.mutation],
    task_context=space.expert_svd() if settings.mutation == "expert_svd" and space.expert_svd else None,
    **archives,
  )


def mesh_of(settings: MeshSettings) -> Mesh | None:
  """The mesh of the settings; None for one device."""
  size = settings.population * settings.model
  if size == 1:
    return None
  devices = jax.devices()
  if size > len(devices):
    raise ConfigError(
      f"mesh: expected at most {len(devices)} devices, which is what there is, "
      f"got {settings.population} x {settings.model}"
    )
  return make_mesh(population=settings.population, model=settings.model, devices=devices[:size])


def line_crossover(key: PRNGKey, first: Genotype, second: Genotype, *, iso_sigma: float, line_sigma: float) -> Genotype:
  """QDax's iso+line variation of one pair (Vassiliades & Mouret 2018, arXiv:1804.03906)."""
  pair = jax.tree.map(lambda leaf: leaf[None], (first, second))
  children = isoline_variation(*pair, key, iso_sigma=iso_sigma, line_sigma=line_sigma)
  return jax.tree.map(lambda leaf: leaf[0], children)


class Evolution:
  """CycleQD from the experts, in a run directory.

  Every scored batch is in the history before the next begins, and every so many batches there is a checkpoint. A new
  `Evolution` on the same directory goes on from the newest checkpoint that is whole; what was scored after it is
  remembered, so only moments are lost, and the result is the same to the bit.

  Args:
    lab: models, questions, history.
    run_dir: where checkpoints and metrics go.
    key: of the whole evolution; consumed.
  """

  def __init__(self, lab: RunContext, run_dir: Path, key: PRNGKey):
    self._lab = lab
    self._run_dir = run_dir
    self._settings = lab.settings.evolution
    key, self._init_key = jax.random.split(key)
    self._first_key = key
    self._mesh = mesh_of(lab.settings.mesh)
    self._space = make_space(self._settings, lab.merges, self._mesh, run_dir / BASIS)
    self._cycleqd = CycleQD(None, make_emitter(self._settings, self._space))
    children, archives = (None, None) if self._mesh is None else (over_population(self._mesh), replicated(self._mesh))
    self._ask = jax.jit(self._cycleqd.ask, out_shardings=(children, None))
    self._tell = jax.jit(self._tell_batch, donate_argnames=("moment",), out_shardings=archives)

  def run(self) -> Evolved:
    """Evolves to the end.

    Raises:
      Stopped: after an iteration during which somebody asked for it; a checkpoint is then on disk.
    """
    lab, settings = self._lab, self._settings
    num_batches = settings.children // settings.batch_size
    if self._space.basis is not None:
      line, table = describe_basis(self._space.basis, lab.task_names)
      lab.console.print(line, highlight=False)
      write_text(self._run_dir / "basis.md", table)
    moment, expert_scores = self._begin()
    with Checkpoints(self._run_dir / "checkpoints", keep=lab.settings.output.checkpoints_kept) as checkpoints:
      done, moment = checkpoints.load_newest(moment, at_most=lab.history.num_batches - 1) or (0, moment)
      with (
        progress(lab.console, "evolving", settings.children, done=done * settings.batch_size) as advance,
        all_closed(self._loggers(done)) as loggers,
      ):
        for number in range(done + 1, num_batches + 1):
          moment, figures = self._iterate(number, moment, loggers)
          stopping = lab.interrupt.requested
          if stopping or number == num_batches or number % lab.settings.output.checkpoint_every == 0:
            with lab.clock.recording():
              checkpoints.save(number, moment)
          advance(settings.batch_size, note=f"best mean {figures['best_mean']:.3f}, {figures['num_elites']} elites")
          if stopping:
            checkpoints.wait()
            lab.interrupt.check()
    return Evolved(moment.repertoire, settings.children, expert_scores, self._space)

  def restore(self) -> Evolved:
    """What evolution had come to at the newest checkpoint.

    Raises:
      RunDirError: if there is no checkpoint that is whole.
    """
    moment, expert_scores = self._begin()
    folder = self._run_dir / "checkpoints"
    with Checkpoints(folder) as checkpoints:
      found = checkpoints.load_newest(moment, at_most=self._lab.history.num_batches - 1)
    if found is None:
      raise RunDirError(f"{folder}: no checkpoint yet; go on with: cqd resume {self._run_dir}")
    done, moment = found
    return Evolved(moment.repertoire, done * self._settings.batch_size, expert_scores, self._space)

  def _begin(self) -> tuple[LoopState, np.ndarray]:
    """Scores the experts, and files them in the archives."""
    lab, settings = self._lab, self._settings
    with progress(lab.console, "scoring the experts", len(jax.tree.leaves(self._space.initial)[0])) as advance:
      passed, seconds = lab.score(lab.suite.validation, self._space.initial, self._space.models)
      scores = passed.mean(axis=-1)
      advance(len(passed), note=f"best mean {scores.mean(axis=-1).max():.3f}")
    repertoire, emitter_state, metrics = self._cycleqd.init_ask_tell(
      self._space.initial,
      scores,
      Grid.from_experts(scores[: len(lab.task_names)], shape=settings.cells),
      self._init_key,
      extra_scores={"passed": jnp.asarray(passed)},
      capacity=len(passed) + settings.children,  # no more individuals will ever be
    )
    identities = np.arange(len(passed))
    nobody = np.full((len(passed), 2), -1)
    with lab.clock.recording():
      lab.history.add(
        Batch(
          number=0,
          identities=identities,
          archive=nobody[:, 0],
          parents=nobody,
          weights=[None] * len(passed),
          mutation=[*[""] * len(lab.task_names), *self._space.others],
          scores=scores,
          taken=np.asarray(holders(repertoire, jnp.asarray(identities, jnp.int32))),
          seconds=seconds,
          metrics=_figures(metrics),
        )
      )
    # A copy of the key: the moment is donated, and this object must be able to begin again.
    moment = LoopState(repertoire, emitter_state, jnp.copy(self._first_key))
    return moment if self._mesh is None else place_replicated(moment, self._mesh), scores[: len(lab.task_names)]

  def _iterate(
    self, number: int, moment: LoopState, loggers: Sequence[MetricsLogger]
  ) -> tuple[LoopState, dict[str, Any]]:
    """One batch: ask, score, tell, and write it down."""
    lab = self._lab
    key, ask_key = jax.random.split(moment.key)
    children, info = self._ask(moment.repertoire, moment.emitter_state, ask_key)
    passed, seconds = lab.score(lab.suite.validation, children, self._space.models)
    scores = passed.mean(axis=-1)
    moment, metrics, identities, taken = self._tell(
      moment.replace(key=key), children, scores.astype(np.float32), passed, info
    )
    figures = _figures(metrics)
    weights = list(np.asarray(info["crossover"])) if "crossover" in info else [None] * len(passed)
    with lab.clock.recording():
      lab.history.add(
        Batch(
          number=number,
          identities=np.asarray(identities),
          archive=np.asarray(info["archive"]),
          parents=np.asarray(info["parents"]),
          weights=weights,
          mutation=[self._settings.variation] * len(passed),
          scores=scores,
          taken=np.asarray(taken),
          seconds=seconds,
          metrics=figures,
        )
      )
      for logger in loggers:
        logger.log(number, _by_task(figures, lab.task_names))
    return moment, figures

  def _tell_batch(
    self, moment: LoopState, children: Genotype, scores: jax.Array, passed: jax.Array, info: dict[str, Any]
  ) -> tuple[LoopState, Metrics, jax.Array, jax.Array]:
    identities = moment.repertoire.num_offered + jnp.arange(scores.shape[0], dtype=jnp.int32)
    repertoire, emitter_state, metrics = self._cycleqd.tell(
      genotypes=children,
      scores=scores,
      repertoire=moment.repertoire,
      emitter_state=moment.emitter_state,
      extra_scores={"passed": passed},
      extra_info=info,
    )
    taken = holders(repertoire, identities)
    return moment.replace(repertoire=repertoire, emitter_state=emitter_state), metrics, identities, taken

  def _loggers(self, done: int) -> list[MetricsLogger]:
    output = self._lab.settings.output
    loggers: list[MetricsLogger] = []
    if output.tensorboard:
      loggers.append(TensorBoardLogger(self._run_dir / "tensorboard", first_step=done + 1))
    if output.wandb_project:
      config = settings_as_json(self._lab.settings)
      name, folder = self._run_dir.name, self._run_dir / "wandb"
      loggers.append(WandbLogger(output.wandb_project, name=name, folder=folder, config=config))
    return loggers


def _figures(metrics: Metrics) -> dict[str, Any]:
  return {name: np.asarray(value).tolist() for name, value in metrics.items()}


def _by_task(figures: dict[str, Any], task_names: Sequence[str]) -> dict[str, float]:
  """Figures one by one, as loggers take them: those of K archives as "coverage/coding"."""
  named: dict[str, float] = {}
  for name, value in figures.items():
    if isinstance(value, list):
      named |= {f"{name}/{task}": entry for task, entry in zip(task_names, value, strict=True)}
    else:
      named[name] = value
  return named


def best_elite(evolved: Evolved) -> Method:
  """CycleQD's elite with the best mean on validation; its members are all elites."""
  repertoire = evolved.repertoire
  alive = np.flatnonzero(np.asarray(repertoire.alive))
  return Method(
    name="CycleQD, best elite",
    model=evolved.space.merged(repertoire.best().genotype),
    evaluations=evolved.evaluations,
    members=lambda index: evolved.merged(int(alive[index])),
    passed=np.asarray(repertoire.extra_scores["passed"])[alive],
  )


def aggregated(evolved: Evolved) -> Method:
  """The softmax-weighted sum of the K archives' best elites (the paper's final model)."""
  repertoire = evolved.repertoire
  best = [repertoire.best(archive) for archive in range(repertoire.num_tasks)]
  genotypes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(elite.genotype for elite in best))
  fitnesses = jnp.stack([elite.scores[archive] for archive, elite in enumerate(best)])
  model = evolved.space.merged(aggregate(genotypes, fitnesses))
  return Method("CycleQD, aggregate", model, evolved.evaluations)
