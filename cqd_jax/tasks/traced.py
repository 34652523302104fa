"""Problems that JAX traces: any pytree with any score, without prompts, sandboxes or processes."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.checks import check_population
from cqd_jax.genotypes.space import Space, population_of_one, take
from cqd_jax.low_rank import LowRankUpdate, combine_shared, partition_shared
from cqd_jax.tasks.problem import Sample, Scored, TrainingSignal, Verified
from cqd_jax.tasks.source import source_digest
from cqd_jax.tasks.task import AskedSplit
from cqd_jax.trees import leaf_path
from cqd_jax.types import Genotype, Params


class TracedProblem:
  """A traced score of models: whole searches on it run inside `jax.lax.scan`.

  ```python
  def score(params, data):  # one model; [K, B], or K arrays [B_k] where tasks differ in size
    logits = model.apply({"params": params}, data["images"])
    return [right(logits, data["labels"])[data["half"] == k] for k in (0, 1)]


  problem = TracedProblem(score, {"validation": ..., "test": ...}, task_names=("low", "high"))
  ```

  Args:
    score: `(params, data) -> values`, of ONE model's params: float `[K, B]`, or K arrays `[B_k]`.
    data: for each split that is asked a pytree of arrays, given to `score`.
    task_names: K names.
    samples: `(params, data, count) -> samples` of one model to look at, on the host; a sample is a `Sample`, or its
      fields in order. None: there is nothing to show.
    batch_size: how many models are scored side by side; the batches follow one another. 1 takes the least memory.
    loss: `(params, data) -> losses [K]` float32 of ONE model on the split "train", for searches that follow gradients.

  Raises:
    ValueError: naming the argument: no task, a name twice, no validation or test data.
  """

  def __init__(
    self,
    score: Callable[[Params, Any], Any],
    data: Mapping[AskedSplit, Any],
    *,
    task_names: Sequence[str],
    samples: Callable[[Params, Any, int], Iterable[Any]] | None = None,
    batch_size: int = 1,
    loss: Callable[[Params, Any], Any] | None = None,
  ):
    self.task_names = tuple(task_names)
    if not self.task_names or len(set(self.task_names)) != len(self.task_names):
      raise ValueError(f"task_names: expected names that differ, got {self.task_names}")
    if missing := {"validation", "test"} - set(data):
      raise ValueError(f"data: expected the splits validation and test, {sorted(missing)[0]} is missing")
    if batch_size < 1:
      raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    self._score = score
    self._data = {split: jax.tree.map(jnp.asarray, own) for split, own in data.items()}
    self._samples = samples
    self._batch_size = batch_size
    self._loss = loss
    self._programs: dict[int, tuple[Space, Any]] = {}
    self._fingerprints: dict[AskedSplit, str] = {}

  def fingerprint(self, split: AskedSplit) -> str:
    """The function's source (with what is bound to it) and the data of the split."""
    if split not in self._fingerprints:
      digest = hashlib.sha256()
      for path, leaf in jax.tree.leaves_with_path(self._of(split)):
        array = np.asarray(leaf)
        digest.update(f"{leaf_path(path)}{array.dtype}{array.shape}".encode() + array.tobytes())
      tasks = hashlib.sha256("\0".join(self.task_names).encode()).hexdigest()[:16]
      self._fingerprints[split] = f"tasks={tasks} score={source_digest(self._score)} data={digest.hexdigest()[:16]}"
    return self._fingerprints[split]

  def traced_values(self, split: AskedSplit, individuals: Genotype, space: Space) -> jax.Array:
    """Values `[P, K, B]` float32 of P individuals; NaN pads tasks with fewer samples."""
    return self._values(individuals, self._of(split), space)

  def score(self, split: AskedSplit, individuals: Genotype, space: Space) -> Scored:
    """See `Problem`. Programs are compiled once for each space and number of individuals."""
    import time

    started = time.perf_counter()
    if id(space) not in self._programs:
      compiled = jax.jit(lambda genotypes, data: self._values(genotypes, data, space))
      self._programs[id(space)] = (space, compiled)  # the space is kept, lest its number be given to another
    values = np.asarray(self._programs[id(space)][1](individuals, self._of(split)))
    return Scored(values, time.perf_counter() - started)

  def samples(self, split: AskedSplit, individual: Genotype, space: Space, count: int) -> Sequence[Sample]:
    """See `Problem`."""
    if self._samples is None:
      return ()
    params = take(_written_out(space.materialize(population_of_one(individual))), 0)
    found = self._samples(params, self._of(split), count)
    return [each if isinstance(each, Sample) else Sample(*each) for each in found]

  def training_signal(self, answers: Sequence[Verified]) -> TrainingSignal:
    """See `Trainable`: the loss on all training data.

    Raises:
      ValueError: if the problem was made without a loss, or without training data.
    """
    del answers
    if self._loss is None:
      raise ValueError("loss: this problem was made without one, so there is no gradient to follow")
    own_loss = self._loss

    def loss(params: Params, batch: Any) -> Any:
      own, shared = partition_shared(params)
      return own_loss(take(_written_out(combine_shared(population_of_one(own), shared)), 0), batch)

    return TrainingSignal(self._of("train"), lambda key, data: data, loss)

  def _values(self, individuals: Genotype, data: Any, space: Space) -> jax.Array:
    size = check_population(individuals, "individuals")

    def one(genotype: Genotype) -> jax.Array:
      params = take(_written_out(space.materialize(population_of_one(genotype))), 0)
      return self._padded(self._score(params, data))

    values: jax.Array = jax.lax.map(one, individuals, batch_size=min(self._batch_size, size))
    return values

  def _padded(self, values: Any) -> jax.Array:
    """What `score` gave as float32 `[K, B]`."""
    rows = list(values)
    if len(rows) != len(self.task_names) or any(jnp.ndim(row) != 1 for row in rows):
      shapes = [jnp.shape(row) for row in rows]
      raise ValueError(f"score: expected [K, B] or K arrays [B] for {len(self.task_names)} tasks, got shapes {shapes}")
    most = max(row.shape[0] for row in rows)
    return jnp.stack(
      [jnp.pad(row.astype(jnp.float32), (0, most - row.shape[0]), constant_values=jnp.nan) for row in rows]
    )

  def _of(self, split: AskedSplit) -> Any:
    if split not in self._data:
      raise ValueError(f"split: expected one of {', '.join(self._data)}, got {split!r}")
    return self._data[split]


def _written_out(params: Params) -> Params:
  """A population's params without shared bases: a user's own model knows arrays only."""

  def write(leaf: Any) -> Any:
    if not isinstance(leaf, LowRankUpdate):
      return leaf
    change = leaf.left[None] @ leaf.core.astype(leaf.left.dtype) @ leaf.right.mT[None]
    return leaf.kernel[None] + change.astype(leaf.kernel.dtype)

  return jax.tree.map(write, params, is_leaf=lambda node: isinstance(node, LowRankUpdate))
