"""The long tests use the cases of the others."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ("run", "sandbox")]
