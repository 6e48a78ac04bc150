"""How things are timed: one protocol for every column.

Graph columns: a CUDA graph of calls that rotate over copies of the weight, more of them than the L2
holds, so that each call reads its weight from memory; replays of the columns that are compared
alternate, after some that do not count, and the median replay counts. Jit columns: a jitted chain of
calls over such copies, executed back to back; the median of several samples of wall time counts.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from benchmarks.shapes import L2_BYTES

_Key = TypeVar("_Key")

COLD_FACTOR = 2.5  # copies of a weight span this many times the L2
MIN_COPIES = 2
MIN_CALLS = 8
GRAPH_US = 2000.0  # a graph is about this long, so that its launch does not count
CELL_US = 150_000.0  # no column of a cell may cost much more than this
MIN_ROUNDS = 5
MAX_ROUNDS = 15
SETTLE_S = 0.03  # of replays first, at whose end clocks are those of this work

CHAIN_US = 400.0
MIN_CHAIN = 4
MAX_CHAIN = 32
SAMPLE_S = 0.005
SAMPLES = 5

PROTOCOL = {
    "graph": "CUDA graph over rotating cold weight copies, columns alternate, median replay",
    "jit": "jitted chain over rotating cold weight copies, one element of each output feeds the "
    "next call, median sample of wall time",
    "l2_bytes": L2_BYTES,
    "cold_factor": COLD_FACTOR,
    "min_copies": MIN_COPIES,
    "min_calls": MIN_CALLS,
    "graph_us": GRAPH_US,
    "cell_us": CELL_US,
    "rounds": [MIN_ROUNDS, MAX_ROUNDS],
    "settle_s": SETTLE_S,
    "chain": [MIN_CHAIN, MAX_CHAIN],
    "chain_us": CHAIN_US,
    "sample_s": SAMPLE_S,
    "samples": SAMPLES,
}


def plan_copies(weight_bytes: int) -> int:
    """Copies of a weight that keep it out of the L2."""
    return max(MIN_COPIES, math.ceil(COLD_FACTOR * L2_BYTES / weight_bytes))


def plan_calls(call_us: float, copies: int) -> int:
    """Calls in one graph: whole rotations and GRAPH_US long, but short enough for CELL_US."""
    affordable = max(2, int(CELL_US / MIN_ROUNDS / call_us))
    wanted = max(MIN_CALLS, math.ceil(GRAPH_US / call_us))
    wanted = math.ceil(wanted / copies) * copies
    return min(wanted, affordable)


def plan_rounds(graph_us: float) -> int:
    """Replays of a graph that fit in CELL_US."""
    return min(MAX_ROUNDS, max(MIN_ROUNDS, int(CELL_US / graph_us)))


def plan_chain(call_us: float) -> int:
    """Calls in a jitted chain: long enough to hide the dispatch, no more than must be compiled."""
    return min(MAX_CHAIN, max(MIN_CHAIN, math.ceil(CHAIN_US / call_us)))


class Graph:
    """A captured CUDA graph of `calls` calls of `call(i)`, i running over `copies`."""

    def __init__(self, call: Callable[[int], Any], copies: int):
        import torch  # pyright: ignore[reportMissingImports]

        self._call = call  # holds the memory that the graph reads and writes
        # The first call, on the stream of the capture, loads the kernel and makes the libraries
        # allocate what they keep for that stream; neither is allowed while capturing.
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(0)
            torch.cuda.synchronize()
            self.call_us = eager_us(call, copies)
            self.calls = plan_calls(self.call_us, copies)
            self._graph = torch.cuda.CUDAGraph()
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                for i in range(self.calls):
                    call(i % copies)
            finally:
                self._graph.capture_end()
        self.replay = self._graph.replay


@functools.cache
def _capture_stream() -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    return torch.cuda.Stream()


def eager_us(call: Callable[[int], Any], copies: int, calls: int = 3) -> float:
    """A rough time of one call outside a graph, which includes its launch."""
    import torch  # pyright: ignore[reportMissingImports]

    times = []
    for i in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(i % copies)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return max(1.0, min(times))


def time_graphs(graphs: Mapping[_Key, Graph]) -> dict[_Key, float]:
    """Microseconds of one call in each graph; the graphs' replays alternate."""
    import torch  # pyright: ignore[reportMissingImports]

    longest = max(graph.calls * graph.call_us for graph in graphs.values())
    rounds = plan_rounds(longest)
    events: dict[_Key, list[Any]] = {name: [] for name in graphs}
    begin = time.perf_counter()
    while time.perf_counter() - begin < SETTLE_S:
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in events[name])
        * 1e3
        / graphs[name].calls
        for name in graphs
    }


def time_steps(
    step: Callable[[Any], tuple[Any, Any]], carry: Any, warm_s: float = 0.0
) -> tuple[float, Any, Any]:
    """Wall time in seconds of `carry, out = step(carry)` in JAX, and its last carry and output.

    Executions follow one another without waiting, so the dispatch overlaps the device's work. The
    carry may be donated. `warm_s` seconds of executions come first: until buffers have been at all the
    addresses that they will be at, an execution also records its command buffer anew.
    """
    import jax

    carry, out = jax.block_until_ready(step(carry))
    begin = time.perf_counter()
    while time.perf_counter() - begin < warm_s:
        carry, out = step(carry)
    carry, out = jax.block_until_ready((carry, out))
    begin = time.perf_counter()
    carry, out = jax.block_until_ready(step(carry))
    repeats = max(1, math.ceil(SAMPLE_S / (time.perf_counter() - begin)))
    samples = []
    for _ in range(SAMPLES):
        begin = time.perf_counter()
        for _ in range(repeats):
            carry, out = step(carry)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - begin) / repeats)
    return statistics.median(samples), carry, out
