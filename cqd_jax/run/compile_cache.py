"""Compiled programs are kept on disk: what one command has compiled, the next one reads."""

import os
from pathlib import Path

import jax

FOLDER = "compiled"
LEAST_SECONDS = 0.2
"""Programs that compile faster are not worth a file."""


def use_compile_cache(cache_dir: Path) -> None:
  """Turns on JAX's persistent compilation cache, in a folder of `cache_dir`, unless the user has chosen another."""
  if getattr(jax.config, "jax_compilation_cache_dir", None) or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return
  jax.config.update("jax_compilation_cache_dir", str((cache_dir / FOLDER).absolute()))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
