"""What merges are, in float64 NumPy, one tensor at a time: written from their definitions, by sorting and by loops."""

import math

import numpy as np

STACKED = ("layers",)


def over_tensors(function, tree, *rest):
  """Applies `function` to lists of T tensors of a tree with leaves `[T, ...]`, and to those of further trees."""

  def walk(node, others, stacked):
    if isinstance(node, dict):
      return {name: walk(node[name], [other[name] for other in others], stacked or name in STACKED) for name in node}
    if not stacked:
      return function(node, *others)
    layers = range(node.shape[1])
    return np.stack([function(node[:, i], *(other[:, i] for other in others)) for i in layers])

  return walk(tree, rest, False)


def weighted(tensors, weights):
  return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))


def cut(tensor, kept):
  """All but the `kept` largest magnitudes are zeroed, and what equals the last of them stays."""
  if kept == 0:
    return np.zeros_like(tensor)
  smallest = np.sort(np.abs(tensor).ravel())[::-1][kept - 1]
  return np.where(np.abs(tensor) >= smallest, tensor, 0)


def trimmed(tensor, density):
  return cut(tensor, max(1, math.floor(density * tensor.size)))


def tails_cut(tensor, density, gamma, mergekit=False):
  top, kept = math.floor(gamma * tensor.size), math.floor(density * tensor.size)
  if mergekit:
    top = min(top, tensor.size - kept)
  kept = min(kept, tensor.size - top)
  if kept == 0:
    return np.zeros_like(tensor)
  falling = np.sort(np.abs(tensor).ravel())[::-1]
  inside = (np.abs(tensor) <= falling[top]) & (np.abs(tensor) >= falling[top + kept - 1])
  return np.where(inside, tensor, 0)


def restored(sparse, tensor):
  left, whole = np.abs(sparse).sum(), np.abs(tensor).sum()
  return sparse if min(left, whole) < 1e-7 else sparse * whole / left


def consensus(tensors, weights, normalize=True, mergekit=False):
  terms = [weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]
  mass = sum(terms)
  sign = np.where(mass >= 0, 1, -1) if mergekit else np.sign(mass)
  merged, divisor = np.zeros_like(mass), np.zeros_like(mass)
  for term, weight in zip(terms, weights, strict=True):
    says = term * sign > 0
    merged += np.where(says, term, 0)
    divisor += np.where(says, weight if mergekit else abs(weight), 0)
  return merged / np.where(divisor == 0, 1, divisor) if normalize else merged


def summed(tensors, weights, normalize=False, mergekit=False):
  mass = sum(weights) if normalize else 1.0
  return weighted(tensors, weights) / (1.0 if abs(mass) < 1e-8 else mass)


def pruned(tensor, draws, density, epsilon, mergekit=False):
  """Kept by draws, more probably the larger in its row; by the last axis, of three in mergekit by the middle one."""
  axis = 1 if mergekit and tensor.ndim > 2 else -1
  rows, moved = np.moveaxis(tensor, axis, -1), np.moveaxis(draws, axis, -1)
  result = np.zeros_like(rows)
  length = rows.shape[-1]
  for index in np.ndindex(rows.shape[:-1]):
    for rank, place in enumerate(np.argsort(np.abs(rows[index]), kind="stable")):
      keep = density + epsilon * (2 * rank / (length - 1) - 1 if mergekit else (rank + 1) / length - 0.5)
      if moved[index][place] < keep:
        result[index][place] = rows[index][place] / (1 if mergekit else keep)
  result = np.moveaxis(result, -1, axis)
  return restored(result, tensor) if mergekit else result


def dropped(tensor, draws, density, mergekit=False):
  kept = np.where(draws < density, tensor, 0)
  return restored(kept, tensor) if mergekit else kept / density


def on_arc(first, second, t, zero_cosine=1.0, straight=1 - 1e-6):
  lengths = np.linalg.norm(first), np.linalg.norm(second)
  cosine = zero_cosine if min(lengths) <= 1e-8 else np.vdot(first, second) / lengths[0] / lengths[1]
  if cosine > straight or cosine < 5e-4 - 1:
    return (1 - t) * first + t * second
  angle = np.arccos(cosine)
  return (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)


