"""The one durable loop: any algorithm, on any problem, recorded batch by batch; it can be killed at any moment."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.archive import CyclingRepertoire, holders
from cqd_jax.genotypes.placement import over_population, place_replicated, replicated
from cqd_jax.genotypes.space import Space, population_size, take
from cqd_jax.run.context import Method, RunContext
from cqd_jax.run.scoring import checksums, names_from
from cqd_jax.search.algorithm import Algorithm, Info, Population, SearchContext, archives_of, space_of
from cqd_jax.store.checkpoints import Checkpoints
from cqd_jax.store.evaluations import Evaluation
from cqd_jax.store.history import Batch
from cqd_jax.store.loggers import MetricsLogger, TensorBoardLogger, WandbLogger, all_closed
from cqd_jax.store.run_dir import RunDirError
from cqd_jax.tasks.problem import Scored, TracedScoring, task_scores
from cqd_jax.terminal.progress import progress
from cqd_jax.types import ArrayField, Genotype, Metrics


class LoopState(flax.struct.PyTreeNode):
  """All that the next iteration depends on; what a checkpoint holds.

  Attributes:
    search: the algorithm's state.
    key: for the next iteration.
  """

  search: Any
  key: ArrayField


class Searched(NamedTuple):
  """What a method ends with.

  Attributes:
    method: which.
    algorithm: its search.
    space: what its genotypes mean.
    state: of the search.
    evaluations: children scored.
    initial_scores: `[E, K]` float64 validation scores of the experts in that space.
  """

  method: Method
  algorithm: Algorithm
  space: Space
  state: Any
  evaluations: int
  initial_scores: np.ndarray

  @property
  def repertoire(self) -> CyclingRepertoire | None:
    """The archives, if it has any."""
    return archives_of(self.algorithm, self.state)

  def population(self) -> Population:
    """What it offers."""
    return self.algorithm.population(self.state)

  def best(self, population: Population) -> int:
    """The index of the member with the best mean over tasks, the first of equals."""
    repertoire = self.repertoire
    if repertoire is not None:
      best = int(repertoire.best().lineage.identity)
      return int(np.flatnonzero(np.asarray(population.identities) == best)[0])
    means = task_scores(np.asarray(population.values)).mean(axis=-1)
    return int(np.where(np.isnan(means), -np.inf, means).argmax())


class Batched(NamedTuple):
  """What one iteration gave, as the history records it: P children."""

  individuals: Any
  scores: Any
  parents: Any
  archive: Any
  note: Mapping[str, Any]
  taken: Any
  metrics: Metrics


class Loop:
  """One method in a run directory.

  Every scored batch is in the history before the next begins, and every so many batches there is a checkpoint. A new
  `Loop` on the same directory goes on from the newest checkpoint that is whole; what was scored after it is remembered,
  so only moments are lost, and the result is the same to the bit.

  Where JAX can trace the scoring, all iterations between two checkpoints are one `jax.lax.scan`.

  Args:
    context: of the run.
    method: what to search with.
    first: whether it is the first method of the run, which finds the swarm that others learn from.

  Raises:
    ValueError: naming the setting with which the method cannot be made.
  """

  def __init__(self, context: RunContext, method: Method, *, first: bool = True):
    self._context = context
    self._method = method
    making = SearchContext(
      context.root, context.keep_basis, context.task_names, context.budget, context.teachers, first=first
    )
    self.algorithm = method.make(making)
    self.space = space_of(self.algorithm, context.root)
    self.budget = int(getattr(self.algorithm, "budget", context.budget))
    self._batch_size = int(self.algorithm.batch_size)
    self._num_batches = -(-self.budget // self._batch_size)
    self._num_initial = population_size(self.space.initial)
    self._first_key, self._init_key = jax.random.split(method.key(context.seed))
    self._folder = context.files.path / "checkpoints" / method.slug
    self._traceable = getattr(self.algorithm, "traceable", True)
    self._scans = self._traceable and isinstance(context.problem, TracedScoring)
    self._compile()

  def _compile(self) -> None:
    if not self._traceable:
      self._ask, self._tell = self.algorithm.ask, self._tell_batch
      return
    mesh, children, state = self._context.mesh, None, None
    if mesh is not None:
      state = replicated(mesh)
      children = over_population(mesh) if self._batch_size % mesh.shape["population"] == 0 else state
    self._ask = jax.jit(self.algorithm.ask, out_shardings=(children, None))
    self._tell = jax.jit(self._tell_batch, donate_argnums=0, out_shardings=state)
    self._scan = jax.jit(self._iterations, static_argnums=1, donate_argnums=0)

  def run(self) -> Searched:
    """Searches to the end.

    Raises:
      Stopped: after an iteration during which somebody asked for it; a checkpoint is then on disk.
    """
    context, name = self._context, self._method.name
    state, initial_scores = self._begin()
    with Checkpoints(self._folder, keep=context.output.checkpoints_kept) as checkpoints:
      done, state = checkpoints.load_newest(state, at_most=context.history.num_batches(name) - 1) or (0, state)
      with (
        progress(context.console, name, self.budget, done=min(done * self._batch_size, self.budget)) as advance,
        all_closed(self._loggers(done)) as loggers,
      ):
        while done < self._num_batches:
          started = time.perf_counter()
          scored_before = min(done * self._batch_size, self.budget)
          done, state, figures = self._advance(done, state, loggers)
          stopping = context.interrupt.requested
          if stopping or done == self._num_batches or done % context.output.checkpoint_every == 0:
            with context.clock.recording():
              checkpoints.save(done, state)
          context.clock.iterate_s += time.perf_counter() - started
          advance(min(done * self._batch_size, self.budget) - scored_before, note=_note(figures))
          if stopping:
            checkpoints.wait()
            context.interrupt.check()
    return Searched(self._method, self.algorithm, self.space, state.search, self.budget, initial_scores)

  def restore(self) -> Searched:
    """What the search had come to at the newest checkpoint.

    Raises:
      RunDirError: if there is no checkpoint that is whole.
    """
    state, initial_scores = self._begin()
    with Checkpoints(self._folder) as checkpoints:
      found = checkpoints.load_newest(state, at_most=self._context.history.num_batches(self._method.name) - 1)
    if found is None:
      raise RunDirError(f"{self._folder}: no checkpoint yet; resume with: cqd resume {self._context.files.path}")
    done, state = found
    evaluations = min(done * self._batch_size, self.budget)
    return Searched(self._method, self.algorithm, self.space, state.search, evaluations, initial_scores)

  def _begin(self) -> tuple[LoopState, np.ndarray]:
    """Scores the initial population, and makes the state before the first batch."""
    context, space = self._context, self.space
    size = self._num_initial
    with progress(context.console, "scoring the experts", size) as advance:
      scored = context.scorer.score("validation", space.initial, space)
      advance(size, note=f"best mean {scored.scores.mean(axis=-1).max():.3f}")
    told = Scored(scored.values, scored.seconds, scored.scores.astype(np.float32))
    search = self.algorithm.init(self._init_key, space.initial, told)
    repertoire = archives_of(self.algorithm, search)
    nobody = np.full((size, 2), -1)
    taken = self._taken(search, jnp.arange(size, dtype=jnp.int32))
    with context.clock.recording():
      if repertoire is not None:
        context.history.describe(self._method.name, cells=repertoire.cells)
      context.history.add(
        self._method.name,
        Batch(
          number=0,
          identities=np.arange(size),
          archive=nobody[:, 0],
          parents=nobody,
          notes=[{}] * size,
          mutation=[*[""] * space.num_experts, *space.others],
          scores=scored.scores,
          taken=np.asarray(taken),
          seconds=scored.seconds,
          metrics={},
          individuals=scored.names,
        ),
      )
    # A copy of the key: the state is donated, and this object must be able to begin again.
    state = LoopState(search, jnp.copy(self._first_key))
    state = state if context.mesh is None else place_replicated(state, context.mesh)
    return state, scored.scores[: space.num_experts]

  def _advance(
    self, done: int, state: LoopState, loggers: Sequence[MetricsLogger]
  ) -> tuple[int, LoopState, dict[str, Any]]:
    """One iteration, or as many as one scan may take; returns how many batches are done then."""
    if not self._scans or self._size_of(done + 1) < self._batch_size:
      return done + 1, *self._iterate(done + 1, state, loggers)
    every = self._context.output.checkpoint_every
    whole = self.budget // self._batch_size
    length = min(every - done % every, whole - done)
    started = time.perf_counter()
    shapes = jax.eval_shape(self.algorithm.ask, state.search, state.key)[0]
    state, (values, sums, batched) = self._scan(state, length)
    values, sums, batched = jax.tree.map(np.asarray, (values, sums, batched))
    seconds = (time.perf_counter() - started) / length
    self._context.clock.candidates += length * self._batch_size
    self._context.clock.score_s += seconds * length
    individuals = jax.eval_shape(self.space.as_scored, shapes)
    figures: dict[str, Any] = {}
    for index in range(length):
      own = jax.tree.map(lambda leaf, index=index: leaf[index], batched)
      names = names_from(sums[index], individuals, self.space.scored_in)
      own = own._replace(scores=task_scores(values[index]), individuals=names)  # as the history has them of any problem
      evaluations = dict(zip(names, map(Evaluation, values[index]), strict=True))
      self._context.scorer.remember("validation", evaluations, seconds)
      figures = self._record(done + 1 + index, own, seconds, loggers)
    return done + length, state, figures

  def _iterate(
    self, number: int, state: LoopState, loggers: Sequence[MetricsLogger]
  ) -> tuple[LoopState, dict[str, Any]]:
    """One batch: ask, score, tell, and write it down. What the last batch has over the budget counts as failed."""
    size = self._size_of(number)
    key, ask_key = jax.random.split(state.key)
    children, info = self._ask(state.search, ask_key)
    asked = children if size == self._batch_size else take(children, np.arange(size))
    scored = self._context.scorer.score("validation", asked, self.space)
    values, scores = (_filled(array, self._batch_size) for array in (scored.values, scored.scores))
    state, batched = self._tell(
      state.replace(key=key), children, values, scores.astype(np.float32), info, self._identities(number)
    )
    batched = jax.tree.map(lambda leaf: np.asarray(leaf)[:size], batched._replace(metrics={}))._replace(
      scores=scored.scores, metrics=batched.metrics, individuals=scored.names
    )
    return state, self._record(number, batched, scored.seconds, loggers)

  def _iterations(self, state: LoopState, length: int) -> tuple[LoopState, Any]:
    """`length` iterations only by traceable operations."""
    problem: Any = self._context.problem

    def one(state: LoopState, number: jax.Array) -> tuple[LoopState, Any]:
      del number
      key, ask_key = jax.random.split(state.key)
      children, info = self.algorithm.ask(state.search, ask_key)
      individuals = self.space.as_scored(children)
      values = problem.traced_values("validation", individuals, self.space.scored_in)
      scores = task_scores(values)
      state, batched = self._tell_batch(state.replace(key=key), children, values, scores, info, None)
      return state, (values, checksums(individuals), batched)

    result: tuple[LoopState, Any] = jax.lax.scan(one, state, jnp.arange(length))
    return result

  def _tell_batch(
    self, state: LoopState, children: Genotype, values: Any, scores: Any, info: Info, identities: Any
  ) -> tuple[LoopState, Batched]:
    before = archives_of(self.algorithm, state.search)
    if identities is None and before is not None:
      identities = before.num_offered + jnp.arange(self._batch_size, dtype=jnp.int32)
    search, metrics = self.algorithm.tell(state.search, children, Scored(values, 0.0, scores), info)
    size = self._batch_size
    nobody = jnp.full((size, 2), -1, jnp.int32)
    return state.replace(search=search), Batched(
      individuals=(),
      scores=scores,
      parents=nobody if info.parents is None else info.parents,
      archive=nobody[:, 0] if info.archive is None else info.archive,
      note=dict(info.note),
      taken=self._taken(search, identities),
      metrics=metrics,
    )

  def _taken(self, search: Any, identities: Any) -> Any:
    """Which archives hold individuals that were just offered, `[P, K]`."""
    repertoire = archives_of(self.algorithm, search)
    if repertoire is None:
      size = self._batch_size if identities is None else identities.shape[0]
      return jnp.zeros((size, len(self._context.task_names)), bool)
    return holders(repertoire, jnp.asarray(identities, jnp.int32))

  def _record(self, number: int, batched: Batched, seconds: float, loggers: Sequence[MetricsLogger]) -> dict[str, Any]:
    """Writes down what a batch gave; returns its figures."""
    context, size = self._context, self._size_of(number)
    figures = {name: np.asarray(value).tolist() for name, value in batched.metrics.items()}
    notes = [{name: np.asarray(leaf[child]).tolist() for name, leaf in batched.note.items()} for child in range(size)]
    with context.clock.recording():
      context.history.add(
        self._method.name,
        Batch(
          number=number,
          identities=np.asarray(self._identities(number))[:size],
          archive=np.asarray(batched.archive),
          parents=np.asarray(batched.parents),
          notes=notes,
          mutation=[str(getattr(self.algorithm, "variation", ""))] * size,
          scores=np.asarray(batched.scores, np.float64),
          taken=np.asarray(batched.taken),
          seconds=seconds,
          metrics=figures,
          individuals=batched.individuals,
        ),
      )
      for logger in loggers:
        logger.log(number, _by_task(figures, context.task_names))
    return figures

  def _identities(self, number: int) -> np.ndarray:
    """Individuals are numbered as they are asked; the initial population comes first."""
    first = self._num_initial + (number - 1) * self._batch_size
    return np.arange(first, first + self._batch_size, dtype=np.int32)

  def _size_of(self, number: int) -> int:
    """How many of a batch are scored."""
    return min(self._batch_size, self.budget - (number - 1) * self._batch_size)

  def _loggers(self, done: int) -> list[MetricsLogger]:
    context, slug = self._context, self._method.slug
    output, run_dir = context.output, context.files.path
    loggers: list[MetricsLogger] = []
    if output.tensorboard:
      loggers.append(TensorBoardLogger(run_dir / "tensorboard" / slug, first_step=done + 1))
    if output.wandb_project:
      name, folder = f"{run_dir.name}-{slug}", run_dir / "wandb"
      loggers.append(WandbLogger(output.wandb_project, name=name, folder=folder, config={"method": self._method.name}))
    return loggers


def _filled(array: np.ndarray, size: int) -> np.ndarray:
  """NaN for individuals that were not scored."""
  missing = size - len(array)
  return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1), constant_values=np.nan) if missing else array


def _note(figures: Mapping[str, Any]) -> str:
  best, elites = figures.get("best_mean"), figures.get("num_elites")
  words = [f"best mean {best:.3f}"] if isinstance(best, float) else []
  return ", ".join([*words, *([f"{elites} elites"] if elites is not None else [])])


def _by_task(figures: Mapping[str, Any], task_names: Sequence[str]) -> dict[str, float]:
  """Figures one by one, as loggers take them: those of K archives as "coverage/coding"."""
  named: dict[str, float] = {}
  for name, value in figures.items():
    if not isinstance(value, list):
      named[name] = value
    elif len(value) == len(task_names):
      named |= {f"{name}/{task}": entry for task, entry in zip(task_names, value, strict=True)}
  return named
