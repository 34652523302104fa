import dataclasses

import pytest
from decoder_cases import PLAIN, STRETCHED


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("vocab_size", 0),
    ("hidden_size", -1),
    ("intermediate_size", 0),
    ("num_layers", 0),
    ("num_heads", 0),
    ("num_kv_heads", 3),
    ("num_kv_heads", 0),
    ("head_dim", 5),
    ("rope_theta", 0.0),
    ("rope_theta", float("nan")),
    ("rms_norm_eps", 0.0),
    ("sliding_window", 0),
  ],
)
def test_a_wrong_field_is_named(field, value):
  with pytest.raises(ValueError, match=rf"DecoderConfig\.{field}"):
    dataclasses.replace(PLAIN, **{field: value})


@pytest.mark.parametrize(
  ("field", "value"),
  [("factor", 0.5), ("low_freq_factor", 0.0), ("high_freq_factor", 1.0), ("original_max_positions", 0)],
)
def test_a_wrong_field_of_the_scaling_is_named(field, value):
  with pytest.raises(ValueError, match=rf"RopeScaling\.{field}"):
    dataclasses.replace(STRETCHED, **{field: value})


def test_equal_configs_are_one_key():
  assert {PLAIN: 1}[dataclasses.replace(PLAIN)] == 1
  assert dataclasses.replace(PLAIN, rope_scaling=STRETCHED) != PLAIN
