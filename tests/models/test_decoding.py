import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import CONFIGS, PLAIN, make_model, random_tokens

from cqd_jax.models import (
  PromptBucket,
  bucket_population_prompts,
  bucket_prompts,
  decode_population,
  forward,
  greedy_decode,
)
from cqd_jax.models.decoding import even_group_size

run = jax.jit(forward, static_argnums=1)

LENGTHS = (1, 6, 3, 6, 2)


def ragged(config, lengths=LENGTHS, seed=2):
  """Prompts, and the same as `[B, T]` with padding on the right that must not matter."""
  prompts = [random_tokens(config, length, seed=seed + row) for row, length in enumerate(lengths)]
  padded = random_tokens(config, len(prompts), max(lengths), seed=99)
  for row, prompt in enumerate(prompts):
    padded[row, : len(prompt)] = prompt
  return prompts, padded, np.array(lengths, np.int32)


def uncached(params, config, prompts, max_new_tokens, end_ids, pad_id=0):
  """Greedy decoding by one whole forward pass a token and a prompt, in a row of fixed width (one compilation)."""
  width = max(len(prompt) for prompt in prompts) + max_new_tokens
  answers = np.full((len(prompts), max_new_tokens), pad_id)
  lengths = np.full(len(prompts), max_new_tokens)
  for row, prompt in enumerate(prompts):
    sequence = list(prompt)
    for step in range(max_new_tokens):
      token_ids = np.array([sequence + [0] * (width - len(sequence))], np.int32)
      token = int(np.argmax(run(params, config, token_ids)[0, len(sequence) - 1]))
      answers[row, step] = token
      sequence.append(token)
      if token in end_ids:
        lengths[row] = step
        break
  return answers, lengths


def countdown(vocab_size=23, dtype="float32"):
  """A decoder that says n - 1 after n: its layers add nothing, its head is a shifted identity."""
  config = dataclasses.replace(PLAIN, vocab_size=vocab_size, hidden_size=vocab_size)
  params = make_model(config, dtype=dtype)
  for part in (params["layers"]["attention"]["output"], params["layers"]["mlp"]["down"]):
    part["kernel"] = jnp.zeros_like(part["kernel"])
  params["embed"]["embedding"] = jnp.eye(vocab_size, dtype=dtype)
  params["final_norm"]["scale"] = jnp.ones(vocab_size, dtype)
  params["head"]["kernel"] = jnp.eye(vocab_size, k=-1, dtype=dtype)
  return params, config


@pytest.mark.parametrize("name", ["plain", "grouped", "qk_norm", "qkv_bias", "tied", "window", "everything"])
def test_cached_and_uncached_agree_token_for_token(name):
  config = CONFIGS[name]
  params = make_model(config)
  prompts, padded, lengths = ragged(config)
  free, _ = uncached(params, config, prompts, 8, end_ids=())
  assert len(set(free.ravel().tolist())) > 4  # the model does say something
  # end tokens that this model says: early in one row, later in others, and possibly as a row's first
  for end_ids in ((int(free[1, 2]), int(free[4, 5])), (int(free[0, 0]), int(free[2, 4]))):
    expected, expected_lengths = uncached(params, config, prompts, 8, end_ids, pad_id=7)
    tokens, found = greedy_decode(params, config, padded, lengths, max_new_tokens=8, end_ids=end_ids, pad_id=7)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(found, expected_lengths)


def test_each_row_stops_at_its_own_end_token():
  params, config = countdown()
  # the last token of a prompt says how many tokens follow; 0 ends
  prompts = [[9, 1], [5], [3, 3, 4], [8, 12], [2]]
  tokens, lengths = greedy_decode(
    params,
    config,
    np.array([[9, 1, 0], [5, 0, 0], [3, 3, 4], [8, 12, 0], [2, 0, 0]], np.int32),
    np.array([len(prompt) for prompt in prompts], np.int32),
    max_new_tokens=6,
    end_ids=(0,),
    pad_id=22,
  )
  assert tokens.dtype == lengths.dtype == jnp.int32
  np.testing.assert_array_equal(
    tokens,
    [
      [0, 22, 22, 22, 22, 22],  # the end token first
      [4, 3, 2, 1, 0, 22],
      [3, 2, 1, 0, 22, 22],
      [11, 10, 9, 8, 7, 6],  # no end token in time
      [1, 0, 22, 22, 22, 22],
    ],
  )
  np.testing.assert_array_equal(lengths, [0, 4, 3, 6, 1])


