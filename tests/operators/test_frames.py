import functools
import itertools

import jax
import pytest

from cqd_jax import operators
from cqd_jax.operators import check_frame, frame_of, needs_frame

ORDER = ["linear", "inner_product", "elementwise"]


def operator_of(frame):
  def shrink(key, task_vector):
    return task_vector

  return needs_frame(frame)(shrink)


def test_marking_changes_nothing_but_the_attribute():
  def shrink(key, task_vector):
    return task_vector

  assert needs_frame("elementwise")(shrink) is shrink
  assert shrink.frame == "elementwise"


@pytest.mark.parametrize("frame", ORDER)
def test_the_frame_is_seen_through_settings_and_jit(frame):
  operator = operator_of(frame)
  assert frame_of(operator) == frame
  assert frame_of(functools.partial(functools.partial(operator, key=1), task_vector=2)) == frame
  assert frame_of(jax.jit(operator)) == frame
  assert frame_of(functools.partial(jax.jit(operator), key=1)) == frame


def test_a_function_that_does_not_say_fits_everywhere():
  assert frame_of(lambda key, task_vector: task_vector) is None
  for frame in ORDER:
    check_frame(functools.partial(lambda key, task_vector: task_vector, 1), "core", frame, "mutation")


@pytest.mark.parametrize(("needed", "offered"), list(itertools.product(ORDER, ORDER)))
def test_a_space_admits_what_needs_no_more_than_it_offers(needed, offered):
  operator = functools.partial(operator_of(needed), task_vector=None)
  if ORDER.index(needed) <= ORDER.index(offered):
    check_frame(operator, "somewhere", offered, "mutation")
    return
  with pytest.raises(ValueError, match=f"mutation shrink: {needed}.* somewhere .{offered}"):
    check_frame(operator, "somewhere", offered, "mutation")


def test_the_refusal_says_what_to_do():
  with pytest.raises(ValueError, match=r"use evolution\.genotype dense$"):
    check_frame(operator_of("elementwise"), "core", "inner_product", "crossover")
  with pytest.raises(ValueError, match=r"use evolution\.genotype dense or core$"):
    check_frame(operator_of("inner_product"), "coefficients", "linear", "crossover")


def test_an_object_that_is_called_may_say_its_frame_too():
  class Shrink:
    frame = "elementwise"

    def __call__(self, key, task_vector):
      return task_vector

  with pytest.raises(ValueError, match="crossover Shrink: elementwise"):
    check_frame(Shrink(), "core", "inner_product", "crossover")


def test_unknown_frames_are_refused():
  # beartype would refuse the word before we do; users run without it
  mark = getattr(needs_frame, "__wrapped__", needs_frame)
  with pytest.raises(ValueError, match="frame: expected one of linear, inner_product, elementwise, got 'polar'"):
    mark("polar")

  def shrink(key, task_vector):
    return task_vector

  shrink.frame = "polar"
  with pytest.raises(ValueError, match=r"shrink\.frame: expected one of"):
    frame_of(shrink)


@pytest.mark.parametrize(
  ("frame", "names"),
  [
    ("linear", ["linear_merge", "gaussian_mutation", "aggregate", "task_arithmetic", "uniform_average"]),
    ("inner_product", ["svd_mutation", "expert_svd_mutation"]),
  ],
)
def test_the_frames_of_the_operators(frame, names):
  assert {frame_of(getattr(operators, name)) for name in names} == {frame}
