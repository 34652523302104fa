"""Every method is made once from a tiny model, so that what cannot work is refused before anything is scored."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cqd_jax.config.settings import ConfigError, ExperimentSettings
from cqd_jax.engines.text_interface import TextInterface
from cqd_jax.genotypes import CoreBasis
from cqd_jax.genotypes.space import Space, core_space, dense_space
from cqd_jax.models import DecoderConfig, init_params
from cqd_jax.run.context import Method
from cqd_jax.run.methods import methods_of
from cqd_jax.run.text_run import reads_in_core
from cqd_jax.search.algorithm import SearchContext


class Work(NamedTuple):
  """What a method will ask for.

  Attributes:
    budget: individuals to be scored on validation.
    teachers: individuals that answer the training questions whose answers are learned.
  """

  budget: int
  teachers: int


def rehearse(settings: ExperimentSettings, interface: TextInterface, num_tasks: int) -> list[Work]:
  """Makes each method, from random experts of a model with the same parts in tiny; returns what each will ask for.

  Raises:
    ConfigError: naming the method, and the setting that cannot be used.
  """
  num_experts = len(settings.experts) or num_tasks
  in_core = settings.base is not None and reads_in_core(settings) is not None
  root = _tiny_root(interface.config, num_experts, in_core=in_core)
  names = tuple(f"task {number}" for number in range(num_tasks))
  context = SearchContext(root, lambda rank, make: make(), names, settings.evolution.children)
  work = []
  for index, method in enumerate(methods_of(settings)):
    try:
      work.append(_make(method, dataclasses.replace(context, first=index == 0)))
    except ValueError as error:
      raise ConfigError(f"{method.name}: {error}") from error
  return work


def _make(method: Method, context: SearchContext) -> Work:
  """Makes a method by tracing alone, which compiles nothing; one that needs to see numbers is made with them."""
  work = []

  def trace() -> int:
    algorithm = method.make(context)
    work.append(Work(int(getattr(algorithm, "budget", context.budget)), int(getattr(algorithm, "num_teachers", 0))))
    return 0

  try:
    jax.eval_shape(trace)
  except (jax.errors.JAXTypeError, jax.errors.UnexpectedTracerError):
    trace()
  return work[-1]


def _tiny_root(config: DecoderConfig, num_experts: int, *, in_core: bool) -> Space:
  """Experts of a model with one layer; drawn by NumPy, since JAX would compile a program for each shape."""
  tiny = dataclasses.replace(
    config,
    vocab_size=4,
    hidden_size=4,
    intermediate_size=4,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    rope_scaling=None,
  )
  shapes = jax.eval_shape(lambda key: init_params(key, tiny), jax.random.key(0))
  numbers = np.random.default_rng(0)

  def draw(*shape: int) -> jax.Array:
    return jnp.asarray(numbers.standard_normal(shape, np.float32))

  base = jax.tree.map(lambda leaf: draw(*leaf.shape), shapes)
  experts = jax.tree.map(lambda leaf: draw(num_experts, *leaf.shape), shapes)
  return core_space(CoreBasis.from_experts(base, experts, rank=2)) if in_core else dense_space(base, experts)
