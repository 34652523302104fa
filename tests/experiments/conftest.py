import importlib.util

import pytest


@pytest.fixture(scope="session")
def script(pytestconfig):
  """A script of experiments/ as a module, by its name."""

  def load(name):
    spec = importlib.util.spec_from_file_location(name, pytestconfig.rootpath / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

  return load
