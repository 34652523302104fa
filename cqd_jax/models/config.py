"""The settings of a decoder: what distinguishes Llama, Mistral, Qwen and the miniature from one another."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """The frequency scaling of Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated.

  Attributes:
    factor: by how much long wavelengths are stretched, at least 1.
    low_freq_factor: wavelengths above `original_max_positions / low_freq_factor` are stretched in full.
    high_freq_factor: wavelengths below `original_max_positions / high_freq_factor` are kept.
    original_max_positions: the context length before stretching.

  Raises:
    ValueError: if a field is outside its range.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int

  def __post_init__(self) -> None:
    _check_at_least("RopeScaling", "factor", self.factor, 1)
    _check_positive("RopeScaling", "low_freq_factor", self.low_freq_factor)
    _check_at_least("RopeScaling", "original_max_positions", self.original_max_positions, 1)
    if not self.high_freq_factor > self.low_freq_factor:
      raise ValueError(
        f"RopeScaling.high_freq_factor: expected more than low_freq_factor={self.low_freq_factor}, "
        f"got {self.high_freq_factor}"
      )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder-only transformer: RMS norms before each part, rotary positions, gated SiLU feed-forward.

  Llama 2 and 3, Mistral, Qwen2, Qwen2.5 and Qwen3 are instances. Hashable, so it can be a static argument of a
  jitted function.

  Attributes:
    vocab_size: V, the number of tokens.
    hidden_size: width of the residual stream.
    intermediate_size: width of the feed-forward part.
    num_layers: L.
    num_heads: number of query heads.
    num_kv_heads: number of key and value heads; divides `num_heads`. Fewer than `num_heads` is grouped-query attention.
    head_dim: width of a head, even; `num_heads * head_dim` need not equal `hidden_size`.
    rope_theta: base of the rotary wavelengths.
    rope_scaling: how the wavelengths are stretched, or None.
    rms_norm_eps: added to the mean square in every norm.
    qkv_bias: whether query, key and value have biases (Qwen2).
    output_bias: whether the attention's output has a bias.
    mlp_bias: whether the three kernels of the feed-forward part have biases.
    qk_norm: whether each query and key head is RMS-normalized before its rotation (Qwen3).
    tie_embeddings: whether the head is the transposed embedding.
    sliding_window: number of latest positions, its own included, that a position sees (Mistral 7B v0.1); None for all.

  Raises:
    ValueError: if a field is outside its range; it is named.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  rms_norm_eps: float = 1e-6
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  tie_embeddings: bool = False
  sliding_window: int | None = None

  def __post_init__(self) -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for name in sizes:
      _check_at_least("DecoderConfig", name, getattr(self, name), 1)
    if self.sliding_window is not None:
      _check_at_least("DecoderConfig", "sliding_window", self.sliding_window, 1)
    _check_positive("DecoderConfig", "rope_theta", self.rope_theta)
    _check_positive("DecoderConfig", "rms_norm_eps", self.rms_norm_eps)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"DecoderConfig.num_kv_heads: expected a divisor of num_heads={self.num_heads}, got {self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"DecoderConfig.head_dim: expected an even width (rotation pairs it), got {self.head_dim}")


def _check_at_least(owner: str, name: str, value: float | int, low: int) -> None:
  if not value >= low:
    raise ValueError(f"{owner}.{name}: expected at least {low}, got {value}")


def _check_positive(owner: str, name: str, value: float) -> None:
  if not value > 0:
    raise ValueError(f"{owner}.{name}: expected a positive number, got {value}")
