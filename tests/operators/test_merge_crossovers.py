"""Crossovers that are merges: the merge of the pair with the weights of the note, named and refused as any other."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.config.plugs import KINDS, Plug, PlugError, resolve, settings_of
from cqd_jax.operators import Child, check_frame, frame_of, iso_c, magmax, merge_crossovers, sce
from cqd_jax.operators.merge_crossovers import crossover_of, nearswap_crossover

NAMES = [name for name, place in KINDS["crossover"].table.items() if "merge_crossovers" in place]


def parents():
  source = np.random.default_rng(0)
  return [{"kernel": jnp.asarray(source.normal(size=(5, 4)), jnp.bfloat16)} for _ in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_plug_that_makes_a_child_with_the_settings_of_its_merge(name):
  crossover = resolve("crossover", Plug.parse(name), "crossover")
  assert crossover.__name__ == f"{name}_crossover"
  settings = settings_of("crossover", crossover)
  merge = getattr(__import__("cqd_jax.operators", fromlist=[name]), name)
  expected = {each.name for each in inspect.signature(merge).parameters.values() if each.kind is each.KEYWORD_ONLY}
  assert set(settings) == expected | ({"std"} if name != "nearswap" else set())
  assert all(setting.text for setting in settings.values())
  assert {each for each in settings.values() if each.required} == set()
  assert frame_of(crossover) == frame_of(merge)
  child = jax.eval_shape(crossover, jax.random.key(0), *parents())
  assert isinstance(child, Child)
  assert (child.genotype["kernel"].shape, child.genotype["kernel"].dtype) == ((5, 4), jnp.bfloat16)
  assert {note: value.shape for note, value in child.note.items()} == (
    {"weights": (2, 1)} if name != "nearswap" else {}
  )


@pytest.mark.parametrize(("merge", "total"), [(sce, 1), (iso_c, 1), (magmax, 2)])
def test_the_child_is_the_merge_with_the_weights_of_the_note(merge, total):
  first, second = parents()
  child = jax.jit(getattr(merge_crossovers, f"{merge.__name__}_crossover"))(jax.random.key(1), first, second)
  pair = {"kernel": jnp.stack([first["kernel"], second["kernel"]])}
  expected = jax.jit(merge)(pair, child.note["weights"][:, 0])
  np.testing.assert_array_equal(child.genotype["kernel"], expected["kernel"])
  assert float(child.note["weights"].sum()) == pytest.approx(total)


def test_random_merges_draw_weights_and_entries_from_the_key():
  della = jax.jit(functools.partial(merge_crossovers.della_crossover, std=0.0, density=0.5))
  children = [np.asarray(della(jax.random.key(seed), *parents()).genotype["kernel"]) for seed in (0, 0, 1)]
  np.testing.assert_array_equal(children[0], children[1])
  assert not np.array_equal(children[0], children[2])


def test_elementwise_ones_are_refused_in_core_space_by_name_and_spectral_ones_are_not():
  for name in NAMES:
    crossover = resolve("crossover", Plug.parse(name), "crossover")
    if frame_of(crossover) == "elementwise":
      with pytest.raises(ValueError, match=f"crossover {name}_crossover: elementwise"):
        check_frame(crossover, "core", "inner_product", "crossover")
    else:
      check_frame(crossover, "core", "inner_product", "crossover")


def test_a_setting_that_the_merge_does_not_have_is_refused():
  with pytest.raises(PlugError, match="karcher has no setting 'max_iters'; did you mean 'max_iter'"):
    resolve("crossover", Plug.parse({"use": "karcher", "max_iters": 3}), "crossover")
  assert resolve("crossover", Plug.parse({"use": "karcher", "max_iter": 3}), "crossover").keywords == {"max_iter": 3}
  with pytest.raises(ValueError, match="std: expected a finite number of at least 0"):
    crossover_of(sce)(jax.random.key(0), *parents(), std=-1.0)


def test_nearswap_steps_from_the_first_parent_toward_the_second():
  first, second = {"w": jnp.array([1.0, 1.0, -2.0])}, {"w": jnp.array([1.05, 3.0, -4.0])}
  child = nearswap_crossover(jax.random.key(0), first, second, t=0.1)
  np.testing.assert_allclose(child.genotype["w"], [1.05, 1.1, -2.1], rtol=1e-6)
