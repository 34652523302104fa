"""Traced problems: values by float64 NumPy, padding, batches, what a score depends on, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.genotypes import CoreBasis
from cqd_jax.genotypes.space import coefficients, core_space, dense_space
from cqd_jax.low_rank import LowRank
from cqd_jax.tasks import Sample, TracedProblem

NAMES = ("left", "right")
LABELS = np.array([0, 1, 1, 0, 1])
HALF = np.array([0, 0, 1, 0, 1])  # 3 samples of the left task, 2 of the right one


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def data(seed=0):
  return {"inputs": draw(seed, 5, 3), "labels": LABELS, "offset": np.float32(0.25)}


DATA = {"validation": data(0), "test": data(1)}


def errors(params, data):
  """Squared errors of the two tasks: an array for each, of 3 and of 2 samples."""
  outputs = jnp.tanh(jnp.einsum("bi,io->bo", data["inputs"], params["kernel"])) + params["bias"][None] + data["offset"]
  squares = jnp.square(outputs[:, 0] - data["labels"])
  return [squares[np.flatnonzero(half == HALF)] for half in (0, 1)]


def expected_errors(params, data):
  kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
  outputs = np.tanh(np.float64(data["inputs"]) @ kernel) + bias + np.float64(data["offset"])
  squares = np.square(outputs[:, 0] - data["labels"])
  values = np.full((2, 3), np.nan)
  values[0], values[1, :2] = squares[HALF == 0], squares[HALF == 1]
  return values


def models(num=5):
  base = {"kernel": draw(10, 3, 2), "bias": draw(11, 2)}
  changes = {"kernel": draw(12, num, 3, 2), "bias": draw(13, num, 2)}
  return jax.tree.map(jnp.asarray, base), jax.tree.map(jnp.asarray, changes)


def params_of(base, changes, index):
  return jax.tree.map(lambda leaf, change: np.float64(leaf) + np.float64(change[index]), base, changes)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_values_are_those_of_numpy_padded_with_nan(split, batch_size):
  base, changes = models()
  problem = TracedProblem(errors, DATA, task_names=NAMES, batch_size=batch_size)
  scored = problem.score(split, changes, dense_space(base, changes))
  assert isinstance(scored.values, np.ndarray)
  assert scored.values.dtype == np.float32
  expected = np.stack([expected_errors(params_of(base, changes, p), DATA[split]) for p in range(5)])
  np.testing.assert_allclose(scored.values, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(np.isnan(scored.values), np.isnan(expected))
  assert scored.seconds > 0
  np.testing.assert_allclose(scored.with_scores().scores, np.nanmean(expected, axis=-1), rtol=1e-5)


def test_traced_values_in_a_scan_are_the_values():
  base, changes = models()
  space = dense_space(base, changes)
  problem = TracedProblem(errors, DATA, task_names=NAMES)

  @jax.jit
  def both(changes):
    def one(scale, _):
      scaled = jax.tree.map(lambda leaf: scale * leaf, changes)
      return scale * 2, problem.traced_values("test", scaled, space)

    return jax.lax.scan(one, jnp.float32(1), length=2)[1]

  for scale, values in zip((1, 2), both(changes), strict=True):
    alone = problem.score("test", jax.tree.map(lambda leaf, s=scale: s * leaf, changes), space)
    np.testing.assert_allclose(values, alone.values, rtol=1e-5)


def test_an_array_of_verdicts_is_values_without_padding():
  def verdicts(params, data):
    return jnp.stack([data["labels"] == 1, params["bias"][0] > data["inputs"][:, 0]])

  base, changes = models(2)
  values = TracedProblem(verdicts, DATA, task_names=NAMES).score("test", changes, dense_space(base, changes)).values
  assert values.dtype == np.float32
  for p in range(2):
    bias = np.asarray(base["bias"])[0] + np.asarray(changes["bias"])[p, 0]
    np.testing.assert_array_equal(values[p], [LABELS == 1, bias > DATA["test"]["inputs"][:, 0]])


def low_rank_root():
  """A base with a stacked and a plain kernel, and two experts of rank 1, dense and as cores."""
  base = {
    "layers": {"up": {"kernel": jnp.asarray(draw(0, 2, 4, 3))}},
    "head": {"kernel": jnp.asarray(draw(1, 4, 5)), "bias": jnp.asarray(draw(2, 5))},
  }
  changes = [
    {
      "layers": {"up": {"kernel": LowRank(jnp.asarray(draw(i, 2, 4, 1)), jnp.asarray(draw(i + 1, 2, 1, 3)))}},
      "head": {
        "kernel": LowRank(jnp.asarray(draw(i + 2, 4, 1)), jnp.asarray(draw(i + 3, 1, 5))),
        "bias": jnp.asarray(draw(i + 4, 5)),
      },
    }
    for i in (10, 20)
  ]
  return base, changes


def sums(params, data):
  """Values that see every weight, each with a factor of its own."""
  leaves = jax.tree.leaves(params)
  weighted = jnp.stack([(leaf * (1 + jnp.arange(leaf.size).reshape(leaf.shape))).sum() for leaf in leaves])
  return weighted[None] * data[:, None]


@pytest.mark.parametrize("share_base", [False, True])
def test_a_model_gets_arrays_also_where_the_base_is_shared(share_base):
  base, changes = low_rank_root()
  space = core_space(CoreBasis.from_experts(base, changes), share_base=share_base)
  problem = TracedProblem(
    sums, {"validation": np.ones(2, np.float32), "test": np.array([1, -1], np.float32)}, task_names=NAMES, batch_size=2
  )
  values = problem.score("test", space.initial, space).values
  for p, change in enumerate(changes):
    dense = jax.tree.map(
      lambda leaf: np.float64(leaf.b) @ np.float64(leaf.a) if isinstance(leaf, LowRank) else np.float64(leaf),
      change,
      is_leaf=lambda node: isinstance(node, LowRank),
    )
    params = jax.tree.leaves(jax.tree.map(lambda leaf, own: np.float64(leaf) + own, base, dense))
    weighted = np.array([(leaf * (1 + np.arange(leaf.size).reshape(leaf.shape))).sum() for leaf in params])
    np.testing.assert_allclose(values[p], [weighted, -weighted], rtol=1e-4, atol=1e-4)


def test_samples_see_one_whole_model_in_every_space():
  base, changes = low_rank_root()
  core = core_space(CoreBasis.from_experts(base, changes), share_base=True)
  merged = coefficients(core, lambda rank, make: make(), granularity="model")

  def look(params, data, count):
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, base)
    return [
      Sample(
        "left", "asked", "gold", f"{float(params['head']['bias'][0]):.3f}", 0.5, (("a", np.zeros((2, 2), np.uint8)),)
      ),
      ("right", "asked", "gold", str(count), 1.0),
    ]

  problem = TracedProblem(sums, {"validation": np.ones(2), "test": np.ones(2)}, task_names=NAMES, samples=look)
  own = merged.as_scored(jnp.array([[[0.5], [2.0]]]))
  first, second = problem.samples("test", jax.tree.map(lambda leaf: leaf[0], own), merged.scored_in, 3)
  biases = [np.float64(each["head"]["bias"])[0] for each in changes]
  assert first.answer == f"{np.float64(base['head']['bias'])[0] + 0.5 * biases[0] + 2 * biases[1]:.3f}"
  assert len(first.pictures) == 1
  assert second == Sample("right", "asked", "gold", "3", 1.0)
  none = TracedProblem(sums, {"validation": np.ones(2), "test": np.ones(2)}, task_names=NAMES)
  assert none.samples("test", jax.tree.map(lambda leaf: leaf[0], core.initial), core, 3) == ()


def parts_of(split="validation", score=errors, own=DATA, names=NAMES, **settings):
  problem = TracedProblem(score, own, task_names=names, **settings)
  return dict(part.split("=") for part in problem.fingerprint(split).split())


def test_a_fingerprint_names_tasks_score_and_data():
  before = parts_of()
  assert list(before) == ["tasks", "score", "data"]
  assert parts_of() == before
  assert parts_of(batch_size=7, samples=lambda params, data, count: []) == before  # neither changes a score
  assert parts_of("test")["data"] != before["data"]


@pytest.mark.parametrize(
  "change",
  [
    lambda own: own | {"inputs": own["inputs"] + 1},
    lambda own: own | {"inputs": own["inputs"][::-1]},
    lambda own: own | {"inputs": own["inputs"].reshape(3, 5)},
    lambda own: own | {"labels": own["labels"].astype(np.float32)},
    lambda own: own | {"more": np.zeros(1)},
    lambda own: {"others" if name == "labels" else name: leaf for name, leaf in own.items()},
  ],
)
def test_a_fingerprint_changes_with_the_data_of_its_split(change):
  before = parts_of()
  now = parts_of(own=DATA | {"validation": change(DATA["validation"])})
  assert {name for name in before if before[name] != now[name]} == {"data"}
  assert parts_of("test", own=DATA | {"validation": change(DATA["validation"])}) == parts_of("test")


def test_a_fingerprint_changes_with_the_score_and_the_tasks():
  before = parts_of()
  for change, name in (
    ({"score": functools.partial(errors)}, None),
    ({"score": functools.partial(lambda scale, *rest: errors(*rest), 2.0)}, "score"),
    ({"names": ("right", "left")}, "tasks"),
    ({"names": ("left", "wrong")}, "tasks"),
  ):
    now = parts_of(**change)
    assert {part for part in before if before[part] != now[part]} == ({name} - {None})
  assert parts_of(names=("a b", "c"))["tasks"] != parts_of(names=("a", "b c"))["tasks"]


def test_the_data_may_be_any_pytree():
  own = {"validation": [np.zeros(2), (np.ones(1),)], "test": [np.zeros(2), (np.ones(2),)]}
  assert parts_of(own=own) != parts_of("test", own=own)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"task_names": ()}, r"task_names: expected names that differ, got \(\)"),
    ({"task_names": ("a", "a")}, "task_names: expected names that differ, got"),
    ({"data": {"validation": 0}}, "data: expected the splits validation and test, test is missing"),
    ({"data": {"test": 0}}, "data: expected the splits validation and test, validation is missing"),
    ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
  ],
)
def test_what_is_missing_is_named(change, message):
  settings = {"data": DATA, "task_names": NAMES, **change}
  with pytest.raises(ValueError, match=message):
    TracedProblem(errors, settings.pop("data"), **settings)


@pytest.mark.parametrize(
  ("score", "message"),
  [
    (lambda params, data: jnp.zeros((3, 2)), r"score: expected \[K, B\] or K arrays \[B\] for 2 tasks, got shapes"),
    (lambda params, data: jnp.zeros(2), r"got shapes \[\(\), \(\)\]"),
    (lambda params, data: [jnp.zeros((1, 2)), jnp.zeros(2)], r"got shapes \[\(1, 2\), \(2,\)\]"),
  ],
)
def test_values_of_another_shape_are_refused(score, message):
  base, changes = models(1)
  problem = TracedProblem(score, DATA, task_names=NAMES)
  with pytest.raises(ValueError, match=message):
    problem.score("test", changes, dense_space(base, changes))


def test_a_split_without_data_is_named():
  base, changes = models(1)
  problem = TracedProblem(errors, DATA, task_names=NAMES)
  for ask in (problem.fingerprint, lambda split: problem.score(split, changes, dense_space(base, changes))):
    with pytest.raises(ValueError, match="split: expected one of validation, test, got 'train'"):
      ask("train")


def test_a_program_is_compiled_once_for_a_space_and_a_size(caplog):
  base, changes = models()
  space = dense_space(base, changes)
  problem = TracedProblem(errors, DATA, task_names=NAMES)
  problem.score("validation", changes, space)
  with jax.log_compiles():
    problem.score("validation", changes, space)
    problem.score("test", changes, space)
  assert "Compiling" not in caplog.text
