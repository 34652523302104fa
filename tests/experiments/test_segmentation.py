import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

QUIET = Console(quiet=True)
SIZES = {"train": (9, 8, 7), "validation": (4, 3, 2), "test": (2, 3, 4)}


@pytest.fixture(scope="module")
def segmentation(script):
  return script("segmentation")


@pytest.fixture(scope="module")
def tiny(segmentation):
  return segmentation.Recipe(widths=(4, 8), batch=4, base_steps=10, expert_steps=10)


@pytest.fixture(scope="module")
def model(segmentation, tiny):
  return segmentation.UNet(tiny.widths)


@pytest.fixture(scope="module")
def params(model):
  return jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.uint8))["params"]


@pytest.fixture(scope="module")
def squares(segmentation):
  """Bright squares on noise, as small pictures; domains differ in the squares' color."""
  source = np.random.default_rng(0)
  data = {}
  for split, sizes in SIZES.items():
    data[split] = {}
    for channel, (domain, size) in enumerate(zip(segmentation.DOMAINS, sizes, strict=True)):
      images, masks = source.integers(0, 100, (size, 16, 16, 3), np.uint8), np.zeros((size, 16, 16), np.uint8)
      for mask, (top, left) in zip(masks, source.integers(0, 9, (size, 2)), strict=True):
        mask[top : top + 8, left : left + 8] = 1
      images[..., channel] += 150 * masks
      data[split][domain] = {"images": images, "masks": masks}
  return data


def write_files(folder, data):
  folder.mkdir()
  names = {"train": "train", "validation": "val", "test": "test"}
  for domain in data["train"]:
    arrays = {f"{names[split]}_{kind}": data[split][domain][kind] for split in data for kind in ("images", "masks")}
    np.savez_compressed(folder / f"{domain}.npz", **arrays)


def count_iou(guess, gold):
  """Pixel by pixel, for one image."""
  pairs = list(zip(np.ravel(guess).tolist(), np.ravel(gold).tolist(), strict=True))
  union = sum(bool(one or other) for one, other in pairs)
  return sum(bool(one and other) for one, other in pairs) / union if union else 1.0


def test_iou_by_counting_pixels(segmentation):
  source = np.random.default_rng(1)
  logits = source.normal(size=(6, 8, 8)).astype(np.float32)
  masks = source.integers(0, 2, (6, 8, 8), np.uint8)
  logits[0], masks[0] = -1, 0  # both empty: 1
  logits[1] = 0  # not positive is background
  masks[2] = 0
  logits[3] = np.where(masks[3] > 0, 5, -5)
  found = segmentation.iou(jnp.asarray(logits), jnp.asarray(masks))
  expected = [count_iou(logit > 0, mask) for logit, mask in zip(logits, masks, strict=True)]
  assert expected[:4] == [1, 0, 0, 1]
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_loss_by_hand(segmentation):
  logits, masks = np.array([[[0.0, np.log(3)]], [[-np.log(3), 0.0]]]), np.array([[[1, 0]], [[0, 0]]], np.uint8)
  # probabilities [1/2, 3/4] of [1, 0], and [1/4, 1/2] of [0, 0]
  entropies = [(np.log(2) + np.log(4)) / 2, (np.log(4 / 3) + np.log(2)) / 2]
  dice = [1 - (2 * 0.5 + 1) / (1.25 + 1 + 1), 1 - 1 / (0.75 + 1)]
  found = segmentation.segmentation_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(masks))
  np.testing.assert_allclose(found, np.mean(entropies) + np.mean(dice), rtol=1e-5)


def test_folding_keeps_every_pixel_in_its_place(segmentation):
  images = np.arange(2 * 4 * 6, dtype=np.float32).reshape(2, 4, 6, 1)
  folded = segmentation._fold(jnp.asarray(images))
  assert folded.shape == (2, 2, 3, 4)
  np.testing.assert_array_equal(folded[1, 1, 2], images[1, 2:4, 4:6, 0].ravel())
  np.testing.assert_array_equal(segmentation._unfold(folded), images[..., 0])


def test_the_model_is_convolutions_without_state(model, params):
  variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.uint8))
  assert set(variables) == {"params"}
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  kernels = [leaf.shape for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "kernel"]
  assert kernels[:2] == [(3, 3, 12, 4), (3, 3, 4, 4)]  # height, width, in, out
  assert all(len(shape) == 4 for shape in kernels)
  for size in (16, 32):
    logits = jax.eval_shape(model.apply, {"params": params}, np.zeros((2, size, size, 3), np.uint8))
    assert (logits.shape, logits.dtype) == ((2, size, size), jnp.float32)


def test_training_lowers_the_loss(segmentation, model, params, squares):
  step, own = segmentation.make_train_step(model), squares["train"]["skin"]
  state = segmentation.OPTIMIZER.init(params)
  losses = []
  for _ in range(30):
    params, state, loss = step(params, state, own["images"], own["masks"], 0.01)
    losses.append(float(loss))
  assert losses[1] < losses[0]
  assert losses[-1] < 0.7 * losses[0]