def test_padding_may_be_the_end_token_or_any_of_several():
  params, config = countdown()
  tokens, lengths = greedy_decode(
    params,
    config,
    np.array([[6], [2], [1]], np.int32),
    np.array([1, 1, 1], np.int32),
    max_new_tokens=4,
    end_ids=(3, 0),
    pad_id=3,
  )
  np.testing.assert_array_equal(tokens, [[5, 4, 3, 3], [1, 0, 3, 3], [0, 3, 3, 3]])
  np.testing.assert_array_equal(lengths, [2, 1, 0])


def test_one_new_token():
  params, config = countdown()
  prompts = np.array([[4, 2], [1, 9]], np.int32)
  tokens, lengths = greedy_decode(params, config, prompts, np.array([2, 1], np.int32), max_new_tokens=1, end_ids=(0,))
  np.testing.assert_array_equal(tokens, [[1], [0]])
  np.testing.assert_array_equal(lengths, [1, 0])


def test_ties_go_to_the_lowest_id():
  params, config = countdown()
  # 2 and 5 are equally likely after 6, and more so than 1, which is what 2 and 5 say
  kernel = np.zeros((23, 23), np.float32)
  kernel[6, [5, 2]], kernel[[2, 5], 1] = 1.0, 1.0
  params["head"]["kernel"] = jnp.asarray(kernel)
  tokens, _ = greedy_decode(
    params, config, np.array([[6]], np.int32), np.array([1], np.int32), max_new_tokens=2, end_ids=()
  )
  np.testing.assert_array_equal(tokens, [[2, 1]])


def test_bfloat16_tokens_are_likeliest_within_its_accuracy():
  config = CONFIGS["everything"]
  params = make_model(config, dtype="bfloat16")
  prompts, padded, lengths = ragged(config)
  tokens, _ = greedy_decode(params, config, padded, lengths, max_new_tokens=6, end_ids=())
  for prompt, answer in zip(prompts, np.asarray(tokens), strict=True):
    sequence = np.zeros(12, np.int32)  # of one width, for one compilation
    sequence[: len(prompt) + 6] = [*prompt, *answer]
    logits = np.asarray(run(params, config, sequence[None]))[0]
    said = logits[len(prompt) - 1 : len(prompt) + 5]
    # the cache sums in another order; a token may differ from the argmax only where the two are about equal
    assert (said[np.arange(6), answer] > said.max(axis=1) - 0.08 * logits.std()).all()


@pytest.mark.parametrize(("name", "group_size"), [("grouped", 1), ("grouped", 4), ("everything", 2)])
def test_a_population_decodes_as_its_members_do(name, group_size):
  config = CONFIGS[name]
  members = [make_model(config, seed) for seed in range(4)]
  population = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
  prompts, padded, lengths = ragged(config)
  settings = {"max_new_tokens": 7, "pad_id": 4}
  # an end token that some members say at once, and others late or never
  free, _ = greedy_decode(members[0], config, padded, lengths, end_ids=(), **settings)
  end_ids = (int(free[0, 0]), int(free[1, 3]))
  tokens, found = decode_population(
    population, config, bucket_prompts(prompts, num_buckets=2), end_ids=end_ids, group_size=group_size, **settings
  )
  assert tokens.shape == (4, 5, 7)
  for member, its_tokens, its_lengths in zip(members, tokens, found, strict=True):
    expected, expected_lengths = greedy_decode(member, config, padded, lengths, end_ids=end_ids, **settings)
    np.testing.assert_array_equal(its_tokens, expected)
    np.testing.assert_array_equal(its_lengths, expected_lengths)
  assert len(np.unique(found)) > 2


@pytest.mark.parametrize(("name", "group_size"), [("grouped", 1), ("everything", 2), ("plain", 4)])
def test_candidates_continue_their_own_prompts(name, group_size):
  config = CONFIGS[name]
  members = [make_model(config, seed) for seed in range(4)]
  population = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
  # Of each row the longest prompt is another candidate's.
  own = [ragged(config, np.roll(LENGTHS, candidate), seed=10 * candidate) for candidate in range(4)]
  buckets = bucket_population_prompts([prompts for prompts, _, _ in own], num_buckets=2)
  settings = {"max_new_tokens": 7, "pad_id": 4}
  free, _ = greedy_decode(members[0], config, *own[0][1:], end_ids=(), **settings)
  end_ids = (int(free[0, 0]), int(free[1, 3]))
  tokens, found = decode_population(population, config, buckets, end_ids=end_ids, group_size=group_size, **settings)
  assert tokens.shape == (4, 5, 7)
  for candidate, (_, padded, lengths) in enumerate(own):
    expected, expected_lengths = greedy_decode(members[candidate], config, padded, lengths, end_ids=end_ids, **settings)
    np.testing.assert_array_equal(tokens[candidate], expected)
    np.testing.assert_array_equal(found[candidate], expected_lengths)
  assert len(np.unique(found)) > 2


