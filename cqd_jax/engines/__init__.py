"""Who produces text: the decoder in this process (`local`), or anything that follows `Engine`."""

from cqd_jax.engines.engine import Candidates, Engine
from cqd_jax.engines.local import LocalEngine, local

__all__ = ["Candidates", "Engine", "LocalEngine", "local"]
