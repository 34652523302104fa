"""Every figure of an inspection against float64 NumPy on task vectors that are written out."""

import io
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inspection_cases import (
  energy_by_rank,
  flat,
  named,
  norm,
  similarity,
  tiny_config,
  write_adapter,
  write_base,
  write_full,
)
from rich.console import Console
from safetensors.numpy import load_file, save_file

from cqd_jax.genotypes import CoreBasis, factors
from cqd_jax.hub.experts import open_expert
from cqd_jax.hub.load import open_pretrained
from cqd_jax.hub.save_adapter import save_adapter
from cqd_jax.inspect.command import inspect
from cqd_jax.inspect.measure import KINDS, kind_of, measure, num_bytes
from cqd_jax.inspect.view import curve
from cqd_jax.low_rank import LowRank
from cqd_jax.models.hf_layout import placements


def console_of(width=100):
  return Console(file=io.StringIO(), width=width)


def quiet(base, experts, **settings):
  return inspect(base, experts, console_of(), **settings)


def text_of(base, experts, **settings):
  console = console_of(160)
  inspect(base, experts, console, **settings)
  return console.file.getvalue()


def check(inspection, changes, base_params, most):
  """Compares all figures with those of the written out task vectors."""
  experts = inspection.experts
  assert inspection.num_parameters == flat(named(base_params)).size
  assert inspection.base_norm == pytest.approx(norm(named(base_params)), rel=1e-6)
  for expert, change in zip(experts, changes, strict=True):
    whole = norm(change)
    assert expert.norm == pytest.approx(whole, rel=1e-5)
    np.testing.assert_allclose(expert.energy, energy_by_rank(change, most), atol=1e-5)
    assert sum(expert.shares.values()) == pytest.approx(1)
    for kind in KINDS:
      own = sum((leaf**2).sum() for name, leaf in change.items() if kind_of(tuple(name.split("/"))) == kind)
      assert expert.shares[kind] == pytest.approx(own / whole**2, abs=1e-6)
  for (i, first), (j, second) in itertools.product(enumerate(changes), repeat=2):
    cosine = flat(first) @ flat(second) / norm(first) / norm(second)
    assert inspection.cosines[i, j] == pytest.approx(cosine, abs=1e-5)
    expected, shared = similarity(first, second)
    assert inspection.similarities[i, j] == pytest.approx(expected, abs=1e-5)
    assert inspection.num_shared[i, j] == shared


@pytest.mark.parametrize(
  ("dtype", "config"),
  [
    (jnp.float32, tiny_config(qkv_bias=True)),
    (jnp.bfloat16, tiny_config(tie_embeddings=True, qk_norm=True)),
  ],
  ids=["float32, biases", "bfloat16, tied"],
)
def test_full_models_and_adapters_together(tmp_path, dtype, config):
  base, _ = write_base(tmp_path / "base", config, dtype)
  changes = [
    write_full(tmp_path / "first", base, config, seed=1),
    write_adapter(tmp_path / "lora", base, ["self_attn.q_proj", "mlp.down_proj"], rank=3),
    write_full(tmp_path / "second", base, config, seed=2),
    write_adapter(
      tmp_path / "other", base, ["mlp.down_proj", "layers.1.mlp.up_proj"], rank=2, patterns={"mlp.up_proj": 4}, seed=5
    ),
  ]
  folders = [tmp_path / name for name in ("first", "lora", "second", "other")]
  inspection = quiet(tmp_path / "base", folders, max_rank=6)
  check(inspection, changes, base, 6)
  assert [expert.name for expert in inspection.experts] == ["first", "lora", "second", "other"]
  assert [expert.ranks for expert in inspection.experts] == [(), (3,), (), (2, 4)]
  assert [expert.is_adapter for expert in inspection.experts] == [False, True, False, True]
  name = jnp.dtype(dtype).name
  assert [expert.dtype for expert in inspection.experts] == [name, "float32", name, "float32"]
  for expert, change in zip(inspection.experts, changes, strict=True):
    assert expert.num_changed == np.count_nonzero(flat(change))
    assert not expert.sampled
    assert expert.num_bytes < sum(file.stat().st_size for file in expert.folder.glob("*.safetensors"))
  assert not inspection.misfits


