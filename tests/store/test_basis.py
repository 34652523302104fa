import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unet_cases import unet

from cqd_jax.genotypes import CoreBasis
from cqd_jax.low_rank import LowRank
from cqd_jax.models import DecoderConfig, init_params
from cqd_jax.store.basis import load_basis, save_basis

CONFIG = DecoderConfig(23, 16, 24, 2, 2, 1, 8, qkv_bias=True)


def make_basis(dtype=jnp.float32):
  base, *models = (init_params(jax.random.key(seed), CONFIG, dtype) for seed in range(3))
  factors = LowRank(jnp.ones((23, 1), dtype), jnp.ones((1, 16), dtype))
  experts = [model | {"embed": {"embedding": each}} for model, each in zip(models, (factors, None), strict=True)]
  return CoreBasis.from_experts(base, experts, rank={"*": 3, "head/kernel": 2})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_read_is_what_was_written(tmp_path, dtype):
  basis = make_basis(dtype)
  save_basis(tmp_path / "basis.safetensors", basis)
  back = load_basis(tmp_path / "basis.safetensors", basis.base)
  assert jax.tree.structure(back) == jax.tree.structure(basis)
  jax.tree.map(np.testing.assert_array_equal, back, basis)
  assert back.fits() == basis.fits()
  assert back.ranks == basis.ranks


def test_a_basis_of_convolutions_is_kept(tmp_path):
  basis = CoreBasis.from_experts(unet(0), unet(1, lead=(2,)), rank=2)
  save_basis(tmp_path / "basis.safetensors", basis)
  jax.tree.map(np.testing.assert_array_equal, load_basis(tmp_path / "basis.safetensors", basis.base), basis)


def test_a_basis_of_another_base_is_refused(tmp_path):
  path = tmp_path / "basis.safetensors"
  save_basis(path, make_basis())
  for other in (
    DecoderConfig(23, 16, 32, 2, 2, 1, 8, qkv_bias=True),
    DecoderConfig(23, 16, 24, 2, 2, 1, 8, qkv_bias=True, qk_norm=True),
    DecoderConfig(23, 16, 24, 3, 2, 1, 8, qkv_bias=True),
  ):
    with pytest.raises(ValueError, match=r"basis\.safetensors: .*of another base model"):
      load_basis(path, init_params(jax.random.key(0), other))


def test_a_damaged_or_missing_file_is_named(tmp_path):
  path = tmp_path / "basis.safetensors"
  with pytest.raises(FileNotFoundError, match=r"basis\.safetensors"):
    load_basis(path, make_basis().base)
  save_basis(path, make_basis())
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r"basis\.safetensors: not a whole"):
    load_basis(path, make_basis().base)