@pytest.mark.parametrize("group_size", [1, 3])
def test_some_prompts_are_of_all_and_some_are_a_candidates_own(group_size):
  params, config = countdown()
  population = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params)
  shared = PromptBucket(np.array([2, 0], np.int32), np.array([[9, 4], [3, 0]], np.int32), np.array([2, 1], np.int32))
  own = PromptBucket(
    np.array([1], np.int32),
    np.array([[[5, 0, 0]], [[8, 2, 0]], [[8, 8, 7]]], np.int32),
    np.array([[1], [2], [3]], np.int32),
  )
  tokens, lengths = decode_population(
    population, config, [shared, own], max_new_tokens=3, end_ids=(0,), pad_id=22, group_size=group_size
  )
  for candidate, answer in enumerate(([4, 3, 2], [1, 0, 22], [6, 5, 4])):
    np.testing.assert_array_equal(tokens[candidate], [[2, 1, 0], answer, [3, 2, 1]])
  np.testing.assert_array_equal(lengths, [[2, 3, 3], [2, 1, 3], [2, 3, 3]])


def test_own_prompts_inside_jit():
  params, config = countdown()
  population = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), params)
  buckets = bucket_population_prompts([[[5, 3]], [[9]]], num_buckets=1)
  decode = jax.jit(functools.partial(decode_population, config=config, max_new_tokens=2, end_ids=(0,)))
  tokens, _ = decode(population, buckets=buckets)
  np.testing.assert_array_equal(tokens, [[[2, 1]], [[8, 7]]])


def test_a_population_that_ends_at_different_steps():
  slow, config = countdown()
  fast = jax.tree.map(jnp.copy, slow)
  fast["head"]["kernel"] = jnp.eye(23, k=-2)  # counts in twos
  population = jax.tree.map(lambda *leaves: jnp.stack(leaves), slow, fast)
  tokens, lengths = decode_population(
    population,
    config,
    bucket_prompts([[4], [1, 2]], num_buckets=1),
    max_new_tokens=5,
    end_ids=(0,),
    pad_id=9,
    group_size=2,
  )
  np.testing.assert_array_equal(tokens[0], [[3, 2, 1, 0, 9], [1, 0, 9, 9, 9]])
  np.testing.assert_array_equal(tokens[1], [[2, 0, 9, 9, 9], [0, 9, 9, 9, 9]])
  np.testing.assert_array_equal(lengths, [[3, 1], [1, 0]])


@pytest.mark.parametrize(
  ("num_candidates", "most", "size"),
  [(6, 1, 1), (6, 3, 3), (6, 6, 6), (6, 100, 6), (1, 4, 1), (5, 2, 2), (5, 3, 3), (5, 4, 3), (9, 8, 5), (7, 3, 3)],
)
def test_groups_are_as_few_and_as_even_as_may_be(num_candidates, most, size):
  assert even_group_size(num_candidates, most) == size


@pytest.mark.parametrize("group_size", [2, 4, 7])  # 2 + 2 + 1, 3 + 2, 5
@pytest.mark.parametrize("own", [False, True], ids=["same prompts", "own prompts"])
def test_any_number_of_candidates_is_decoded_in_groups_and_in_order(group_size, own):
  """Candidate p says n - 1 - p after n, so that no two agree."""
  params, config = countdown()
  population = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), params)
  population["head"]["kernel"] = jnp.stack([jnp.eye(23, k=-1 - p) for p in range(5)])
  prompts = [[[20 + own * p % 3], [1, 11 - own * p]] for p in range(5)]
  buckets = bucket_population_prompts(prompts, num_buckets=2) if own else bucket_prompts(prompts[0], num_buckets=2)
  tokens, lengths = decode_population(
    population, config, buckets, max_new_tokens=3, end_ids=(0,), pad_id=22, group_size=group_size
  )
  assert (tokens.shape, lengths.shape) == ((5, 2, 3), (5, 2))
  for p, row in np.ndindex(5, 2):
    expected = [prompts[p][row][-1] - step * (p + 1) for step in (1, 2, 3)]
    # beyond 0 all tokens are equally likely, and the lowest is 0
    expected = [max(token, 0) for token in expected]
    length = expected.index(0) if 0 in expected else 3
    expected[length + 1 :] = [22] * len(expected[length + 1 :])
    assert tokens[p, row].tolist() == expected
    assert lengths[p, row] == length


