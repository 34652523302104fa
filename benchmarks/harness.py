"""Times functions against this machine's own ceiling and against a peer, on the same arrays, in the same run.

A benchmark is a module `benchmarks/bench_<module>.py` with one function:

```python
import functools

import jax
import jax.numpy as jnp

from benchmarks.harness import Case


def cases(quick: bool) -> list[Case]:
  size = 2**20 if quick else 2**26
  return [
    Case(
      name="scale",
      labels={"dtype": "float32", "size": size},
      function=functools.partial(jnp.multiply, 2.0),
      arguments=lambda: (jnp.ones(size),),
      bytes_moved=2 * 4 * size,  # read once, written once
      recycle=0,
      peer=lambda x: jnp.stack([2.0 * part for part in jnp.split(x, 8)]),
      peer_name="loop without jit",
    )
  ]
```

`python -m benchmarks` finds it by its name. What the harness does with a case:

1. It builds the arguments (nothing is built before, and all of it is freed after: cases may fill the memory).
2. It compiles the function and reports that time apart; `host=True` leaves a function that is not jit-able as it is.
3. It runs rounds of: ceiling, function, peer. So each round sees the same state of a shared machine, and the
   fraction of the ceiling and the ratio to the peer are medians over rounds of figures taken side by side. What
   takes less than 20 ms is run several times in a row each round, as in a loop: the caches are then its own.
4. It yields a `Measurement`: a line of JSON, and a row of the table.

Count by hand what the function MUST move (each input read once, each output written once) and compute (a
multiply-add is 2 FLOPs), not what it happens to do: waste then shows as a small fraction. A case without counts gets
only times.

The ceiling of memory is an elementwise float32 pass that rewrites a large buffer in place; that of arithmetic is one
square matrix product in the case's `matmul_dtype`. On a CPU the page faults of a freshly allocated output can cost more
than the pass itself; `recycle=i` donates argument i and puts the result in its place for the next run, as a loop in
`lax.scan` does, and then the kernel is measured and not the allocator. (On Linux, `GLIBC_TUNABLES=
glibc.malloc.hugetlb=1` in the environment makes fresh outputs much cheaper.)

Benchmarks print figures and assert nothing about time.
"""

import dataclasses
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

LEAST_S, MOST_IN_A_ROW = 0.02, 200


@dataclasses.dataclass(frozen=True)
class Case:
  """One thing to measure.

  Attributes:
    name: what is measured, e.g. the function's name.
    function: called with the arguments; jitted by the harness unless `host`. Bind settings with `functools.partial`.
    arguments: makes the tuple of arguments; called once, when the case's turn comes.
    labels: what sets this case apart (dtype, sizes), for the table and the JSON.
    bytes_moved: bytes that one run has to read and write; 0 where memory is not the point.
    flops: floating-point operations that one run has to do; 0 where arithmetic is not the point.
    items: how many of `item` one run makes; 0 where nothing is counted.
    item: what is made, e.g. "candidates".
    matmul_dtype: dtype of the matrix product that is the ceiling of the FLOPs.
    recycle: index of the argument that is donated and replaced by the result before the next run; the result must
      have its structure, shapes and dtypes. None: nothing is donated and the output is fresh in every run.
    host: whether to call the function as it is, because it cannot be jitted.
    peer: another way to the same result, called as it is on the same arguments; None for none.
    peer_name: the peer in a few words.
    peer_items: how many items the peer makes in one call, where that is not `items`: the ratio is then that of the
      times an item.
  """

  name: str
  function: Callable[..., Any]
  arguments: Callable[[], tuple[Any, ...]]
  labels: Mapping[str, str | int | float] = dataclasses.field(default_factory=dict)
  bytes_moved: float = 0
  flops: float = 0
  items: int = 0
  item: str = ""
  matmul_dtype: str = "float32"
  recycle: int | None = None
  host: bool = False
  peer: Callable[..., Any] | None = None
  peer_name: str = ""
  peer_items: int = 0


