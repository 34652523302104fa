"""The decoder once more, token by token and head by head in float64 NumPy, from the papers: no masks, no batches."""

import math

import numpy as np


def wavelengths_in_radians(config):
  """Radians a position, one by one."""
  frequencies = []
  for pair in range(config.head_dim // 2):
    frequency = 1.0 / config.rope_theta ** (2 * pair / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
      wavelength = 2 * math.pi / frequency
      longest_kept = scaling.original_max_positions / scaling.high_freq_factor
      shortest_stretched = scaling.original_max_positions / scaling.low_freq_factor
      if wavelength > shortest_stretched:
        frequency /= scaling.factor
      elif wavelength > longest_kept:
        smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
          scaling.high_freq_factor - scaling.low_freq_factor
        )
        frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    frequencies.append(frequency)
  return frequencies


def norm(scale, x, eps):
  return scale * x / np.sqrt(np.mean(x**2) + eps)


def dense(weights, layer, x):
  y = x @ weights["kernel"][layer]
  return y + weights["bias"][layer] if "bias" in weights else y


def turn(config, head, position):
  half = config.head_dim // 2
  turned = np.empty_like(head)
  for i, frequency in enumerate(wavelengths_in_radians(config)):
    z = complex(head[i], head[i + half]) * np.exp(1j * position * frequency)
    turned[i], turned[i + half] = z.real, z.imag
  return turned


def attention(weights, config, layer, stream):
  """One attention part; `stream` is `[T, d]`, already normed."""
  group = config.num_heads // config.num_kv_heads
  queries, keys, values = [], [], []
  for position, x in enumerate(stream):
    query = dense(weights["query"], layer, x).reshape(config.num_heads, config.head_dim)
    key = dense(weights["key"], layer, x).reshape(config.num_kv_heads, config.head_dim)
    if config.qk_norm:
      query = np.stack([norm(weights["query_norm"]["scale"][layer], h, config.rms_norm_eps) for h in query])
      key = np.stack([norm(weights["key_norm"]["scale"][layer], h, config.rms_norm_eps) for h in key])
    queries.append([turn(config, head, position) for head in query])
    keys.append([turn(config, head, position) for head in key])
    values.append(dense(weights["value"], layer, x).reshape(config.num_kv_heads, config.head_dim))
  outputs = []
  for t in range(len(stream)):
    oldest = 0 if config.sliding_window is None else max(0, t - config.sliding_window + 1)
    heads = []
    for h in range(config.num_heads):
      scores = [queries[t][h] @ keys[s][h // group] / math.sqrt(config.head_dim) for s in range(oldest, t + 1)]
      exponentials = np.exp(np.array(scores) - max(scores))
      chances = exponentials / exponentials.sum()
      heads.append(sum(p * values[s][h // group] for p, s in zip(chances, range(oldest, t + 1), strict=True)))
    outputs.append(dense(weights["output"], layer, np.concatenate(heads)))
  return np.stack(outputs)


def logits(params, config, tokens):
  """`[T, V]` float64 logits of one sequence without padding."""
  layers, eps = params["layers"], config.rms_norm_eps
  stream = np.stack([params["embed"]["embedding"][token] for token in tokens])
  for layer in range(config.num_layers):
    normed = np.stack([norm(layers["attention_norm"]["scale"][layer], x, eps) for x in stream])
    stream = stream + attention(layers["attention"], config, layer, normed)
    for t, x in enumerate(stream.copy()):
      x = norm(layers["mlp_norm"]["scale"][layer], x, eps)
      gate = dense(layers["mlp"]["gate"], layer, x)
      stream[t] += dense(
        layers["mlp"]["down"], layer, gate / (1 + np.exp(-gate)) * dense(layers["mlp"]["up"], layer, x)
      )
  stream = np.stack([norm(params["final_norm"]["scale"], x, eps) for x in stream])
  return stream @ (params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"])
