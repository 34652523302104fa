"""cqd_jax evolves populations of neural networks by model merging, as JAX array programs."""

__version__ = "0.1.0"
