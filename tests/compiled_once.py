"""A program that this process has compiled is not compiled again, whoever asks for it.

JAX looks programs up by the function that they were traced from. Here every test makes functions of its own of the same
settings, whose programs are equal to the last letter. They are still traced, so a test that counts traces counts
what it did before.
"""

import collections
import hashlib

from jax._src import compiler

LONGEST = 1 << 20
"""Of programs in characters: longer ones hold somebody's weights and do not come twice."""

MOST = 1024
"""Programs that are kept, the latest used."""


class CompiledOnce:
  """Compiles as `compile_or_get_cached` of JAX, with the same arguments.

  Attributes:
    compile_program: JAX's own.
    hits: programs that were there.
  """

  def __init__(self, compile_program):
    self.hits = 0
    self.compile_program = compile_program
    self._programs = collections.OrderedDict()

  def __call__(self, backend, computation, devices, compile_options, host_callbacks, *rest, **named):
    text = "" if host_callbacks else computation.operation.get_asm(enable_debug_info=False)
    if not 0 < len(text) < LONGEST:
      return self.compile_program(backend, computation, devices, compile_options, host_callbacks, *rest, **named)
    places = tuple(device.id for device in devices.flatten())
    key = (hashlib.sha256(text.encode()).digest(), compile_options.SerializeAsString(), backend.platform, places)
    if key in self._programs:
      self.hits += 1
    else:
      self._programs[key] = self.compile_program(
        backend, computation, devices, compile_options, host_callbacks, *rest, **named
      )
      if len(self._programs) > MOST:
        self._programs.popitem(last=False)
    self._programs.move_to_end(key)
    return self._programs[key]


def install():
  """For the rest of the process."""
  if not isinstance(compiler.compile_or_get_cached, CompiledOnce):
    compiler.compile_or_get_cached = CompiledOnce(compiler.compile_or_get_cached)
