"""`python -m benchmarks memory`: from shapes only, what evolving a swarm in core space needs of device memory."""

import argparse
from collections.abc import Sequence

from rich.console import Console

from cqd_jax.models import DecoderConfig
from cqd_jax.run.memory import Plan, table
from cqd_jax.tasks.skills.training import MINIATURE

MODELS = {
  "miniature": MINIATURE,
  "llama3.2-1b": DecoderConfig(128_256, 2048, 8192, 16, 32, 8, 64, tie_embeddings=True),
  "llama3-8b": DecoderConfig(128_256, 4096, 14_336, 32, 32, 8, 128),
  "llama3-70b": DecoderConfig(128_256, 8192, 28_672, 80, 64, 8, 128),
  "mistral-7b": DecoderConfig(32_768, 4096, 14_336, 32, 32, 8, 128),
  "qwen2.5-7b": DecoderConfig(152_064, 3584, 18_944, 28, 28, 4, 128, qkv_bias=True),
  "qwen3-8b": DecoderConfig(151_936, 4096, 12_288, 36, 32, 8, 128, qk_norm=True),
}
"""Shapes of published models."""

WIDTH = 120
"""Columns of the table where it does not go to a terminal."""


def main(arguments: Sequence[str]) -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks memory",
    description="From shapes only: the memory of evolving a swarm in core space, and the devices that it needs.",
    epilog="example: python -m benchmarks memory --model llama3-8b --rank 16 --elites 675",
  )
  parser.add_argument("--model", choices=MODELS, default="llama3-8b")
  options: dict[str, tuple[int, str]] = {
    "rank": (16, "of each expert's task vector"),
    "elites": (675, "individuals in the archives (default: %(default)s, 3 archives of 15 x 15 cells)"),
    "experts": (3, "K"),
    "population": (16, "children decoded side by side"),
    "prompts": (8, "prompts decoded side by side for each child"),
    "prompt-tokens": (512, "of a prompt, at most"),
    "answer-tokens": (512, "of an answer, at most"),
  }
  for name, (default, text) in options.items():
    parser.add_argument(f"--{name}", type=_positive, default=default, help=text)
  parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of weights and caches")
  parser.add_argument("--embeddings", action="store_true", help="the experts changed embedding and head too")
  parser.add_argument("--device-gb", type=float, default=80.0, help="memory of a device, of which 90%% are counted on")
  given = vars(parser.parse_args(arguments))
  device_gb = given.pop("device_gb")
  if not device_gb > 0:
    parser.error("--device-gb: expected more than 0")
  name = given.pop("model")
  plan = Plan(name=name, config=MODELS[name], **given)
  console = Console()
  (console if console.is_terminal else Console(width=WIDTH)).print(table(plan, device_gb))


def _positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
  return value
