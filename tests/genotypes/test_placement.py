"""A swarm on a mesh of virtual devices, in one process and in two: the same as on one device."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from core_cases import low_rank_experts, random_tree
from jax.sharding import PartitionSpec
from unet_cases import unet

from cqd_jax.genotypes import CoreBasis
from cqd_jax.genotypes.placement import basis_shardings, make_mesh

PROGRAM = Path(__file__).parent / "swarm_program.py"


def launch(folder, *, devices, population, model, processes=1):
  """Runs the program; returns its facts and its result."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  folder.mkdir()
  options = {"devices": devices, "population": population, "model": model, "processes": processes, "port": port}
  command = [sys.executable, str(PROGRAM), f"--out={folder}", *(f"--{name}={value}" for name, value in options.items())]
  started = [
    subprocess.Popen([*command, f"--process={index}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for index in range(processes)
  ]
  printed = [process.communicate(timeout=1200)[0] for process in started]
  assert [process.returncode for process in started] == [0] * processes, "\n".join(printed)
  with np.load(folder / "result.npz") as result:
    return json.loads((folder / "facts.json").read_text()), dict(result)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  return launch(tmp_path_factory.mktemp("alone") / "run", devices=1, population=1, model=1)


def check_same(result, expected):
  assert result.keys() == expected.keys()
  np.testing.assert_array_equal(result["tokens"], expected["tokens"])
  for name, value in expected.items():
    if np.issubdtype(value.dtype, np.floating):
      np.testing.assert_allclose(result[name], value, atol=2e-6, err_msg=name)
    else:
      np.testing.assert_array_equal(result[name], value, err_msg=name)


def check_gathers(facts):
  """No program but the scoring one gathers anything of the weights, and that one never a whole matrix of the base."""
  assert facts["gathers"]["ask"] == []
  matrices = {"64,32", "32,64"} | {
    f"{stack}{rows},{columns}"
    for stack in ("", "1,", "2,")
    for rows, columns in ((32, 32), (32, 16), (32, 48), (48, 32), (16, 32))
  }
  for shapes in facts["gathers"].values():
    assert not matrices & set(shapes), shapes


@pytest.mark.soak
@pytest.mark.parametrize(("population", "model"), [(4, 2)])  # two processes below have 2 x 4
def test_eight_devices_do_what_one_does(tmp_path, alone, population, model):
  facts, result = launch(tmp_path / "run", devices=8, population=population, model=model)
  check_same(result, alone[1])
  assert facts["resumed_the_same"]
  check_gathers(facts)
  assert facts["shards"]["kernel"] == [2, 32, 48 // model]
  assert facts["shards"]["left"] == [2, 48 // model, 9]
  assert facts["shards"]["children"][0] == 4 // population
  # Nothing is compiled after the first iteration but what a checkpoint needs once.
  assert facts["compilations"][0] == facts["compilations"][1]
  assert facts["compilations"][-1] == facts["compilations"][2]


def test_two_processes_do_what_one_does(tmp_path, alone):
  facts, result = launch(tmp_path / "run", devices=4, population=2, model=4, processes=2)
  check_same(result, alone[1])
  assert facts["resumed_the_same"]
  check_gathers(facts)


def test_one_device_resumes_the_same(alone):
  assert alone[0]["resumed_the_same"]


def test_where_each_array_goes():
  mesh = make_mesh(devices=jax.devices()[:1])
  basis = CoreBasis.from_experts(random_tree(0), low_rank_experts(1, (2, 1)))
  shardings = basis_shardings(basis, mesh, row_parallel=("down",))
  assert shardings.base["layers"]["up"]["kernel"].spec == PartitionSpec(None, None, "model")
  assert shardings.base["layers"]["down"]["kernel"].spec == PartitionSpec(None, "model", None)
  assert shardings.base["layers"]["up"]["bias"].spec == PartitionSpec(None, None)
  assert shardings.left["layers"]["up"]["kernel"].spec == PartitionSpec(None, None, None)
  assert shardings.right["layers"]["up"]["kernel"].spec == PartitionSpec(None, "model", None)
  assert shardings.left["layers"]["down"]["kernel"].spec == PartitionSpec(None, "model", None)
  assert shardings.left["layers"]["up"]["bias"] is None
  assert jax.tree.structure(jax.tree.map(lambda _: 0, shardings)) == jax.tree.structure(
    jax.tree.map(lambda _: 0, basis)
  )


def test_where_a_convolution_goes():
  """Its input channels are no block of its matrix's rows, so the basis of these is on every device."""
  basis = CoreBasis.from_experts(unet(0), unet(1, lead=(2,)), rank=2)
  shardings = basis_shardings(basis, make_mesh(devices=jax.devices()[:1]), row_parallel=("out",))
  assert shardings.base["down_0"]["Conv_0"]["kernel"].spec == PartitionSpec(None, None, None, "model")
  assert shardings.left["down_0"]["Conv_0"]["kernel"].spec == PartitionSpec(None, None)
  assert shardings.right["down_0"]["Conv_0"]["kernel"].spec == PartitionSpec("model", None)
  assert shardings.base["out"]["kernel"].spec == PartitionSpec(None, None, "model", None)
  assert shardings.left["out"]["kernel"].spec == shardings.right["out"]["kernel"].spec == PartitionSpec(None, None)


@pytest.mark.parametrize("axes", [{"population": 2}, {"model": 0}, {"population": 3, "model": 3}])
def test_a_mesh_of_another_size_is_refused(axes):
  with pytest.raises(ValueError, match=r"population, model: expected a product of 1.*got"):
    make_mesh(devices=jax.devices()[:1], **axes)