@dataclasses.dataclass(frozen=True)
class Samples:
  """Seconds of each round of one case; a list is empty where the case has no such part."""

  run: list[float]
  stream: list[float] = dataclasses.field(default_factory=list)
  matmul: list[float] = dataclasses.field(default_factory=list)
  peer: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Measurement:
  """What one case gave; None where it does not apply.

  Attributes:
    module: the benchmark module's name without `bench_`.
    name: the case's name.
    labels: the case's labels.
    machine: platform, device and JAX version.
    compile_s: seconds of tracing and compilation.
    run_s: median seconds of a run.
    run_s_range: the fastest and the slowest run.
    rounds: number of runs.
    items_per_s: items counted, over `run_s`.
    item: what the items are.
    gb_per_s: bytes counted, over `run_s`, in 10^9 a second.
    gflop_per_s: FLOPs counted, over `run_s`, in 10^9 a second.
    ceiling_gb_per_s: the machine's copy bandwidth (bytes read plus bytes written), in the same rounds.
    ceiling_gflop_per_s: the machine's matmul rate, in the same rounds.
    bound: "memory" or "arithmetic": the ceiling that is reached first.
    fraction: of the least time that the ceilings allow, over the time taken; median over rounds.
    peer: the peer's name.
    peer_s: median seconds of a call of the peer.
    ratio: how many times faster than the peer, by the item where both count items; median over rounds.
  """

  module: str
  name: str
  labels: dict[str, str | int | float]
  machine: dict[str, str]
  compile_s: float | None
  run_s: float
  run_s_range: tuple[float, float]
  rounds: int
  items_per_s: float | None
  item: str | None
  gb_per_s: float | None
  gflop_per_s: float | None
  ceiling_gb_per_s: float | None
  ceiling_gflop_per_s: float | None
  bound: str | None
  fraction: float | None
  peer: str | None
  peer_s: float | None
  ratio: float | None

  def to_json(self) -> str:
    """One line of JSON."""
    return json.dumps(dataclasses.asdict(self))


class Ceiling:
  """The machine's copy bandwidth and matmul rate, each timed once a call.

  Attributes:
    stream_bytes: bytes that one `stream` moves (reads plus writes).
    matmul_flops: FLOPs of one `matmul`.
  """

  def __init__(self, quick: bool):
    on_cpu = jax.default_backend() == "cpu"
    # Four times a large last-level cache, unless figures do not matter.
    megabytes = 8 if quick else 256 if on_cpu else 1024
    side = 256 if quick else 2048 if on_cpu else 8192
    self.stream_bytes = 2 * megabytes * 2**20
    self.matmul_flops = 2 * side**3
    self._side = side
    self._buffer = jnp.ones(megabytes * 2**18, jnp.float32)
    self._scale = jax.jit(lambda x: x * jnp.float32(1.0000001), donate_argnums=0)
    self._product = jax.jit(jnp.matmul)
    self._factors: dict[str, jax.Array] = {}
    self.stream()

  def stream(self) -> float:
    """Seconds of one pass that reads and rewrites the buffer."""
    seconds, self._buffer = _timed(self._scale, self._buffer)
    return seconds

  def matmul(self, dtype: str) -> float:
    """Seconds of one square matrix product in `dtype`."""
    if dtype not in self._factors:
      self._factors[dtype] = jnp.full((self._side, self._side), 0.5, dtype)
      jax.block_until_ready(self._product(self._factors[dtype], self._factors[dtype]))
    factor = self._factors[dtype]
    return _timed(self._product, factor, factor)[0]


def measure(module: str, case: Case, ceiling: Ceiling, *, rounds: int = 7, budget_s: float = 8.0) -> Measurement:
  """Compiles and times one case.

  Args:
    module: name for the measurement's `module`.
    case: what to measure.
    ceiling: this machine's ceiling, shared by all cases of a run.
    rounds: number of rounds, at least 1.
    budget_s: rounds end early (but not before the third) when they have taken this many seconds.

  Returns:
    The medians over the rounds.
  """
  arguments = list(case.arguments())
  jax.block_until_ready(arguments)
  compile_s, function = None, case.function
  if not case.host:
    donated = () if case.recycle is None else (case.recycle,)
    start = time.perf_counter()
    function = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
    compile_s = time.perf_counter() - start

  def run() -> Any:
    result = function(*arguments)
    if case.recycle is not None:
      arguments[case.recycle] = result
    return result

  def run_peer() -> Any:
    assert case.peer is not None
    return case.peer(*arguments)

  repeats = _repeats(run)
  peer_repeats = _repeats(run_peer) if case.peer else 0
  samples = Samples(run=[])
  began = time.perf_counter()
  while len(samples.run) < min(rounds, 3) or (len(samples.run) < rounds and time.perf_counter() - began < budget_s):
    if case.bytes_moved:
      samples.stream.append(ceiling.stream())
    if case.flops:
      samples.matmul.append(ceiling.matmul(case.matmul_dtype))
    samples.run.append(_timed_in_a_row(run, repeats))
    if case.peer:
      samples.peer.append(_timed_in_a_row(run_peer, peer_repeats))
  return summarize(
    module, case, samples, compile_s, stream_bytes=ceiling.stream_bytes, matmul_flops=ceiling.matmul_flops
  )