def test_one_expert_alone(tmp_path):
  base, config = write_base(tmp_path / "base")
  change = write_full(tmp_path / "expert", base, config)
  console = console_of()
  inspection = inspect(tmp_path / "base", [tmp_path / "expert"], console, max_rank=20)
  check(inspection, [change], base, 20)
  assert inspection.cosines.shape == (1, 1)
  assert inspection.experts[0].energy[-1] == pytest.approx(1)  # more than the shorter side of every matrix
  assert "Pairs" not in console.file.getvalue()


def test_the_least_rank_for_a_share(tmp_path):
  base, config = write_base(tmp_path / "base")
  change = write_full(tmp_path / "expert", base, config)
  (expert,) = quiet(tmp_path / "base", [tmp_path / "expert"], max_rank=6).experts
  energy = energy_by_rank(change, 6)
  for share in (0.1, 0.5, energy[3]):
    assert expert.rank_of(share) == int(np.flatnonzero(energy >= share * (1 - 1e-6))[0]) + 1
  assert expert.rank_of(0.999) is None


def test_an_expert_that_is_the_base_has_no_direction(tmp_path):
  base, config = write_base(tmp_path / "base")
  write_full(tmp_path / "copy", base, config, change=lambda name, leaf, source: 0.0)
  write_full(tmp_path / "expert", base, config)
  write_adapter(tmp_path / "fresh", base, ["mlp.up_proj"], size=0.0)  # as PEFT begins: B = 0
  folders = [tmp_path / name for name in ("copy", "expert", "fresh")]
  inspection = quiet(tmp_path / "base", folders)
  copy, expert, fresh = inspection.experts
  for same in (copy, fresh):
    assert same.norm == 0
    assert same.num_changed == 0
    assert np.isnan(same.energy).all()
    assert same.rank_of(0.9) is None
    assert set(same.shares.values()) == {0.0}
  assert expert.num_changed == inspection.num_parameters
  assert np.isnan(np.delete(inspection.cosines.reshape(-1), 4)).all()
  assert inspection.cosines[1, 1] == pytest.approx(1)
  assert inspection.num_shared.tolist() == [[0, 0, 0], [0, 16, 0], [0, 0, 0]]
  text = text_of(tmp_path / "base", folders)
  assert "copy and fresh are equal to the base" in text
  only = text_of(tmp_path / "base", [tmp_path / "copy"], figure=tmp_path / "none.png")
  assert "no figure of energy by rank" in only
  assert not (tmp_path / "none.png").exists()


def test_only_vectors_changed(tmp_path):
  base, config = write_base(tmp_path / "base")
  change = write_full(
    tmp_path / "norms",
    base,
    config,
    change=lambda name, leaf, source: source.normal(size=leaf.shape) if name.endswith("scale") else 0.0,
  )
  other = write_full(tmp_path / "full", base, config)
  inspection = quiet(tmp_path / "base", [tmp_path / "norms", tmp_path / "full"])
  assert inspection.experts[0].norm == pytest.approx(norm(change), rel=1e-6)
  assert inspection.experts[0].shares["norms"] == pytest.approx(1)
  assert np.isnan(inspection.experts[0].energy).all()
  expected = flat(change) @ flat(other) / norm(change) / norm(other)
  assert inspection.cosines[0, 1] == pytest.approx(expected, abs=1e-6)
  assert np.isnan(inspection.similarities[0, 1])
  assert inspection.num_shared[0, 1] == 0