@pytest.mark.usefixtures("optimized")
def test_a_group_that_is_not_full_makes_no_copy_of_the_population():
  config = dataclasses.replace(PLAIN, vocab_size=512, hidden_size=64, intermediate_size=256)
  params = make_model(config)
  population = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((9, *leaf.shape), leaf.dtype), params)
  decode = functools.partial(decode_population, config=config, max_new_tokens=2, end_ids=(), group_size=2)
  buckets = bucket_prompts([[1, 2]], num_buckets=1)
  program = jax.jit(lambda params: decode(params, buckets=buckets)).lower(population).compile()
  one = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert program.memory_analysis().temp_size_in_bytes < 5 * one  # the group, and its layers taken apart


def test_decoding_works_inside_jit():
  params, config = countdown()
  decode = jax.jit(functools.partial(greedy_decode, config=config, max_new_tokens=3, end_ids=(0,)))
  tokens, lengths = decode(params, prompt_tokens=jnp.array([[5, 3]]), prompt_lengths=jnp.array([1]))
  np.testing.assert_array_equal(tokens, [[4, 3, 2]])
  np.testing.assert_array_equal(lengths, [3])


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"end_ids": (23,)}, "end_ids"),
    ({"end_ids": (-1,)}, "end_ids"),
    ({"prompt_lengths": np.array([1, 3], np.int32)}, "prompt_lengths"),
    ({"prompt_lengths": np.array([0, 1], np.int32)}, "prompt_lengths"),
  ],
)
def test_wrong_arguments_are_named(changes, named):
  arguments = {
    "prompt_tokens": np.ones((2, 2), np.int32),
    "prompt_lengths": np.array([1, 2], np.int32),
    "max_new_tokens": 2,
    "end_ids": (0,),
  }
  with pytest.raises(ValueError, match=named):
    greedy_decode(make_model(PLAIN), PLAIN, **(arguments | changes))


def test_a_population_refuses_what_does_not_fit():
  population = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), make_model(PLAIN))
  buckets = bucket_prompts([[1], [2, 3]], num_buckets=2)
  settings = {"max_new_tokens": 2, "end_ids": (0,)}
  with pytest.raises(ValueError, match="group_size: expected at least 1, got 0"):
    decode_population(population, PLAIN, buckets, group_size=0, **settings)
  with pytest.raises(ValueError, match="buckets"):
    decode_population(population, PLAIN, [], **settings)
  with pytest.raises(ValueError, match="rows"):
    decode_population(population, PLAIN, buckets[1:], **settings)


@pytest.mark.parametrize(
  ("shapes", "named"),
  [
    (((2,), (2, 2, 4), (2, 2)), r"prompts of buckets\[1\]: .* for each of 3 candidates.*got \(2, 2, 4\)"),
    (((2,), (3, 2, 4), (2,)), r"prompts of buckets\[1\]"),
    (((2,), (2, 4), (3, 2)), r"prompts of buckets\[1\]"),
    (((3,), (3, 2, 4), (3, 2)), r"prompts of buckets\[1\].*got .* for \(3,\) rows"),
    (((3, 2), (3, 2, 4), (3, 2)), r"prompts of buckets\[1\]"),
    (((), (4,), ()), r"prompts of buckets\[1\]"),
    (((2,), (1, 3, 2, 4), (1, 3, 2)), r"prompts of buckets\[1\]"),
  ],
)
def test_buckets_of_other_shapes_are_refused(shapes, named):
  population = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), make_model(PLAIN))
  rows, token_ids, lengths = (np.ones(shape, np.int32) for shape in shapes)
  buckets = [*bucket_prompts([[1]], num_buckets=1), PromptBucket(rows, token_ids, lengths)]
  with pytest.raises(ValueError, match=named):
    decode_population(population, PLAIN, buckets, max_new_tokens=2, end_ids=(0,))


def test_own_prompts_that_do_not_fit_are_named():
  population = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), make_model(PLAIN))
  settings = {"max_new_tokens": 2, "end_ids": (0,)}
  bucket = bucket_population_prompts([[[1, 2]], [[3]]], num_buckets=1)[0]
  for length in (0, 5):
    lengths = bucket.lengths.copy()
    lengths[1, 0] = length
    with pytest.raises(ValueError, match=r"prompt_lengths of buckets\[0\]: expected lengths in \[1, 4\]"):
      decode_population(population, PLAIN, [bucket._replace(lengths=lengths)], **settings)
  with pytest.raises(ValueError, match="rows"):
    decode_population(population, PLAIN, [bucket, bucket], **settings)
