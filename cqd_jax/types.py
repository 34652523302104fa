"""Names of the things that travel between the modules; shapes are given where they are used."""

from typing import Any, TypeAlias

import jax

Params: TypeAlias = Any
"""Weights of ONE model, or a task vector: a pytree of arrays, Flax-style nested dicts as a rule."""

Genotype: TypeAlias = Any
"""What an individual is stored as: a pytree of arrays. A population stacks it on a leading axis P."""

PRNGKey: TypeAlias = jax.Array
"""A typed key of `jax.random.key`; used once."""

Metrics: TypeAlias = dict[str, jax.Array]
"""Figures of one iteration by name."""

ExtraScores: TypeAlias = dict[str, Any]
"""What a scoring function reports beside the K task scores; leaves `[P, ...]`."""

ArrayField: TypeAlias = Any
"""An array in a pytree class. JAX puts other things there while it traces and lowers, so no shape is enforced."""