def rows_on_arc(tensors, t, axis):
  if tensors[0].ndim < 2:
    return on_arc(*tensors, t)
  first, second = (np.moveaxis(tensor, axis, -1) for tensor in tensors)
  result = np.stack([on_arc(first[i], second[i], t) for i in np.ndindex(first.shape[:-1])]).reshape(first.shape)
  return np.moveaxis(result, -1, axis)


def multislerp(tensors, weights):
  """As published: weighted mean of directions, tangents there, exponential map."""
  weights = np.array(weights) / sum(weights)
  lengths = [np.linalg.norm(tensor) for tensor in tensors]
  units = [tensor / length for tensor, length in zip(tensors, lengths, strict=True)]
  mean = weighted(units, weights)
  mean = mean / np.linalg.norm(mean)
  tangent = weighted([unit - np.vdot(unit, mean) * mean for unit in units], weights)
  far = np.linalg.norm(tangent)
  moved = np.cos(far) * mean + (np.sinc(far / np.pi)) * tangent
  return moved * weighted(lengths, weights)


def karcher(tensors, weights, steps=2000):
  """The mean on the sphere, by very many small steps downhill."""
  weights = np.array(weights) / sum(weights)
  lengths = [np.linalg.norm(tensor) for tensor in tensors]
  units = [tensor / length for tensor, length in zip(tensors, lengths, strict=True)]
  mean = units[0]
  for _ in range(steps):
    step = np.zeros_like(mean)
    for weight, unit in zip(weights, units, strict=True):
      along = np.clip(np.vdot(unit, mean), -1, 1)
      aside = unit - along * mean
      if np.linalg.norm(aside) > 1e-12:
        step += 0.1 * weight * np.arccos(along) * aside / np.linalg.norm(aside)
    mean = (mean + step) / np.linalg.norm(mean + step)
  return mean * weighted(lengths, weights)


def model_stock(tensors, floor=0.0):
  size = len(tensors)
  pairs = [(i, j) for i in range(size) for j in range(i)]
  flat = [tensor.ravel() for tensor in tensors]
  cosine = np.mean(
    [flat[i] @ flat[j] / max(np.linalg.norm(flat[i]) * np.linalg.norm(flat[j]), floor) for i, j in pairs]
  )
  return size * cosine / (1 + (size - 1) * cosine) * sum(tensors) / size


def model_stock_rows(tensors):
  if tensors[0].ndim < 2:
    return model_stock(tensors)
  rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
  return np.stack([model_stock([each[i] for each in rows]) for i in range(len(rows[0]))]).reshape(tensors[0].shape)


def sce(tensors, topk, mergekit=False):
  spread = np.var(tensors, axis=0)
  kept = math.floor(topk * np.count_nonzero(spread))
  if topk < 1:
    chosen = cut(spread, kept) != 0
    tensors = [np.where(chosen, tensor, 0) for tensor in tensors]
  squares = np.array([np.mean(tensor**2) for tensor in tensors])
  tiny = squares.sum() < 1e-6 if mergekit else squares.sum() == 0
  weights = np.full(len(tensors), 1 / len(tensors)) if tiny else squares / squares.sum()
  mass = sum(tensors)
  sign = np.where(mass >= 0, 1, -1) if mergekit else np.sign(mass)
  merged = sum(w * np.where(x * sign > 0, x, 0) for w, x in zip(weights, tensors, strict=True))
  divisor = sum(w * (x * sign > 0) for w, x in zip(weights, tensors, strict=True))
  return merged / (np.maximum(divisor, 1e-6) if mergekit else np.where(divisor == 0, 1, divisor))


def ram(tensors, r=0.0, alpha=0.0, epsilon=1e-5):
  merged = np.zeros_like(tensors[0])
  active = [np.abs(tensor) > epsilon for tensor in tensors]
  number = sum(own.astype(int) for own in active)
  ratios = [(own & (number > 1)).sum() / max((own & (number == 1)).sum(), epsilon) for own in active]
  for index in np.ndindex(merged.shape):
    there = [t for t, own in enumerate(active) if own[index]]
    if len(there) == 1:
      merged[index] = tensors[there[0]][index] * (1 + r * min(ratios[there[0]], alpha))
    elif there:
      merged[index] = np.mean([tensors[t][index] for t in there])
  return merged


