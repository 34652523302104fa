"""Each method of recipes is its operator in mergekit's form: of one matrix, worked out in float64."""

import io

import numpy as np
import pytest
from recipe_cases import same, slerp_of, tensors_of, ties_of, wide, write_model
from rich.console import Console
from safetensors.numpy import load_file

from cqd_jax.hub.merge_recipe import MergeOptions, merge_recipe


def unit(tensor):
  return tensor / np.sqrt((tensor**2).sum())


def length(tensor):
  return np.sqrt((tensor**2).sum())


def breadcrumbs_of(delta, density, gamma):
  """Neither the largest nor the smallest."""
  top, kept = int(gamma * delta.size), int(density * delta.size)
  ranks = np.argsort(np.argsort(-np.abs(delta).ravel())).reshape(delta.shape)
  return np.where((ranks >= top) & (ranks < top + kept), delta, 0.0)


def sce_of(base, one, two):
  """Of all entries, with weights by squares: the mean of those that have the sum's sign."""
  squares = [((expert - base) ** 2).mean() for expert in (one, two)]
  deltas, weights = [one - base, two - base], [square / sum(squares) for square in squares]
  agree = [np.sign(delta) == np.where(sum(deltas) >= 0, 1.0, -1.0) for delta in deltas]
  total = sum(w * delta * mask for w, delta, mask in zip(weights, deltas, agree, strict=True))
  return base + total / np.maximum(sum(w * mask for w, mask in zip(weights, agree, strict=True)), 1e-6)


def stock_of(base, one, two):
  cosine = (unit(one - base) * unit(two - base)).sum()
  return base + 2 * cosine / (1 + cosine) * ((one - base) + (two - base)) / 2


def iso_of(base, one, two):
  left, values, right = np.linalg.svd((one - base) + (two - base), full_matrices=False)
  return base + 0.5 * values.mean() * left @ right


EXPERTS = "models: [{model: one, parameters: {weight: 0.7}}, {model: two, parameters: {weight: 0.4}}]"
PLAIN = "models: [{model: one}, {model: two}]"
ALONE = "base_model: base\nmodels: [{model: one}]"
METHODS = {
  "nuslerp": (EXPERTS, lambda base, one, two: slerp_of(one, two, 0.4 / 1.1)),
  "nuslerp of task vectors": ("base_model: base\n" + EXPERTS, lambda b, x, y: b + slerp_of(x - b, y - b, 0.4 / 1.1)),
  "nuslerp by rows": (
    "parameters: {nuslerp_flatten: false}\n" + EXPERTS,
    lambda base, one, two: np.stack([slerp_of(x, y, 0.4 / 1.1) for x, y in zip(one, two, strict=True)]),
  ),
  "multislerp": (
    EXPERTS,
    lambda base, one, two: (0.7 * length(one) + 0.4 * length(two)) / 1.1 * unit(0.7 * unit(one) + 0.4 * unit(two)),
  ),
  "karcher": (PLAIN, lambda base, one, two: (length(one) + length(two)) / 2 * slerp_of(unit(one), unit(two), 0.5)),
  "model_stock": ("base_model: base\n" + PLAIN, stock_of),
  "model_stock by rows": (
    "base_model: base\nparameters: {filter_wise: true}\n" + PLAIN,
    lambda *models: np.stack([stock_of(*rows) for rows in zip(*models, strict=True)]),
  ),
  "breadcrumbs": (
    "base_model: base\nparameters: {density: 0.5, gamma: 0.1}\n" + EXPERTS,
    lambda b, x, y: b + 0.7 * breadcrumbs_of(x - b, 0.5, 0.1) + 0.4 * breadcrumbs_of(y - b, 0.5, 0.1),
  ),
  "breadcrumbs_ties": (
    "base_model: base\n" + EXPERTS,  # at density 1 nothing goes, not even outliers
    lambda b, x, y: ties_of(b, [x, y], (0.7, 0.4), (1.0, 1.0), normalize=False),
  ),
  "ties summed": (
    "base_model: base\nparameters: {normalize: false, density: 0.5, lambda: 0.9}\n" + EXPERTS,
    lambda b, x, y: ties_of(b, [x, y], (0.7, 0.4), (0.5, 0.5), normalize=False, scale=0.9),
  ),
  "della": ("base_model: base\n" + EXPERTS, lambda b, x, y: ties_of(b, [x, y], (0.7, 0.4), (1.0, 1.0))),
  "della_linear": ("base_model: base\n" + EXPERTS, lambda b, x, y: b + 0.7 * (x - b) + 0.4 * (y - b)),
  "nearswap": ("parameters: {t: 0.3}\n" + ALONE, lambda b, x, y: b + np.clip(x - b, -0.3, 0.3)),
  "sce": ("base_model: base\n" + PLAIN, sce_of),
  "ram": (
    "base_model: base\nparameters: {epsilon: 1}\n" + PLAIN,
    lambda b, x, y: (
      b
      + sum(np.where(np.abs(d) > 1, d, 0.0) for d in (x - b, y - b))
      / np.maximum(sum((np.abs(d) > 1) * 1.0 for d in (x - b, y - b)), 1.0)
    ),
  ),
  "ramplus_tl": ("base_model: base\nmodels: [{model: one}]", lambda b, x, y: x),  # nothing is shared
  "magmax": (
    "base_model: base\n" + PLAIN,
    lambda b, x, y: b + np.where(np.abs(x - b) >= np.abs(y - b), x - b, y - b),
  ),
  "iso_c": ("base_model: base\nparameters: {lambda: 0.5}\n" + PLAIN, iso_of),
}


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
  """Models of one matrix."""
  root = tmp_path_factory.mktemp("matrices")
  made = {name: tensors_of({"mlp.weight": (6, 8)}, 20 + seed) for seed, name in enumerate(("base", "one", "two"))}
  for name, tensors in made.items():
    write_model(root / name, tensors)
  return root, [wide(tensors["mlp.weight"]) for tensors in made.values()]


