"""Records of runs that never ran: made by plain NumPy under the rules of MAP-Elites, batch by batch."""

import numpy as np

from cqd_jax.report.record import RunRecord, Sample
from cqd_jax.store.individuals import Individuals

NAMES = ("coding", "database", "os", "maths", "writing", "chess", "music", "law")
SWARM_SIZES = (3, 8)
NUM_CENTROIDS = 60


class Archives:
  """K archives: who holds each cell. A batch is offered at once: its best in a cell, the first of equals, may enter."""

  def __init__(self, num_tasks, edges, centroids):
    self.edges, self.centroids = edges, centroids
    self.holders = [{} for _ in range(num_tasks)]

  def bins(self, scores):
    """The grid's rule: a score on an edge belongs to the lower cell, one outside to the end cell."""
    return [
      int(np.clip(np.digitize(np.float32(score), edges, right=True) - 1, 0, len(edges) - 2))
      for score, edges in zip(scores, self.edges, strict=True)
    ]

  def cell(self, scores, archive):
    if self.edges is not None:
      return tuple(np.delete(self.bins(scores), archive).tolist())
    return int(np.square(self.centroids[archive] - np.delete(scores, archive)).sum(axis=-1).argmin())

  def offer(self, scores, identities, batch):
    """`scores` are of all so far; returns which of the batch each archive took."""
    taken = np.zeros((len(batch), len(self.holders)), bool)
    for archive, held in enumerate(self.holders):
      best = {}
      for row, one in enumerate(batch):
        if np.isfinite(scores[identities[row]]).all():
          cell = self.cell(one, archive)
          if cell not in best or one[archive] > batch[best[cell]][archive]:
            best[cell] = row
      for cell, row in best.items():
        if cell not in held or batch[row][archive] > scores[held[cell]][archive]:
          held[cell] = identities[row]
          taken[row, archive] = True
    return taken

  def num_cells(self, archive):
    if self.edges is None:
      return NUM_CENTROIDS
    return int(np.prod([len(edges) - 1 for task, edges in enumerate(self.edges) if task != archive]))

  def alive(self):
    return sorted({identity for held in self.holders for identity in held.values()})