def magmax(tensors):
  stacked = np.stack(tensors)
  return np.take_along_axis(stacked, np.abs(stacked).argmax(axis=0)[None], axis=0)[0]


def consensus_merge(tensors, threshold, agree):
  merged = sum(tensors)
  number = sum((np.abs(x) >= threshold * np.abs(merged - x)).astype(int) for x in tensors)
  return np.where(number >= agree, merged, 0)


def polar(columns):
  u, s, vt = np.linalg.svd(columns, full_matrices=False)
  there = s > 1e-6 * s.max(initial=0)
  return u[:, there] @ vt[there]


def on_matrices(merge):
  """`merge` of matrices, the mean of vectors."""
  return lambda tensors, *rest: merge(list(tensors), *rest) if tensors[0].ndim > 1 else np.mean(tensors, axis=0)


def tsv(tensors, rank=None):
  kept = rank or max(1, min(tensors[0].shape) // len(tensors))
  parts = [np.linalg.svd(tensor, full_matrices=False) for tensor in tensors]
  left = np.hstack([u[:, :kept] for u, _, _ in parts])
  right = np.hstack([vt[:kept].T for _, _, vt in parts])
  values = np.concatenate([s[:kept] for _, s, _ in parts])
  return polar(left) @ np.diag(values) @ polar(right).T


def iso_c(tensors):
  u, s, vt = np.linalg.svd(sum(tensors), full_matrices=False)
  return s.mean() * u @ vt


def iso_cts(tensors, common):
  size, directions = len(tensors), min(tensors[0].shape)
  own = (directions - int(common * directions)) // size
  shared = directions - size * own
  u, s, vt = np.linalg.svd(sum(tensors), full_matrices=False)
  lefts, rights, values = [u[:, :shared]], [vt[:shared].T], list(s[:shared])
  for tensor in tensors:
    beside = tensor - tensor @ vt[:shared].T @ vt[:shared]
    u_t, s_t, vt_t = np.linalg.svd(beside, full_matrices=False)
    lefts, rights, values = [*lefts, u_t[:, :own]], [*rights, vt_t[:own].T], [*values, *s_t[:own]]
  return np.mean(values) * polar(np.hstack(lefts)) @ polar(np.hstack(rights)).T


def knots(tensors, merge):
  """Side by side along the inputs; what each has of the shared directions is merged."""
  if tensors[0].ndim < 2:
    return merge(tensors)
  u, s, vt = np.linalg.svd(np.vstack(tensors), full_matrices=False)
  return merge(np.split(u, len(tensors))) @ np.diag(s) @ vt


def wudi(tensors, ridge):
  """By the normal equations of all squared differences, written out as one tall least-squares problem."""
  middle = sum(tensors)
  rows = [tensor.T / np.linalg.norm(tensor) for tensor in tensors]
  targets = [row @ (tensor - middle) for row, tensor in zip(rows, tensors, strict=True)]
  tall = np.vstack([*rows, np.sqrt(ridge) * np.eye(middle.shape[0])])
  wide = np.vstack([*targets, np.zeros((middle.shape[0], middle.shape[1]))])
  return middle + np.linalg.lstsq(tall, wide, rcond=None)[0]


def regmean(tensors, grams, alpha):
  reduced = [gram * (alpha + (1 - alpha) * np.eye(len(gram))) for gram in grams]
  return np.linalg.solve(sum(reduced), sum(g @ x for g, x in zip(reduced, tensors, strict=True)))


def divergence(origin, difference):
  """KL of two softmaxes over the last axis, by their logarithms."""

  def log_softmax(x):
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

  after, before = log_softmax(origin + difference), log_softmax(origin)
  return (np.exp(after) * (after - before)).sum(axis=-1, keepdims=True)


def arcee_fusion(difference, base):
  importance = np.abs(difference) * divergence(base, difference)
  ordered = np.sort(importance.ravel())
  lower, middle, upper = (ordered[(quarter * (ordered.size - 1)) // 4] for quarter in (1, 2, 3))
  return np.where(importance >= middle + 1.5 * (upper - lower), difference, 0)
