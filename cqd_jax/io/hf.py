"""The older name of `cqd_jax.hub`: Hugging Face folders, read and written."""

from cqd_jax.hub import ModelFolder, Pretrained, load_pretrained, open_pretrained, save_pretrained

__all__ = ["ModelFolder", "Pretrained", "load_pretrained", "open_pretrained", "save_pretrained"]
