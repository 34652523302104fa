"""Who teaches in a run: distilling goes on to the bit, members of the swarm are asked once, labels are theirs."""

import jax.numpy as jnp
import numpy as np
import pytest
from loop_cases import Plain, PowerCut, equal, method_of, root_space, run_context, told

from cqd_jax.genotypes.space import coefficients
from cqd_jax.run.loop import Loop
from cqd_jax.search import Population
from cqd_jax.tasks import TracedProblem, TrainingSignal, Verified, task_scores

pytestmark = pytest.mark.usefixtures("qdax_ranks")

DISTILL = {"use": "distill", "scales": [0.5, 1.0], "steps": 5, "validate_every": 1, "learning_rate": 0.1}


def loss(params, batch):
  return jnp.stack(
    [jnp.square(params["Dense_0"]["kernel"] - batch).mean(), jnp.square(params["Dense_0"]["bias"]).mean()]
  )


class Learnable(Plain):
  """With labels of one kind: the answers are texts that name who answered; learned are the answers that were found."""

  def __init__(self, cut_at=None):
    super().__init__(cut_at)
    self.learned = None

  def score(self, split, individuals, space):
    scored = super().score(split, individuals, space)
    kernels = np.asarray(space.materialize(individuals)["Dense_0"]["kernel"])
    verified = [
      [Verified(k, b, (f"{kernel[0, 0]:.4f}",)) for k, b in np.argwhere(own).tolist()]
      for own, kernel in zip(scored.values, kernels, strict=True)
    ]
    return scored._replace(verified=verified)

  def references(self, split):
    return [Verified(0, 0, (f"gold of {split}",))]

  def training_signal(self, answers):
    self.learned = list(answers)
    return TrainingSignal(jnp.float32(len(self.learned) / 100), lambda key, data: data, loss)


def run(path, problem, labels="swarm", **settings):
  with run_context(path, problem, budget=8) as context:
    first = Loop(context, method_of({"use": "random_search", "batch_size": 4, "genotype": "coefficients"})).run()
    context.teachers.swarm = first.population(), first.space
    second = Loop(context, method_of({**DISTILL, "labels": labels, "members": 3, **settings}), first=False).run()
  return first, second


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  problem = Learnable()
  path = tmp_path_factory.mktemp("teachers") / "run"
  first, second = run(path, problem)
  return problem, first, second.population(), told(path, "distill")


def test_experts_and_complementary_members_are_asked_once(undisturbed):
  problem, first, population, _ = undisturbed
  assert [size for split, size in problem.asked if split == "labels"] == [1] * (2 + 3)
  assert len(problem.asked) == len(set(map(str, enumerate(problem.asked))))
  values = np.asarray(first.population().values).reshape(8, -1)
  best = int(values.sum(axis=1).argmax())
  teachers = jnp.concatenate([first.space.experts, first.population().genotypes[best][None]])
  space = first.space
  own = problem.score("labels", space.as_scored(teachers), space.scored_in).verified
  assert {answer for answers in own for answer in answers} <= set(problem.learned)
  assert [(answer.task, answer.sample) for answer in problem.learned] == sorted(
    (answer.task, answer.sample) for answer in problem.learned
  )
  assert population.chosen["steps"] <= 5


@pytest.mark.parametrize("cut_at", [4, 8, 12])
def test_who_loses_power_goes_on_to_the_bit(undisturbed, tmp_path, cut_at):
  """In the middle of the first method, of asking the teachers, and of the steps."""
  with pytest.raises(PowerCut):
    run(tmp_path / "run", Learnable(cut_at))
  after = Learnable()
  _, second = run(tmp_path / "run", after)
  equal(second.population()._asdict(), undisturbed[2]._asdict())
  equal(told(tmp_path / "run", "distill"), undisturbed[3])
  assert after.learned == undisturbed[0].learned


def test_labels_may_be_of_experts_or_references_only(tmp_path):
  problem = Learnable()
  run(tmp_path / "run", problem, labels="experts")
  assert [size for split, size in problem.asked if split == "labels"] == [1, 1]
  run(tmp_path / "other", problem, labels="references")
  assert problem.learned == [Verified(0, 0, ("gold of labels",))]


def test_the_average_is_of_the_best_on_validation(tmp_path):
  with run_context(tmp_path / "run", Learnable(), budget=8) as context:
    space = coefficients(root_space(), context.keep_basis, granularity="model")
    numbers = np.random.default_rng(0).normal(size=(4, 2, 1)).astype(np.float32)
    values = np.random.default_rng(1).uniform(size=(4, 2, 5)).astype(np.float32)
    values[2] = np.nan
    context.teachers.swarm = Population(jnp.asarray(numbers), values, np.arange(4), task_scores(values)), space
    found = context.teachers.average_of_swarm(root_space(), 2)
    best = np.argsort(-np.nan_to_num(values.mean(axis=(1, 2)), nan=-1))[:2]
    mean = numbers[best, :, 0].mean(axis=0)
    experts = root_space().experts["Dense_0"]["kernel"]
    np.testing.assert_allclose(
      found["Dense_0"]["kernel"], mean[0] * experts[0] + mean[1] * experts[1], rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="start: the swarm's individuals are dense, which cannot be written as coeff"):
      context.teachers.average_of_swarm(space, 2)


def test_a_problem_without_gradients_is_refused_before_anything_is_scored(tmp_path):
  problem = Plain()
  refused = pytest.raises(ValueError, match="labels: Plain has no training signal")
  with run_context(tmp_path / "run", problem) as context, refused:
    Loop(context, method_of({**DISTILL, "labels": "experts"}))
  assert problem.asked == []
  data = {"validation": np.zeros(1), "test": np.zeros(1)}
  lossless = TracedProblem(lambda params, data: jnp.zeros((2, 1)), data, task_names=("left", "right"))
  refused = pytest.raises(ValueError, match="loss: this problem was made without one")
  with run_context(tmp_path / "other", lossless) as context, refused:
    Loop(context, method_of({**DISTILL, "labels": "experts"})).run()