def test_sampled_and_exact_agree(tmp_path, monkeypatch):
  """Of changes of rank 2 sampling finds everything."""
  base, config = write_base(tmp_path / "base", tiny_config(num_kv_heads=2))

  def low_rank(name, leaf, source):
    if not name.endswith("kernel"):
      return 0.0
    *stack, rows, columns = leaf.shape
    return np.matmul(source.normal(size=(*stack, rows, 2)), source.normal(size=(*stack, 2, columns))) / 10

  changes = [write_full(tmp_path / name, base, config, seed, low_rank) for seed, name in enumerate(("one", "two"))]
  changes.append(write_adapter(tmp_path / "lora", base, ["self_attn.v_proj", "mlp.up_proj"], rank=2))
  folders = [tmp_path / name for name in ("one", "two", "lora")]
  exact = quiet(tmp_path / "base", folders, max_rank=2)
  monkeypatch.setattr(factors, "LARGE", 4)
  console = console_of(200)
  sampled = inspect(tmp_path / "base", folders, console, max_rank=2)
  assert [expert.sampled for expert in exact.experts] == [False, False, False]
  assert [expert.sampled for expert in sampled.experts] == [True, True, False]
  for inspection in (exact, sampled):
    check(inspection, changes, base, 2)
  text = " ".join(console.file.getvalue().split())
  assert "the cosine of their 2 largest singular values" in text
  assert "their shares are lower bounds" in text


def test_an_adapter_of_ours_with_biases(tmp_path):
  base, config = write_base(tmp_path / "base", tiny_config(qkv_bias=True))
  source = np.random.default_rng(3)

  def leaf_of(path, leaf):
    if path[-1].key == "bias":
      return jnp.asarray(source.normal(size=leaf.shape), jnp.float32)
    if path[-2].key in ("up", "value"):
      *stack, rows, columns = leaf.shape
      return LowRank(*(jnp.asarray(source.normal(size=(*stack, *shape))) for shape in ((rows, 4), (4, columns))))
    return None

  basis = CoreBasis.from_experts(base, [jax.tree.map_with_path(leaf_of, base)])
  genotype = jax.tree.map(lambda leaf: leaf[0], basis.experts)
  save_adapter(tmp_path / "ours", basis, genotype, config, base_name="base")
  inspection = quiet(tmp_path / "base", [tmp_path / "ours"], max_rank=5)
  check(inspection, [named(basis.task_vector(genotype))], base, 5)
  (expert,) = inspection.experts
  assert expert.ranks == (4,)
  assert expert.rank_of(1.0) == 4
  assert expert.shares["biases"] > 0


def test_what_does_not_fit_is_told_and_the_rest_inspected(tmp_path):
  base, config = write_base(tmp_path / "base")
  change = write_full(tmp_path / "expert", base, config)
  wide = tiny_config(intermediate_size=32)
  write_base(tmp_path / "wide", wide)
  write_adapter(tmp_path / "dora", base, ["mlp.up_proj"], use_dora=True)
  write_full(tmp_path / "nan", base, config, seed=4)
  file = tmp_path / "nan" / "model.safetensors"
  tensors = {name: tensor.copy() for name, tensor in load_file(file).items()}
  tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan
  save_file(tensors, file, metadata={"format": "pt"})
  folders = [tmp_path / name for name in ("wide", "nan", "expert", "dora", "missing")]
  console = console_of(300)
  inspection = inspect(tmp_path / "base", folders, console)
  check(inspection, [change], base, 64)
  assert list(inspection.misfits) == ["wide", "dora", "missing", "nan"]
  assert "another intermediate_size than its base: 32" in inspection.misfits["wide"]
  assert "use_dora" in inspection.misfits["dora"]
  assert "no such expert folder" in inspection.misfits["missing"]
  assert "NaN" in inspection.misfits["nan"]
  text = console.file.getvalue()
  for name, reason in inspection.misfits.items():
    assert f"{name} does not fit and is left out: {reason}" in text
    assert re.search(rf"^{name} +does not fit", text, re.MULTILINE)
  for folder in ("nan", "wide"):
    with pytest.raises(ValueError, match=r"NaN|intermediate_size"):
      quiet(tmp_path / "base", [tmp_path / folder])
  with pytest.raises(ValueError, match=r"experts: none fits the base: .*intermediate_size.*; .*no such expert folder"):
    quiet(tmp_path / "base", [tmp_path / "wide", tmp_path / "missing"])


