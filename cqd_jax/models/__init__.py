"""The decoder-only transformer, its decoding and its fine-tuning, as plain functions on nested params dicts."""

from cqd_jax.models.config import DecoderConfig, RopeScaling
from cqd_jax.models.decoder import forward, init_params, linear, unstack_layers
from cqd_jax.models.decoding import decode_population, greedy_decode
from cqd_jax.models.prompts import PromptBucket, bucket_population_prompts, bucket_prompts
from cqd_jax.models.training import Batch, TrainStep, loss, make_optimizer, make_train_step, pack

__all__ = [
  "Batch",
  "DecoderConfig",
  "PromptBucket",
  "RopeScaling",
  "TrainStep",
  "bucket_population_prompts",
  "bucket_prompts",
  "decode_population",
  "forward",
  "greedy_decode",
  "init_params",
  "linear",
  "loss",
  "make_optimizer",
  "make_train_step",
  "pack",
  "unstack_layers",
]
