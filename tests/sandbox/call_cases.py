"""A harness that calls `f` of an answer; what attacks it may import is imported."""

from cqd_jax.tasks.execution import Harness

HARNESS = Harness(
  "call",
  """
import json, builtins
def run(payload):
  namespace = {}
  exec(payload["code"], namespace)
  return namespace["f"](payload["argument"])
""",
)
