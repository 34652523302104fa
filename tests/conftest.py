"""Strictness for the whole suite: warnings are errors, ranks never promote, shapes are checked as code runs."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
hook = install_import_hook("cqd_jax", "beartype.beartype")