def test_score_is_the_iou_of_each_image(segmentation, model, params, squares):
  data = squares["validation"]
  values = jax.jit(functools.partial(segmentation.score, model))(params, data)
  assert [value.shape for value in values] == [(4,), (3,), (2,)]
  for domain, found in zip(segmentation.DOMAINS, values, strict=True):
    masks = jax.jit(model.apply)({"params": params}, data[domain]["images"]) > 0
    expected = [count_iou(mask, gold) for mask, gold in zip(masks, data[domain]["masks"], strict=True)]
    np.testing.assert_allclose(found, expected, atol=0.02)  # a logit on the edge may fall either way


def test_samples_are_pictures_of_what_was_scored(segmentation, model, params, squares):
  data = squares["validation"]
  found = list(segmentation.samples(model, params, data, 3))
  assert [task for task, *_ in found] == ["nuclei"] * 3 + ["skin"] * 3 + ["plants"] * 2
  for _, _, _, answer, value, pictures in found:
    assert [caption for caption, _ in pictures] == ["image", "mask", "prediction"]
    image, mask, guess = (picture for _, picture in pictures)
    assert (image.shape, mask.shape, guess.shape) == ((16, 16, 3), (16, 16), (16, 16))
    assert all(picture.dtype == np.uint8 for picture in (image, mask, guess))
    assert set(np.unique(mask)) == {0, 255}
    assert value == pytest.approx(count_iou(guess > 0, mask > 0))
    assert answer == f"IoU {value:.2f}"
  np.testing.assert_array_equal(found[4][5][0][1], data["skin"]["images"][1])


def test_models_are_trained_once(segmentation, model, squares, tiny, tmp_path, monkeypatch):
  base, experts = segmentation.load_or_train(model, squares["train"], tiny, tmp_path, QUIET)
  assert tuple(experts) == segmentation.DOMAINS
  assert all(
    any((own != before).any() for own, before in zip(jax.tree.leaves(expert), jax.tree.leaves(base), strict=True))
    for expert in experts.values()
  )
  train = segmentation.train
  monkeypatch.setattr(segmentation, "train", None)  # whoever trains again, fails
  jax.tree.map(
    np.testing.assert_array_equal,
    (base, experts),
    segmentation.load_or_train(model, squares["train"], tiny, tmp_path, QUIET),
  )
  names = []
  monkeypatch.setattr(
    segmentation, "train", lambda name, *rest, **settings: names.append(name) or train(name, *rest, **settings)
  )
  (folder,) = tmp_path.iterdir()
  (folder / "skin.safetensors").unlink()
  again = segmentation.load_or_train(model, squares["train"], tiny, tmp_path, QUIET)
  assert names == ["skin"]
  jax.tree.map(np.testing.assert_array_equal, (base, experts), again)
  (folder / "plants.safetensors").write_bytes(b"damaged")
  with pytest.raises(ValueError, match=r"plants\.safetensors.*delete it"):
    segmentation.load_or_train(model, squares["train"], tiny, tmp_path, QUIET)


def test_data_are_read_from_files(segmentation, squares, tmp_path):
  write_files(tmp_path / "data", squares)
  jax.tree.map(np.testing.assert_array_equal, segmentation.load_data(tmp_path / "data"), squares)


def test_missing_files_are_named(segmentation, squares, tmp_path):
  write_files(tmp_path / "data", squares)
  (tmp_path / "data" / "skin.npz").unlink()
  with pytest.raises(FileNotFoundError, match=r"^[^\n]*data: skin\.npz not found; --data names the folder"):
    segmentation.load_data(tmp_path / "data")


@pytest.fixture(scope="module")
def pictures(segmentation, pytestconfig):
  folder = pytestconfig.rootpath.parent / "shared/data/segmentation"
  if not folder.is_dir():
    pytest.skip(f"the pictures are not there: {folder}")
  return segmentation.load_data(folder)


def test_the_pictures_are_as_the_script_says(segmentation, pictures):
  for split in ("train", "validation", "test"):
    for domain in segmentation.DOMAINS:
      images, masks = pictures[split][domain]["images"], pictures[split][domain]["masks"]
      assert (images.dtype, masks.dtype) == (np.uint8, np.uint8)
      assert images.shape == (len(masks), 64, 64, 3)
      assert masks.shape[1:] == (64, 64)
      assert len(masks) >= 36
      assert set(np.unique(masks)) == {0, 1}


def test_a_tiny_model_learns_from_the_pictures(segmentation, model, params, tiny, pictures):
  few = {kind: leaf[:8] for kind, leaf in pictures["train"]["skin"].items()}
  step = segmentation.make_train_step(model)
  fitted = segmentation.train("skin", step, params, few, steps=20, peak=0.01, recipe=tiny, console=QUIET)

  @jax.jit
  def loss(params):
    return segmentation.segmentation_loss(model.apply({"params": params}, few["images"]), few["masks"])

  assert loss(fitted) < 0.9 * loss(params)
