"""Checkpoints: bit for bit, in the background beside donation, the last few, and never a damaged one."""

import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqd_jax.archive import CyclingRepertoire, Grid
from cqd_jax.store.checkpoints import Checkpoints, DamagedCheckpoint

# TensorStore calls back into a reading that Orbax has given up because of an error: nobody's fault here.
quiet = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def gives_up(test):
  return quiet(pytest.mark.usefixtures("collected")(test))


def state_of(seed):
  grid = Grid(lower=[0.0] * 3, upper=[1.0] * 3, shape=(4, 4, 4))
  scores = np.random.default_rng(seed).uniform(size=(5, 3))
  genotypes = {"w": jax.random.normal(jax.random.key(seed), (5, 300)).astype(jnp.bfloat16)}
  repertoire = CyclingRepertoire.init(genotypes, scores, grid, extra_scores={"ok": jnp.ones((5, 2), bool)})
  return {"repertoire": repertoire, "key": jax.random.key(seed), "emitter_state": None}


def bits(state):
  plain = {**state, "key": jax.random.key_data(state["key"])}
  return [np.asarray(leaf) for leaf in jax.tree.leaves(plain)]


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, state_of(1))
  with Checkpoints(tmp_path) as checkpoints:
    step, back = checkpoints.load_newest(state_of(2))
  assert step == 3
  assert jax.tree.structure(back) == jax.tree.structure(state_of(1))
  for ours, theirs in zip(bits(back), bits(state_of(1)), strict=True):
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == theirs.dtype


def test_what_is_donated_while_the_checkpoint_is_written_is_written_as_it_was(tmp_path):
  double = jax.jit(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree), donate_argnums=0)
  state = {"w": jax.random.normal(jax.random.key(0), (400, 2000))}
  saved = np.array(state["w"])
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    for _ in range(5):
      state = double(state)
    jax.block_until_ready(state)
  like = {"w": jnp.zeros((400, 2000))}
  with Checkpoints(tmp_path) as checkpoints:
    np.testing.assert_array_equal(checkpoints.load(1, like)["w"], saved)


def test_the_last_few_are_kept_and_none_is_overwritten(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, {"w": jnp.full(3, step)})
      checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    with pytest.raises(ValueError, match="3: already exists"):
      checkpoints.save(3, {"w": jnp.zeros(3)})
    checkpoints.prune(keep=1)
    assert checkpoints.steps() == [3]


def test_what_a_killed_process_left_half_written_is_no_checkpoint(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": jnp.ones(3)})
  shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1]
    step, _ = checkpoints.load_newest({"w": jnp.zeros(3)})
    assert step == 1
    checkpoints.save(2, {"w": jnp.full(3, 2.0)})
  with Checkpoints(tmp_path) as checkpoints:
    np.testing.assert_array_equal(checkpoints.load(2, {"w": jnp.zeros(3)})["w"], [2, 2, 2])


@gives_up
def test_of_damaged_checkpoints_the_one_before_is_taken_and_nothing_is_deleted(tmp_path):
  like = {"w": jnp.zeros(1000), "n": jnp.int32(0)}
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, {"w": jax.random.normal(jax.random.key(step), (1000,)), "n": jnp.int32(step)})
  for step in (2, 3):
    for file in (tmp_path / str(step)).rglob("*"):
      if file.is_file():
        file.write_bytes(b"damaged")
  with Checkpoints(tmp_path) as checkpoints, pytest.warns(UserWarning, match="going back") as caught:
    step, state = checkpoints.load_newest(like)
  assert (step, int(state["n"])) == (1, 1)
  for tried, warning in zip((3, 2), caught, strict=True):
    assert str(tmp_path / str(tried)) in str(warning.message)
  assert {path.name for path in tmp_path.iterdir()} >= {"1", "damaged-2", "damaged-3"}
  with Checkpoints(tmp_path) as checkpoints:  # and a new one can take the place
    checkpoints.save(2, {"w": jnp.ones(1000), "n": jnp.int32(22)})
  with Checkpoints(tmp_path) as checkpoints:
    assert int(checkpoints.load(2, like)["n"]) == 22


def test_a_checkpoint_ahead_of_the_history_is_not_used(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, {"n": jnp.int32(step)})
  with Checkpoints(tmp_path) as checkpoints, pytest.warns(UserWarning, match="ahead of the history"):
    assert checkpoints.load_newest({"n": jnp.int32(0)}, at_most=1)[0] == 1
  with Checkpoints(tmp_path / "none") as checkpoints:
    assert checkpoints.load_newest({"n": jnp.int32(0)}) is None


@gives_up
def test_no_flipped_bit_is_restored_as_if_nothing_were(tmp_path):
  """Flips in Orbax's own description are noticed or harmless; in the data, only by the checksums."""
  state = {"w": jax.random.normal(jax.random.key(0), (40, 50)), "n": jnp.arange(70), "key": jax.random.key(7)}
  with Checkpoints(tmp_path / "good") as checkpoints:
    checkpoints.save(1, state)
  chance = random.Random(0)
  outcomes = {"damaged": 0, "whole": 0}
  files = sorted(file for file in (tmp_path / "good").rglob("*") if file.is_file() and file.stat().st_size)
  data = [file for file in files if "d" in file.relative_to(tmp_path).parts]
  for trial in range(40):
    file = chance.choice(data if trial % 2 else files)
    copy = tmp_path / f"copy-{trial}"
    shutil.copytree(tmp_path / "good", copy)
    flipped = copy / file.relative_to(tmp_path / "good")
    content = bytearray(flipped.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    flipped.write_bytes(content)
    with Checkpoints(copy) as checkpoints:
      try:
        back = checkpoints.load(1, state)
      except DamagedCheckpoint:
        outcomes["damaged"] += 1
        continue
    outcomes["whole"] += 1
    for ours, theirs in zip(bits(back), bits(state), strict=True):
      np.testing.assert_array_equal(ours, theirs)
  assert outcomes["damaged"] >= 10


@gives_up
def test_another_shape_and_a_missing_step_are_named(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": jnp.ones(3)})
    checkpoints.wait()
    with pytest.raises(FileNotFoundError, match=r"9: no such checkpoint"):
      checkpoints.load(9, {"w": jnp.ones(3)})
    with pytest.raises(DamagedCheckpoint, match="does not fit or is damaged"):
      checkpoints.load(1, {"w": jnp.ones(3), "v": jnp.ones(2)})
  with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
    Checkpoints(tmp_path, keep=0)


def test_an_error_of_the_background_does_not_hide_the_one_on_its_way(tmp_path, monkeypatch):
  def full(self):
    raise OSError("no space left")

  def fail():
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(1, {"w": jnp.ones(3)})
      raise RuntimeError("first")

  monkeypatch.setattr(Checkpoints, "wait", full)
  with pytest.raises(RuntimeError, match="first"):
    fail()
  with pytest.raises(OSError, match="no space left"), Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, {"w": jnp.ones(3)})