def merged_matrix(text, root, tmp_path, monkeypatch, **options):
  monkeypatch.chdir(root)
  (tmp_path / "recipe.yml").write_text(text)
  out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
  merge_recipe(tmp_path / "recipe.yml", out, Console(file=io.StringIO()), MergeOptions(**options))
  return wide(load_file(out / "model.safetensors")["mlp.weight"])


@pytest.mark.parametrize("case", METHODS)
def test_every_method_is_its_operator_in_mergekits_form(case, matrices, tmp_path, monkeypatch):
  root, models = matrices
  text, expected = METHODS[case]
  got = merged_matrix(f"merge_method: {case.split()[0]}\n{text}", root, tmp_path, monkeypatch)
  same(got, expected(*models), 2e-5)


@pytest.mark.parametrize("method", ["arcee_fusion", "consensus_merge", "tsv"])
def test_methods_that_keep_equal_experts(method, matrices, tmp_path, monkeypatch):
  root, (base, one, _) = matrices
  models = (
    ALONE if method != "consensus_merge" else f"base_model: base\nmodels: [{{model: one}}, {{model: {root}/one}}]"
  )
  got = merged_matrix(f"merge_method: {method}\n{models}", root, tmp_path, monkeypatch)
  if method == "arcee_fusion":  # an entry is of the base, or of the expert
    assert (np.isclose(got, base, atol=1e-6) | np.isclose(got, one, atol=1e-6)).all()
    assert 0 < np.isclose(got, one, atol=1e-6).sum() < got.size
  elif method == "tsv":  # one expert of full rank is itself
    same(got, one, 2e-5)
  else:  # twice the same, where both are active
    assert (np.isclose(got, base, atol=1e-5) | np.isclose(got, 2 * one - base, atol=1e-5)).all()


def test_della_draws_within_its_window(matrices, tmp_path, monkeypatch):
  root, (base, one, _) = matrices
  text = "merge_method: della_linear\nparameters: {weight: 1, density: 0.6, epsilon: 0.39, rescale: false}\n" + ALONE
  shares = np.stack([merged_matrix(text, root, tmp_path, monkeypatch, seed=seed) - base for seed in range(4)])
  kept = np.abs(shares) > 1e-6
  np.testing.assert_allclose(shares[kept], np.broadcast_to(one - base, shares.shape)[kept], atol=1e-5)
  by_size = np.take_along_axis(kept.mean(0), np.argsort(np.abs(one - base), axis=1), axis=1).mean(0)
  # The mean of 24 draws at probabilities .21 and .99 (sd .083 and .02); and the seeds are fixed.
  assert by_size[0] < 0.6 < 0.85 < by_size[-1]


def test_a_gradient_of_densities_is_as_exact_as_one_density(matrices, tmp_path, monkeypatch):
  root, (base, _, _) = matrices
  for method in ("ties", "breadcrumbs"):
    text = f"merge_method: {method}\nparameters: {{weight: 1, density: VALUE}}\n{ALONE}"
    one_density, gradient = (
      merged_matrix(text.replace("VALUE", value), root, tmp_path, monkeypatch) for value in ("0.25", "[0.25, 1]")
    )
    np.testing.assert_array_equal(gradient, one_density)
    assert np.isclose(gradient, base).sum() == 36
  none = merged_matrix(text.replace("breadcrumbs", "ties").replace("VALUE", "[0, 1]"), root, tmp_path, monkeypatch)
  same(none, base)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_its_share_and_the_sum_of_magnitudes(method, matrices, tmp_path, monkeypatch):
  root, (base, one, _) = matrices
  text = f"merge_method: {method}\nparameters: {{weight: 1, density: 0.4}}\n{ALONE}"
  got = merged_matrix(text, root, tmp_path, monkeypatch)
  delta, sparse = one - base, got - base
  kept = np.abs(sparse) > 1e-5
  assert 5 <= kept.sum() <= 36  # of 48 with 0.4: within 4 standard deviations; and the seed is fixed
  assert abs(np.abs(sparse).sum() - np.abs(delta).sum()) < 1e-3
  ratio = sparse[kept] / delta[kept]
  np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)
  np.testing.assert_array_equal(merged_matrix(text, root, tmp_path, monkeypatch), got)
  assert not np.array_equal(merged_matrix(text, root, tmp_path, monkeypatch, seed=1), got)