def test_what_is_refused_at_once(tmp_path):
  base, config = write_base(tmp_path / "base")
  write_full(tmp_path / "expert", base, config)
  write_adapter(tmp_path / "lora", base, ["mlp.up_proj"])
  good = [tmp_path / "expert"]
  with pytest.raises(ValueError, match="experts: expected at least one folder"):
    quiet(tmp_path / "base", [])
  with pytest.raises(ValueError, match="expert is given twice"):
    quiet(tmp_path / "base", [*good, tmp_path / "base" / ".." / "expert"])
  with pytest.raises(ValueError, match=r"lora: not a Hugging Face model folder \(it is a PEFT adapter"):
    quiet(tmp_path / "lora", good)
  with pytest.raises(ValueError, match="nowhere: no such model folder"):
    quiet(tmp_path / "nowhere", good)
  with pytest.raises(ValueError, match="max_rank: expected at least 1, got 0"):
    quiet(tmp_path / "base", good, max_rank=0)
  with pytest.raises(ValueError, match=r"figure: expected a file that ends in .png, .svg, .pdf, got energy.gif"):
    quiet(tmp_path / "base", good, figure=type(tmp_path)("energy.gif"))


def test_equal_names_are_told_apart_by_their_paths(tmp_path):
  base, config = write_base(tmp_path / "base")
  for seed, name in enumerate(("a", "b")):
    write_full(tmp_path / name / "expert", base, config, seed)
  folders = [tmp_path / name / "expert" for name in ("a", "b")]
  assert [expert.name for expert in quiet(tmp_path / "base", folders).experts] == [str(folder) for folder in folders]


def test_progress_counts_every_byte_once(tmp_path):
  base, config = write_base(tmp_path / "base")
  write_full(tmp_path / "full", base, config)
  write_adapter(tmp_path / "lora", base, ["mlp.up_proj", "self_attn.o_proj"])
  opened = open_pretrained(tmp_path / "base")
  experts = {name: open_expert(tmp_path / name, opened) for name in ("full", "lora")}
  steps = []
  measure(opened, experts, max_rank=4, on_part=lambda size, name: steps.append((size, name)))
  total = opened.num_bytes + sum(expert.num_bytes for expert in experts.values())
  assert sum(size for size, _ in steps) == num_bytes(opened, experts.values()) == total
  assert "mlp/up 1" in {name for _, name in steps}
  assert len(steps) == 19


def test_every_leaf_is_of_a_known_kind():
  config = tiny_config(qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True)
  assert {kind_of(placement.path) for placement in placements(config)} == set(KINDS)


def test_the_terminal_shows_everyone(tmp_path):
  base, config = write_base(tmp_path / "base")
  write_full(tmp_path / "[red]coder", base, config)  # names are no markup
  write_adapter(tmp_path / "sql", base, ["mlp.up_proj"], rank=2)
  folders = [tmp_path / "[red]coder", tmp_path / "sql"]
  console = console_of(80)
  inspection = inspect(tmp_path / "base", folders, console, max_rank=8, figure=tmp_path / "plots" / "energy.svg")
  text = console.file.getvalue()
  assert all(len(line) <= 80 for line in text.splitlines())
  for line in (r"\[red\]coder +full model +float32", r"sql +LoRA adapter +2 +float32", r"\[red\]coder +sql +nearly"):
    assert re.search(line, text)
  energy = inspection.experts[1].energy
  assert re.search(rf"sql +{curve(energy)} +{energy[0]:.0%} +100% +100% +100% +2 +2", text)
  assert "What that means for merging" in text
  assert (tmp_path / "plots" / "energy.svg").is_file()


def test_a_terminal_of_ascii(tmp_path):
  base, config = write_base(tmp_path / "base")
  write_full(tmp_path / "coder", base, config)
  write_adapter(tmp_path / "sql", base, ["mlp.up_proj"], rank=2)
  raw = io.BytesIO()
  with io.TextIOWrapper(raw, encoding="ascii") as file:
    inspect(tmp_path / "base", [tmp_path / "coder", tmp_path / "sql"], Console(file=file, width=100), max_rank=8)
    file.flush()
    assert re.search(r"sql +\|.*###", raw.getvalue().decode("ascii"))


def test_curves_have_two_characters_a_doubling():
  assert curve(np.array([0.0, 0.5, 0.75, 1.0])) == "  ▄▆█"  # ranks 1, 1, 2, 3, 4
  assert curve(np.array([1.0])) == "█"
  assert curve(np.array([0.001]), ascii_only=True) == "."
