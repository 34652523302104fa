"""What is logged is found in TensorBoard's files, read by their layout; wandb runs offline where it is there."""

import importlib.util
import struct

import pytest
from tensorboardX.proto import event_pb2

from cqd_jax.store.loggers import TensorBoardLogger, WandbLogger, all_closed


def events_of(folder):
  """The events of all files by TFRecord's layout: length, its checksum, content, its checksum."""
  events = []
  for path in sorted(folder.glob("events*")):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack("<Q", content[:8])
      events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
      content = content[16 + length :]
  return events


def scalars_of(folder):
  return [(event.step, value.tag, value.simple_value) for event in events_of(folder) for value in event.summary.value]


def test_tensorboard_files_hold_what_was_logged(tmp_path):
  with all_closed([TensorBoardLogger(tmp_path)]) as (logger,):
    logger.log(1, {"coverage/os": 0.25, "best_mean": 0.5})
    logger.log(2, {"coverage/os": 0.5, "max_fitness/os": float("-inf")})
    assert len(scalars_of(tmp_path)) == 3  # on disk at once
  assert scalars_of(tmp_path) == [(1, "coverage/os", 0.25), (1, "best_mean", 0.5), (2, "coverage/os", 0.5)]


def test_a_resumed_run_makes_tensorboard_forget_what_it_tells_anew(tmp_path):
  TensorBoardLogger(tmp_path, first_step=7).close()
  starts = [event for event in events_of(tmp_path) if event.session_log.status == event_pb2.SessionLog.START]
  assert [event.step for event in starts] == [7]


def test_all_are_closed_though_one_fails(tmp_path):
  closed = []

  class Whole:
    def log(self, step, figures):
      pass

    def close(self):
      closed.append("whole")

  class Broken(Whole):
    def close(self):
      closed.append("broken")
      raise OSError("gone")

  with pytest.raises(OSError, match="gone"), all_closed([Whole(), Broken(), Whole()]):
    pass
  assert closed == ["whole", "broken", "whole"]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_is_asked_for_in_words(tmp_path):
  with pytest.raises(ValueError, match=r"output\.wandb_project: needs wandb: pip install 'cqd_jax\[wandb\]'"):
    WandbLogger("project", name="run", folder=tmp_path / "wandb", config={})