def summarize(
  module: str,
  case: Case,
  samples: Samples,
  compile_s: float | None,
  *,
  stream_bytes: float,
  matmul_flops: float,
) -> Measurement:
  """The arithmetic from seconds to figures.

  Args:
    module: name for the measurement's `module`.
    case: what was measured; its counts are used.
    samples: seconds of each round.
    compile_s: seconds of compilation, or None.
    stream_bytes: bytes that each of `samples.stream` moved.
    matmul_flops: FLOPs that each of `samples.matmul` did.
  """
  run_s = statistics.median(samples.run)
  ceiling_gb = stream_bytes / statistics.median(samples.stream) / 1e9 if samples.stream else None
  ceiling_gflop = matmul_flops / statistics.median(samples.matmul) / 1e9 if samples.matmul else None
  memory = [case.bytes_moved / stream_bytes * seconds for seconds in samples.stream]
  arithmetic = [case.flops / matmul_flops * seconds for seconds in samples.matmul]
  share = case.items / case.peer_items if case.peer_items else 1.0
  bound = fraction = None
  if memory or arithmetic:
    nothing = [0.0] * len(samples.run)
    least = [max(pair) for pair in zip(memory or nothing, arithmetic or nothing, strict=True)]
    fraction = statistics.median(a / b for a, b in zip(least, samples.run, strict=True))
    bound = "memory" if sum(memory) >= sum(arithmetic) else "arithmetic"
  return Measurement(
    module=module,
    name=case.name,
    labels=dict(case.labels),
    machine=machine(),
    compile_s=compile_s,
    run_s=run_s,
    run_s_range=(min(samples.run), max(samples.run)),
    rounds=len(samples.run),
    items_per_s=case.items / run_s if case.items else None,
    item=case.item or None,
    gb_per_s=case.bytes_moved / run_s / 1e9 if case.bytes_moved else None,
    gflop_per_s=case.flops / run_s / 1e9 if case.flops else None,
    ceiling_gb_per_s=ceiling_gb,
    ceiling_gflop_per_s=ceiling_gflop,
    bound=bound,
    fraction=fraction,
    peer=case.peer_name or "peer" if samples.peer else None,
    peer_s=statistics.median(samples.peer) if samples.peer else None,
    ratio=statistics.median(share * a / b for a, b in zip(samples.peer, samples.run, strict=True))
    if samples.peer
    else None,
  )


def machine() -> dict[str, str]:
  """Platform, kind of device and JAX version: what figures must not be compared across."""
  device = jax.devices()[0]
  return {
    "platform": device.platform,
    "device": device.device_kind if device.platform != "cpu" else platform.machine(),
    "num_devices": str(jax.device_count()),
    "jax": jax.__version__,
  }


def _repeats(run: Callable[[], Any]) -> int:
  """How often to run in a row for at least `LEAST_S` seconds; the first run pays for what is set up once."""
  jax.block_until_ready(run())
  return min(MOST_IN_A_ROW, math.ceil(LEAST_S / max(_timed(run)[0], 1e-9)))


def _timed_in_a_row(run: Callable[[], Any], times: int) -> float:
  """Seconds of one run, of several that follow one another."""
  start = time.perf_counter()
  for _ in range(times):
    result = run()
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / times


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
  start = time.perf_counter()
  result = jax.block_until_ready(function(*arguments))
  return time.perf_counter() - start, result
