"""Samples of a file are divided by seed, or limited by seed where the file divides them."""

import pytest

from cqd_jax.tasks.splits import SPLITS, divide_by_seed, in_several_splits, limited_by_seed


def sizes(*numbers):
  return dict(zip(SPLITS, numbers, strict=True))


def lengths(divided):
  return [len(divided[split]) for split in SPLITS]


@pytest.mark.parametrize(
  ("total", "asked", "got"),
  [
    (100, (60, 20, 20), [60, 20, 20]),
    (100, (10, 2, 3), [10, 2, 3]),
    (50, (30, 20, 20), [22, 14, 14]),
    (50, (60, 20, 20), [26, 12, 12]),  # of 40, 20, 20
    (900, (3000, 100, 300), [500, 100, 300]),
    (800, (3000, 100, 300), [400, 100, 300]),
    (300, (3000, 100, 300), [151, 37, 112]),  # of 400, 100, 300: 150, 37.5, 112.5; the largest takes what is over
    (50, (3000, 100, 300), [26, 6, 18]),
    (3, (3000, 100, 300), [1, 1, 1]),
    (4, (3000, 1, 1), [2, 1, 1]),
    (5, (0, 4, 4), [0, 3, 2]),
    (1, (0, 0, 9), [0, 0, 1]),
    (7, (0, 0, 0), [0, 0, 0]),
  ],
)
def test_each_split_gets_its_size_or_its_share(total, asked, got):
  divided = divide_by_seed(range(total), sizes(*asked), 0, "file")
  assert lengths(divided) == got
  taken = [sample for split in SPLITS for sample in divided[split]]
  assert len(set(taken)) == len(taken)
  assert set(taken) <= set(range(total))


def test_the_seed_decides_and_more_training_samples_change_no_test():
  first, again, other = (divide_by_seed(range(100), sizes(50, 10, 20), seed, "file") for seed in (3, 3, 4))
  assert first == again
  assert first != other
  fewer = divide_by_seed(range(100), sizes(10, 10, 20), 3, "file")
  assert fewer["test"] == first["test"]
  assert fewer["validation"] == first["validation"]
  assert first["test"] != sorted(first["test"])


def test_a_split_without_samples_is_refused():
  with pytest.raises(ValueError, match=r"^file: expected at least one sample for each of train, test, got 1$"):
    divide_by_seed([1], sizes(5, 0, 5), 0, "file")
  with pytest.raises(ValueError, match=r"^file: expected samples of validation, got none$"):
    limited_by_seed({"train": [1], "test": [2]}, sizes(1, 1, 1), 0, "file")


def test_splits_of_the_file_are_kept_in_order():
  own = {"train": range(50), "validation": range(50, 60), "test": range(60, 100)}
  first, again, other = (limited_by_seed(own, sizes(10, 20, 5), seed, "file") for seed in (1, 1, 2))
  assert first == again
  assert first != other
  assert lengths(first) == [10, 10, 5]
  assert all(first[split] == sorted(first[split]) and set(first[split]) <= set(own[split]) for split in SPLITS)
  assert first["validation"] == list(range(50, 60))
  assert lengths(limited_by_seed({"test": [1]}, sizes(0, 0, 3), 0, "file")) == [0, 0, 1]


def test_texts_in_several_splits_are_found_with_their_places():
  splits = {
    "train": [("What is  2+2?", "a:1"), ("x", "a:2"), ("x", "a:3")],
    "validation": [("y", "a:4"), ("what is 2+2? ", "a:5")],
    "test": [("X", "a:6"), ("What is 2+2?", "a:7"), ("z", "a:8"), ("z", "a:9")],
  }
  assert in_several_splits(splits) == [
    [("train", "a:1"), ("validation", "a:5"), ("test", "a:7")],
    [("train", "a:2"), ("test", "a:6")],
  ]