def make_record(num_tasks=3, children=60, batch=4, finished=True, voronoi=False, seed=0):
  """A run of K experts and their children; the archive whose elites are parents changes with each batch.

  Every 29th child fails to be scored. An unfinished run has made half of its children and has no results yet.
  """
  draw = np.random.default_rng(seed)
  edges = None if voronoi else make_edges(num_tasks)
  archives = Archives(num_tasks, edges, draw.uniform(0, 0.9, (num_tasks, NUM_CENTROIDS, num_tasks - 1)))
  scores = [*np.round(expert_scores(draw, num_tasks), 2)]
  born, archive, parents, notes, mutation = ([value] * num_tasks for value in (0, -1, (-1, -1), {}, ""))
  taken = [*archives.offer(scores, range(num_tasks), scores)]
  metrics = {name: [] for name in ("coverage", "qd_score", "max_fitness", "best_mean", "num_elites", "seconds")}
  for number in range(1, -(-children // batch) + 1):
    active = (number - 1) % num_tasks
    elites = list(archives.holders[active].values())
    identities = list(range(len(scores), min(len(scores) + batch, num_tasks + children)))
    for identity in identities:
      pair = draw.choice(elites, 2).tolist()
      drawn = draw.normal(1, 0.3, (2, 1))
      parents.append(tuple(pair))
      notes.append({"weights": (drawn / drawn.sum()).tolist()})
      failed = (identity - num_tasks) % 29 == 28
      scores.append(np.full(num_tasks, np.nan) if failed else child_scores(draw, scores[pair[0]], scores[pair[1]]))
    born += [number] * len(identities)
    archive += [active] * len(identities)
    mutation += ["expert_svd 0.3"] * len(identities)
    taken += [*archives.offer(scores, identities, [scores[identity] for identity in identities])]
    for name, value in measure(archives, scores, draw).items():
      metrics[name].append(value)
  table = np.array(scores)
  alive = archives.alive()
  task_names = NAMES[:num_tasks]
  return RunRecord(
    name=f"skills-seed-{seed}",
    finished=finished,
    task_names=task_names,
    num_planned=children if finished else 2 * children,
    facts={"seed": str(seed), "device": "cpu", "questions per task": "100 validation, 300 test", "version": "0.1.0"},
    settings=f"name: skills\nseed: {seed}\nevolution:\n  children: {children}\n  candidates_per_batch: {batch}\n",
    edges=edges,
    bins=None if edges is None else np.array([archives.bins(row) for row in table]),
    individuals=Individuals(
      born=np.array(born),
      archive=np.array(archive),
      parents=np.array(parents),
      notes=notes,
      mutation=mutation,
      scores=table,
      taken=np.array(taken),
      seconds=draw.uniform(0.5, 1.5, len(table)),
    ),
    metrics={name: np.array(values) for name, values in metrics.items()} if metrics["seconds"] else {},
    rows=make_rows(draw, task_names) if finished else [],
    swarm_sizes=SWARM_SIZES,
    samples=make_samples(task_names) if finished else [],
    best=max(alive, key=lambda identity: table[identity].mean()) if alive else None,
    aggregated=[max(held.values(), key=lambda one: table[one][k]) for k, held in enumerate(archives.holders)],
  )


def make_edges(num_tasks):
  shape = 15 if num_tasks <= 3 else 6
  return [np.linspace(0, 0.9 + 0.05 * (task % 2), shape + 1).astype(np.float32) for task in range(num_tasks)]


def expert_scores(draw, num_tasks):
  """Each is good at its own task and poor at the others."""
  return draw.uniform(0.05, 0.25, (num_tasks, num_tasks)) + 0.6 * np.eye(num_tasks)


def child_scores(draw, first, second):
  """Between the parents and a little above, as a share of 100 questions."""
  between = draw.uniform(0.15, 0.85)
  mixed = between * first + (1 - between) * second
  return np.round(np.clip(mixed + draw.normal(0.02, 0.06, len(first)), 0, 1), 2)


def measure(archives, scores, draw):
  fitness = [np.array([scores[one][k] for one in held.values()]) for k, held in enumerate(archives.holders)]
  return {
    "coverage": [len(held) / archives.num_cells(k) for k, held in enumerate(archives.holders)],
    "qd_score": [float(values.sum()) for values in fitness],
    "max_fitness": [float(values.max()) for values in fitness],
    "best_mean": max(float(scores[identity].mean()) for identity in archives.alive()),
    "num_elites": len(archives.alive()),
    "seconds": float(draw.uniform(2, 6)),
  }


def make_rows(draw, task_names):
  """A row a method; one of a swarm alone, which has no scores of one model."""
  names = ["base", *(f"expert {name}" for name in task_names), "the experts together", "uniform average"]
  names += ["task arithmetic, tuned scale", "random search, per model", "CMA-ES, per kernel"]
  rows = []
  for name in [*names, "CycleQD, best elite", "CycleQD, aggregate"]:
    scores = dict(zip(task_names, np.round(draw.uniform(0.05, 0.9, len(task_names)), 3).tolist(), strict=True))
    many = name.startswith(("random", "CMA-ES", "CycleQD, best"))
    row = {"name": name, "scores": scores, "mean": float(np.mean([*scores.values()])), "minimum": min(scores.values())}
    row |= {
      "evaluations": 200 if many else 0,
      "answers": 60_000 if many else 0,
      "solved": {"3": 0.81, "8": 0.9} if many else {},
      "chosen": {},
    }
    if name == "the experts together":
      row |= {"scores": {}, "mean": None, "minimum": None, "solved": {"3": 0.88}}
    rows.append(row)
  return rows


def make_samples(task_names):
  """Four questions per task; the answers to the last of each are wrong, and of several lines."""
  samples = []
  for name in task_names:
    for number in range(1, 5):
      gold = f"def f(x):\n  return x * {number}"
      answer = gold if number < 4 else "def f(x):\n  return x & x < 3  # <b>not</b> right"
      samples.append(Sample(name, f"{name}: multiply a number by {number}", gold, answer, float(number < 4)))
  return samples
