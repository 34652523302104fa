"""Model folders and adapters in the format of Hugging Face, in and out."""

from cqd_jax.hub.load import ModelFolder, Pretrained, load_pretrained, open_pretrained
from cqd_jax.hub.save import save_pretrained

__all__ = ["ModelFolder", "Pretrained", "load_pretrained", "open_pretrained", "save_pretrained"]
