import pytest
from decoder_cases import CONFIGS


@pytest.fixture(params=CONFIGS)
def config(request):
  """Each feature of the decoder for itself, and many at once."""
  return CONFIGS[request.param]
