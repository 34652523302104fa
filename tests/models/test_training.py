import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoder_cases import CONFIGS, PLAIN, make_model, random_tokens, to_float64
from decoder_reference import logits

from cqd_jax.models import forward, greedy_decode, init_params, loss, make_optimizer, make_train_step, pack

cross_entropy = jax.jit(loss, static_argnums=1)


def ragged_sequences(count, longest, vocab_size=23, seed=0):
  source = np.random.default_rng(seed)
  sequences = [source.integers(1, vocab_size, source.integers(1, longest + 1)).tolist() for _ in range(count)]
  masks = [[i >= len(sequence) // 2 for i in range(len(sequence))] for sequence in sequences]
  return sequences, masks


def unpack(batch):
  """The segments of a batch: tokens, positions, targets that count."""
  for row in range(len(batch.token_ids)):
    for segment in range(1, batch.segment_ids[row].max() + 1):
      here = batch.segment_ids[row] == segment
      yield [field[row][here].tolist() for field in batch]


def test_packing_loses_nothing_and_learns_answers_alone():
  sequences, masks = ragged_sequences(60, 16)
  batch = pack(sequences, masks, row_length=16)
  found = []
  for tokens, _, positions, targets, learnt in unpack(batch):
    assert positions == list(range(len(tokens)))
    assert learnt[-1] == 0  # what follows the last token is another sequence
    assert all(target == following for target, following, one in zip(targets, tokens[1:], learnt, strict=False) if one)
    found.append((tokens, [0, *(int(one) for one in learnt[:-1])]))
  expected = [(sequence, [0, *(int(one) for one in mask[1:])]) for sequence, mask in zip(sequences, masks, strict=True)]
  assert sorted(found) == sorted(expected)
  padding = batch.segment_ids == 0
  assert not batch.token_ids[padding].any()
  assert not batch.loss_mask[padding].any()


def test_packing_wastes_little():
  sequences, masks = ragged_sequences(200, 12)
  batch = pack(sequences, masks, row_length=24)
  tokens = sum(len(sequence) for sequence in sequences)
  # best fit of short pieces, longest first, fills all rows but the last few
  assert len(batch.token_ids) <= tokens // 24 + 2


def test_packing_by_hand():
  batch = pack([[5, 6], [7, 8, 9], [4]], [[False, True], [False, False, True], [True]], row_length=5)
  np.testing.assert_array_equal(batch.token_ids, [[7, 8, 9, 5, 6], [4, 0, 0, 0, 0]])
  np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 2, 2], [1, 0, 0, 0, 0]])
  np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(batch.targets, [[0, 9, 0, 6, 0], [0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(batch.loss_mask, [[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize(
  ("sequences", "masks", "named"),
  [
    ([[1, 2, 3]], [[True] * 3], r"sequences\[0\]"),
    ([[1], []], [[True], []], r"sequences\[1\]"),
    ([[1, 2]], [[True]], r"answer_masks\[0\]"),
    ([[1, 2]], [], "answer_masks"),
  ],
)
def test_packing_refuses(sequences, masks, named):
  with pytest.raises(ValueError, match=named):
    pack(sequences, masks, row_length=2)


def test_loss_is_that_of_the_sequences_alone():
  config = CONFIGS["everything"]
  params = make_model(config)
  sequences, masks = ragged_sequences(6, 6)
  total, count = 0.0, 0
  for sequence, mask in zip(sequences, masks, strict=True):
    for step, row in enumerate(logits(to_float64(params), config, sequence)[:-1]):
      if mask[step + 1]:
        total += np.log(np.exp(row).sum()) - row[sequence[step + 1]]
        count += 1
  batch = pack(sequences, masks, row_length=12)
  assert len(batch.token_ids) < 6  # some do share a row
  np.testing.assert_allclose(cross_entropy(params, config, batch), total / count, rtol=1e-5)


def test_loss_without_answers_is_zero():
  batch = pack([[1, 2]], [[False, False]], row_length=3)
  assert float(cross_entropy(make_model(PLAIN), PLAIN, batch)) == 0.0


def test_one_step_is_adamw_by_hand():
  params = make_model(PLAIN)
  sequences, masks = ragged_sequences(4, 6)
  batch = pack(sequences, masks, row_length=12)
  before, gradient = to_float64(params), to_float64(jax.jit(jax.grad(loss), static_argnums=1)(params, PLAIN, batch))
  optimizer = make_optimizer(weight_decay=0.1, max_norm=0.01)
  state = optimizer.init(params)
  after, _, value = make_train_step(PLAIN, optimizer)(params, state, batch, 0.5)
  norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
  assert norm > 0.01  # the gradient is clipped
  for path, leaf in jax.tree.leaves_with_path(after):
    was, slope = before, gradient
    for entry in path:
      was, slope = was[entry.key], slope[entry.key]
    clipped = slope * 0.01 / norm
    decay = 0.1 if path[-1].key in ("kernel", "embedding") else 0.0
    # bias-corrected, the first step of Adam is the gradient over its own magnitude
    expected = was - 0.5 * (clipped / (np.abs(clipped) + 1e-8) + decay * was)
    # entries whose gradient is rounding noise may go either way
    certain = np.abs(clipped) > 1e-7
    np.testing.assert_allclose(np.asarray(leaf)[certain], expected[certain], rtol=1e-3, atol=1e-3)
    assert certain.any()
  np.testing.assert_allclose(value, cross_entropy(jax.tree.map(jnp.float32, before), PLAIN, batch), rtol=1e-5)


def test_training_learns_to_copy():
  # prompt: three tokens and a colon (1); answer: the same three and an end (2)
  source = np.random.default_rng(0)
  prompts = [[*source.integers(3, 9, 3).tolist(), 1] for _ in range(96)]
  sequences = [[*prompt, *prompt[:3], 2] for prompt in prompts]
  batch = pack(sequences, [[False] * 4 + [True] * 4] * 96, row_length=32)
  params = init_params(jax.random.key(0), PLAIN)
  optimizer = make_optimizer()
  state, step = optimizer.init(params), make_train_step(PLAIN, optimizer)
  losses = []
  for iteration in range(300):
    params, state, value = step(params, state, batch, 0.01 * (1 - iteration / 300))
    losses.append(float(value))
  assert losses[0] > 2.0
  assert losses[-1] < 0.05
  tokens, _ = greedy_decode(
    params,
    PLAIN,
    np.array(prompts, np.int32),
    np.full(96, 4, np.int32),
    max_new_tokens=5,
    end_ids=(2,),
  )
  right = (np.asarray(tokens)[:, :4] == np.array([sequence[4:] for sequence in sequences])).all(axis=1)
  assert right.mean() > 0.9


def test_one_compilation_serves_every_learning_rate():
  batch = pack([[1, 2, 3]], [[False, True, True]], row_length=4)
  optimizer, traces = make_optimizer(), []

  def counted(*arguments):
    traces.append(1)
    return optimizer.update(*arguments)

  step = make_train_step(PLAIN, optax.GradientTransformation(optimizer.init, counted))
  params = make_model(PLAIN)
  state = optimizer.init(params)
  for rate in (0.1, 0.0, 1e-4):
    params, state, _ = step(params, state, batch, rate)
  assert len(traces) == 1


def test_training_keeps_bfloat16_and_a_rate_of_zero_changes_nothing():
  params = make_model(PLAIN, dtype="bfloat16")
  before = to_float64(params)
  optimizer = make_optimizer()
  batch = pack([random_tokens(PLAIN, 5).tolist()], [[True] * 5], row_length=5)
  after, _, _ = make_train_step(PLAIN, optimizer)(params, optimizer.init(params), batch, 0.0)
  assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("bfloat16")}
  jax.tree.map(np.testing.assert_array_equal, to_float64(after), before)


def test_packed_logits_equal_those_alone():
  params = make_model(PLAIN)
  sequences, masks = ragged_sequences(5, 6)
  batch = pack(sequences, masks, row_length=10)
  packed = jax.jit(forward, static_argnums=1)(
    params, PLAIN, batch.token_ids, segment_ids=batch.segment_ids, positions=batch.positions
  )
  for row in range(len(packed)):
    for segment in range(1, batch.segment_ids[row].max() + 1):
      here = batch.segment_ids[row] == segment
      alone = logits(to_float64(params), PLAIN, batch.token_ids[row][here])
      np.testing.assert_allclose(np.asarray(packed)[row][here], alone, rtol=2e-5, atol=2e-5)
