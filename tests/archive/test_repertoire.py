"""The repertoire against a model in plain Python: K dicts, one individual after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.containers.mapelites_repertoire import MapElitesRepertoire
from qdax.core.emitters.repertoire_selectors.uniform_selector import UniformSelector

from cqd_jax.archive import Centroids, CyclingRepertoire, Grid, coverage, holders, max_fitness, qd_score
from cqd_jax.archive import repertoire as repertoire_module

GRID = Grid(lower=[0.0] * 3, upper=[1.0] * 3, shape=(3, 4, 5))


class Model:
  """K dicts from cell to (fitness, individual), filled by the rules of the paper."""

  def __init__(self, cells, num_tasks):
    self.index, self.archives = jax.jit(cells.index), [{} for _ in range(num_tasks)]

  def add(self, names, scores):
    """Takes a batch: refuses what is not finite, then each cell takes its best, the first of equals."""
    scores = np.asarray(scores, np.float32)
    index = np.asarray(self.index(scores))
    for archive, elites in enumerate(self.archives):
      best = {}
      for row, name in enumerate(names):
        if not np.isfinite(scores[row]).all():
          continue
        cell, fitness = int(index[row, archive]), scores[row, archive]
        if cell not in best or fitness > best[cell][0]:
          best[cell] = (fitness, name)
      for cell, (fitness, name) in best.items():
        if cell not in elites or fitness > elites[cell][0]:
          elites[cell] = (fitness, name)


def contents(repertoire):
  """The K dicts that a repertoire stands for, individuals named by their identity."""
  slots, scores = np.asarray(repertoire.slots), np.asarray(repertoire.scores)
  identity = np.asarray(repertoire.lineage.identity)
  return [
    {cell: (scores[slot, archive], identity[slot]) for cell, slot in enumerate(row) if slot >= 0}
    for archive, row in enumerate(slots)
  ]


def check_pool(repertoire):
  """No slot is lost or held twice, each elite is what its identity says, and the figures agree."""
  slots, held = np.asarray(repertoire.slots), np.asarray(repertoire.held)
  num_free = int(repertoire.num_free)
  free = np.asarray(repertoire.free)[:num_free]
  used = np.unique(slots[slots >= 0])
  assert sorted([*free, *used]) == list(range(repertoire.capacity))
  for archive in range(repertoire.num_tasks):
    elites = slots[archive][slots[archive] >= 0]
    assert len(elites) == len(set(elites))
    np.testing.assert_array_equal(np.flatnonzero(held[:, archive]), np.sort(elites))
  assert int(repertoire.num_elites) == len(used)
  # The genotype was made from the identity, so a slot that mixes two individuals shows.
  identity = np.asarray(repertoire.lineage.identity)[used]
  np.testing.assert_array_equal(np.asarray(repertoire.genotypes["w"])[used, 0, 0], identity)
  np.testing.assert_array_equal(np.asarray(repertoire.genotypes["b"], np.float32)[used], -(identity % 128))
  np.testing.assert_array_equal(np.asarray(repertoire.extra_scores["seconds"])[used], identity / 2)


def batch_of(names, scores):
  names = np.asarray(names, np.float32)
  genotypes = {
    "w": jnp.broadcast_to(jnp.asarray(names)[:, None, None], (len(names), 2, 3)),
    "b": jnp.asarray(-(names % 128), jnp.bfloat16),
  }
  return {
    "genotypes": genotypes,
    "scores": jnp.asarray(scores, jnp.float32),
    "extra_scores": {"seconds": jnp.asarray(names / 2), "unkept": jnp.asarray(names)},
  }


def without_unkept(batch):
  return {**batch, "extra_scores": {"seconds": batch["extra_scores"]["seconds"]}}


def random_scores(generator, size, num_tasks):
  """Coarse scores, so that cells collide and fitnesses tie; some outside the grid, some not finite."""
  scores = np.round(generator.uniform(-0.1, 1.1, (size, num_tasks)) * 16) / 16
  spoilt = generator.uniform(size=scores.shape) < 0.02
  scores[spoilt] = generator.choice([np.nan, np.inf, -np.inf], spoilt.sum())
  return scores


@pytest.mark.parametrize(
  ("cells", "capacity", "batch_size", "num_batches"),
  [
    (GRID, None, 7, 50),
    (GRID, 9, 7, 30),
    (Grid(lower=[0.0] * 2, upper=[1.0] * 2, shape=(6, 6)), None, 1, 150),
    (Grid(lower=[0.0] * 8, upper=[1.0] * 8, shape=(2,) * 8), None, 40, 25),
    (Grid(lower=[0.0] * 3, upper=[1.0] * 3, shape=(20, 20, 20)), 3, 1, 60),  # insertion by sorting
    ("cvt", 30, 16, 40),
  ],
)
def test_long_random_runs_equal_the_model(cells, capacity, batch_size, num_batches):
  if cells == "cvt":
    cells = Centroids.cvt(jax.random.key(3), num_cells=20, lower=[0.0] * 5, upper=[1.0] * 5)
  generator = np.random.default_rng(11)
  model = Model(cells, cells.num_tasks)
  scores = random_scores(generator, batch_size, cells.num_tasks)
  first = without_unkept(batch_of(np.arange(batch_size), scores))
  repertoire = CyclingRepertoire.init(**first, cells=cells, capacity=capacity)
  model.add(range(batch_size), scores)
  rejected = (~np.isfinite(scores)).any(axis=1).sum()
  for step in range(1, num_batches):
    names = np.arange(step * batch_size, (step + 1) * batch_size)
    scores = random_scores(generator, batch_size, cells.num_tasks)
    repertoire = repertoire.add(**batch_of(names, scores), donate=step % 2 == 0)
    model.add(names, scores)
    rejected += (~np.isfinite(scores)).any(axis=1).sum()
    assert contents(repertoire) == model.archives
    check_pool(repertoire)
  assert rejected > 0
  assert int(repertoire.num_rejected) == rejected
  assert int(repertoire.num_dropped) == 0
  assert int(repertoire.num_offered) == batch_size * num_batches
  sizes = [len(archive) for archive in model.archives]
  np.testing.assert_allclose(coverage(repertoire), np.divide(sizes, cells.num_cells), rtol=1e-6)
  fitnesses = [[fitness for fitness, _ in archive.values()] for archive in model.archives]
  np.testing.assert_allclose(qd_score(repertoire), [sum(map(float, f)) for f in fitnesses], rtol=1e-5)
  offset = [sum(float(x) + 1 for x in f) for f in fitnesses]
  np.testing.assert_allclose(qd_score(repertoire, offset=-1.0), offset, rtol=1e-5)
  np.testing.assert_array_equal(max_fitness(repertoire), [max(f) for f in fitnesses])
  np.testing.assert_array_equal(repertoire.fitnesses.max(axis=1), [max(f) for f in fitnesses])


def test_order_within_a_batch_does_not_matter_without_ties():
  generator = np.random.default_rng(0)
  scores = generator.uniform(size=(64, 3))
  order = generator.permutation(64)
  one = CyclingRepertoire.init({"w": jnp.asarray(scores, jnp.float32)}, scores, GRID)
  two = CyclingRepertoire.init({"w": jnp.asarray(scores[order], jnp.float32)}, scores[order], GRID)
  for archive in range(3):
    first, second = one.archive(archive), two.archive(archive)
    np.testing.assert_array_equal(first.fitnesses, second.fitnesses)
    np.testing.assert_array_equal(first.genotypes["w"], second.genotypes["w"])


def test_a_tie_goes_to_the_lowest_index_and_an_incumbent_stays_on_equality():
  scores = np.full((4, 3), 0.5)
  repertoire = CyclingRepertoire.init({"w": jnp.arange(4.0)}, scores, GRID)
  assert int(repertoire.num_elites) == 1
  assert int(repertoire.best(0).lineage.identity) == 0
  repertoire = repertoire.add({"w": jnp.arange(4.0) + 10}, scores)
  assert [int(repertoire.best(k).lineage.identity) for k in range(3)] == [0, 0, 0]
  better = repertoire.add({"w": jnp.arange(4.0) + 20}, np.full((4, 3), np.nextafter(np.float32(0.5), 1)))
  assert float(better.best(1).genotype["w"]) == 20.0


def test_a_good_child_that_shares_a_cell_and_batch_with_nan_enters():
  scores = np.array([[np.nan, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, np.inf, 0.5]])
  repertoire = CyclingRepertoire.init({"w": jnp.arange(3.0)}, scores, GRID)
  assert [float(repertoire.best(k).genotype["w"]) for k in range(3)] == [1.0, 1.0, 1.0]
  assert int(repertoire.num_rejected) == 2


@pytest.mark.parametrize("num_cells", [5, 4000])
def test_both_rules_for_the_best_of_a_cell_agree(num_cells):
  generator = np.random.default_rng(5)
  cells = jnp.asarray(generator.integers(0, num_cells, 300) % 37, jnp.int32)
  scores = jnp.asarray(generator.integers(0, 6, 300), jnp.float32)
  contends = jnp.asarray(generator.uniform(size=300) < 0.7)
  arguments = (cells, scores, contends, num_cells)
  np.testing.assert_array_equal(
    repertoire_module._first_of_best_by_scatter(*arguments), repertoire_module._first_of_best_by_sort(*arguments)
  )


def test_a_scan_gives_what_single_calls_give_and_nothing_is_compiled_twice(caplog):
  generator = np.random.default_rng(2)
  scores = jnp.asarray(generator.uniform(size=(12, 5, 3)), jnp.float32)
  start = CyclingRepertoire.init({"w": jnp.zeros((5, 2))}, scores[0], GRID)

  def step(repertoire, batch):
    return repertoire.add({"w": jnp.broadcast_to(batch[:, :1], (5, 2))}, batch), None

  scanned, _ = jax.lax.scan(step, start, scores)
  repertoire = start.add({"w": jnp.zeros((5, 2))}, jnp.zeros((5, 3)) - 1)  # compiles; every cell it takes is retaken
  repertoire = start
  with jax.log_compiles():
    for batch in scores:
      repertoire, _ = step(repertoire, batch)
  assert "Finished XLA compilation of jit(_insert_batch)" not in caplog.text
  jax.tree.map(np.testing.assert_array_equal, scanned, repertoire)


def test_donation_writes_into_the_old_pool_and_copies_nothing():
  repertoire = CyclingRepertoire.init({"w": jnp.zeros((4, 1000))}, np.random.default_rng(0).uniform(size=(4, 3)), GRID)
  pool = repertoire.genotypes["w"]
  pointer = pool.unsafe_buffer_pointer()
  after = repertoire.add({"w": jnp.ones((4, 1000))}, np.random.default_rng(1).uniform(size=(4, 3)), donate=True)
  assert pool.is_deleted()
  assert after.genotypes["w"].unsafe_buffer_pointer() == pointer
  compiled = (
    repertoire_module._insert_donating.lower(
      after, {"w": jnp.ones((4, 1000))}, jnp.zeros((4, 3)), {}, jnp.zeros((4, 2), jnp.int32)
    )
    .compile()
    .memory_analysis()
  )
  assert compiled.temp_size_in_bytes < 40_000  # the batch is 16,000 bytes, the pool 540,000


def test_without_donation_the_old_repertoire_stays_as_it_was():
  repertoire = CyclingRepertoire.init({"w": jnp.zeros(2)}, np.full((2, 3), 0.1), GRID)
  repertoire.add({"w": jnp.ones(2)}, np.full((2, 3), 0.9))
  assert int(repertoire.num_elites) == 1
  assert float(repertoire.best().genotype["w"]) == 0.0


def test_a_small_pool_grows_and_keeps_all():
  generator = np.random.default_rng(4)
  scores = generator.uniform(size=(20, 3))
  large = CyclingRepertoire.init({"w": jnp.arange(20.0)}, scores, GRID)
  small = CyclingRepertoire.init({"w": jnp.arange(20.0)[:1]}, scores[:1], GRID, capacity=1)
  for row in range(1, 20):
    small = small.add({"w": jnp.arange(20.0)[row : row + 1]}, scores[row : row + 1])
  assert small.capacity <= sum(GRID.num_cells)
  for archive in range(3):
    np.testing.assert_array_equal(large.archive(archive).genotypes["w"], small.archive(archive).genotypes["w"])


def test_a_traced_add_to_a_full_small_pool_counts_what_it_drops_and_keeps_the_elites():
  scores = np.array([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1]])
  repertoire = CyclingRepertoire.init({"w": jnp.arange(2.0)}, scores, GRID, capacity=2)
  more = jnp.array([[0.1, 0.1, 0.95]], jnp.float32)
  after = jax.jit(lambda r: r.add({"w": jnp.full(1, 5.0)}, more))(repertoire)
  assert int(after.num_dropped) == 1
  jax.tree.map(np.testing.assert_array_equal, contents(after), contents(repertoire))


@pytest.mark.usefixtures("qdax_ranks")
def test_archive_is_an_ordinary_qdax_repertoire():
  generator = np.random.default_rng(9)
  scores = generator.uniform(size=(30, 3)).astype(np.float32)
  seconds = jnp.arange(30.0)
  repertoire = CyclingRepertoire.init({"w": jnp.asarray(scores)}, scores, GRID, extra_scores={"seconds": seconds})
  traced_archive = jax.jit(lambda r, k: r.archive(k))
  select = jax.jit(lambda archive, key: archive.select(key, 8, UniformSelector()))
  add = jax.jit(
    lambda archive: archive.add(archive.genotypes, archive.descriptors, archive.fitnesses[:, 0], archive.extra_scores)
  )
  for k in range(3):
    archive = repertoire.archive(k)
    assert isinstance(archive, MapElitesRepertoire)
    n = GRID.num_cells[k]
    assert archive.fitnesses.shape == (n, 1)
    assert archive.centroids.shape == archive.descriptors.shape == (n, 2)
    occupied = np.asarray(archive.fitnesses[:, 0]) > -np.inf
    genotypes, fitnesses = np.asarray(archive.genotypes["w"]), np.asarray(archive.fitnesses)
    np.testing.assert_array_equal(genotypes[occupied, k], fitnesses[occupied, 0])
    np.testing.assert_array_equal(np.delete(genotypes[occupied], k, axis=1), np.asarray(archive.descriptors)[occupied])
    assert not genotypes[~occupied].any()
    sample = select(archive, jax.random.key(0))
    assert (np.asarray(sample.fitnesses) > -np.inf).all()
    assert add(archive).fitnesses.shape == (n, 1)
    traced = traced_archive(repertoire, jnp.int32(k))
    np.testing.assert_array_equal(traced.fitnesses[:n], archive.fitnesses)
    np.testing.assert_array_equal(traced.descriptors[:n], archive.descriptors)


def test_select_draws_every_distinct_elite_and_no_other():
  scores = np.random.default_rng(3).uniform(size=(6, 3))
  repertoire = CyclingRepertoire.init({"w": jnp.arange(6.0)}, scores, GRID)
  alive = set(np.asarray(repertoire.genotypes["w"])[np.asarray(repertoire.alive)].tolist())
  drawn = repertoire.select(jax.random.key(0), 400).genotypes["w"]
  assert set(np.asarray(drawn).tolist()) == alive  # misses one of 6 with probability below 6 * (5/6)^400


def test_lineage_names_parents_and_birth():
  repertoire = CyclingRepertoire.init({"w": jnp.zeros(2)}, np.array([[0.9, 0, 0], [0, 0.9, 0]]), GRID)
  repertoire = repertoire.add({"w": jnp.ones(1)}, np.full((1, 3), 0.95), parents=jnp.array([[1, 0]]))
  child = repertoire.best(2)
  assert int(child.lineage.identity) == 2
  np.testing.assert_array_equal(child.lineage.parents, [1, 0])
  assert int(child.lineage.born) == 1
  np.testing.assert_array_equal(repertoire.individual(0).lineage.parents, [-1, -1])


def test_best_finds_the_best_mean_and_the_best_of_each_archive():
  scores = np.array([[0.9, 0.1, 0.1], [0.6, 0.6, 0.6], [0.1, 0.8, 0.2]])
  repertoire = CyclingRepertoire.init({"w": jnp.arange(3.0)}, scores, GRID)
  assert float(repertoire.best().genotype["w"]) == 1.0
  assert [float(repertoire.best(k).genotype["w"]) for k in range(3)] == [0.0, 2.0, 1.0]


def test_an_empty_repertoire_has_no_best():
  empty = CyclingRepertoire.init({"w": jnp.zeros((0, 2))}, np.zeros((0, 3)), GRID)
  assert int(empty.num_elites) == 0
  assert (np.asarray(empty.fitnesses) == -np.inf).all()
  with pytest.raises(ValueError, match="empty"):
    empty.best()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"scores": np.zeros((2, 4))}, r"scores: expected shape \(2, 3\), got \(2, 4\)"),
    ({"scores": np.zeros((3, 3))}, r"scores: expected shape \(2, 3\)"),
    ({"genotypes": {"w": jnp.zeros((2, 5))}}, r"genotypes\['w'\]: expected float32\[P, 4\]"),
    ({"genotypes": {"w": jnp.zeros((2, 4), jnp.bfloat16)}}, "got bfloat16"),
    ({"genotypes": {"v": jnp.zeros((2, 4))}}, "genotypes: expected the structure"),
    ({"extra_scores": {}}, r"extra_scores: misses \['seconds'\]"),
    ({"extra_scores": {"seconds": jnp.zeros(3)}}, "extra_scores"),
    ({"parents": jnp.zeros((2, 3), jnp.int32)}, r"parents: expected shape \(2, 2\)"),
  ],
)
def test_a_batch_that_does_not_fit_is_refused_by_name(change, message):
  repertoire = CyclingRepertoire.init(
    {"w": jnp.zeros((2, 4))}, np.zeros((2, 3)), GRID, extra_scores={"seconds": jnp.zeros(2)}
  )
  batch = {"genotypes": {"w": jnp.zeros((2, 4))}, "scores": np.zeros((2, 3)), "extra_scores": {"seconds": jnp.zeros(2)}}
  with pytest.raises(ValueError, match=message):
    repertoire.add(**{**batch, **change})


def test_archive_out_of_range_is_refused():
  repertoire = CyclingRepertoire.init({"w": jnp.zeros(1)}, np.zeros((1, 3)), GRID)
  with pytest.raises(ValueError, match="k: expected 0 <= k < 3, got 3"):
    repertoire.archive(3)


def test_numpy_arrays_are_taken_in_any_dtype():
  generator = np.random.default_rng(0)
  scores = generator.uniform(size=(4, 3))
  genotypes, extra_scores = {"w": generator.uniform(size=(4, 2))}, {"answers": np.arange(4)}
  repertoire = CyclingRepertoire.init(genotypes, scores, GRID, extra_scores=extra_scores)
  again = repertoire.add(genotypes, scores, extra_scores=extra_scores, parents=np.zeros((4, 2), int))
  np.testing.assert_array_equal(again.slots, repertoire.slots)
  best = again.best(np.int64(1))
  np.testing.assert_array_equal(best.genotype["w"], genotypes["w"][scores[:, 1].argmax()].astype(np.float32))
  assert int(best.extra_scores["answers"]) == scores[:, 1].argmax()


def test_several_repertoires_at_once_by_vmap():
  scores = jnp.asarray(np.random.default_rng(0).uniform(size=(5, 4, 3)), jnp.float32)
  genotypes = {"w": jnp.arange(20.0).reshape(5, 4)}
  many = jax.vmap(lambda g, s: CyclingRepertoire.init(g, s, GRID).add(g, s + 0.1))(genotypes, scores)
  for run in range(5):
    own = {"w": genotypes["w"][run]}
    one = CyclingRepertoire.init(own, scores[run], GRID).add(own, scores[run] + 0.1)
    np.testing.assert_array_equal(many.slots[run], one.slots)


def test_the_best_of_an_archive_that_is_not_there_is_refused():
  repertoire = CyclingRepertoire.init({"w": jnp.arange(2.0)}, np.full((2, 3), 0.5), GRID)
  with pytest.raises(ValueError, match="k: expected 0 <= k < 3, got 3"):
    repertoire.best(3)


def test_holders_are_the_archives_that_hold_an_individual_now():
  """Against the slots, while individuals come, are ousted, and their slots are used again."""
  grid = Grid(lower=[0.0] * 3, upper=[1.0] * 3, shape=(3, 3, 3))
  generator = np.random.default_rng(0)
  repertoire = CyclingRepertoire.init({"w": jnp.zeros(5)}, generator.uniform(size=(5, 3)), grid)
  find = jax.jit(holders)
  for batch in range(12):
    repertoire = repertoire.add(
      genotypes={"w": jnp.zeros(8)}, scores=generator.uniform(size=(8, 3)) ** (1 / (1 + batch))
    )
    everyone = jnp.arange(int(repertoire.num_offered) + 3)  # three that never were
    slots, identity = np.asarray(repertoire.slots), np.asarray(repertoire.lineage.identity)
    held = [set(identity[row[row >= 0]].tolist()) for row in slots]
    expected = [[one in archive for archive in held] for one in range(len(everyone))]
    np.testing.assert_array_equal(find(repertoire, everyone), expected)
