# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What CONCH's benchmarks share: timing, measured floors, versions and tables.

A kernel's time is the median over replays of a CUDA graph that holds one call. Before
each replay the L2 is overwritten, unless the benchmark asks for a warm one, and the
kernels that are compared take turns.
"""

import csv
import math
import statistics
import subprocess
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vllm.triton_utils import tl, triton

Call = Callable[[], object]

FLUSH_BYTES = 2**28
ROUNDS = 3
MIN_REPLAYS, MAX_REPLAYS = 3, 60
# Replays slower than this are not repeated for a better median.
LONG_US = 100_000
WARM_SPIN_CYCLES = 100_000


# ---------------------------------------------------------------- timing


@cache
def flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def capture(call: Call) -> torch.cuda.CUDAGraph:
    """A graph of one call, which is compiled and run before.

    It keeps the call, and so the tensors that are the call's alone.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.call = call
    return graph


def replay_us(
    graph: torch.cuda.CUDAGraph, repeats: int, warm_l2: bool = False
) -> list[float]:
    """Microseconds of each of `repeats` replays."""
    pairs = []
    for _ in range(repeats):
        # Either way the device is busy while the host launches the graph, whose
        # time would be measured otherwise.
        if warm_l2:
            torch.cuda._sleep(WARM_SPIN_CYCLES)
        else:
            flush_buffer().zero_()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        graph.replay()
        pair[1].record()
        pairs.append(pair)
    torch.accelerator.synchronize()
    return [1e3 * begin.elapsed_time(end) for begin, end in pairs]


def take_turns(
    graphs: Mapping[str, torch.cuda.CUDAGraph],
    budget_ms: float,
    warm_l2: bool = False,
) -> dict[str, float]:
    """Median microseconds of each graph, in about `budget_ms` of replays for each."""
    times = {name: replay_us(graph, 1, warm_l2) for name, graph in graphs.items()}
    repeats = {}
    for name, (first,) in times.items():
        count = min(max(int(1e3 * budget_ms / first), MIN_REPLAYS), MAX_REPLAYS)
        repeats[name] = 0 if first > LONG_US else math.ceil(count / ROUNDS)
        if repeats[name]:
            times[name] = []  # the first replay was a warm-up
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            if repeats[name]:
                times[name] += replay_us(graph, repeats[name], warm_l2)
    return {name: statistics.median(found) for name, found in times.items()}


def host_us(call: Call, repeats: int = 100) -> float:
    """Microseconds until an eager call returns, best of three runs' means."""
    for _ in range(5):
        call()
    means = []
    for _ in range(3):
        torch.accelerator.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        means.append((time.perf_counter() - begin) / repeats * 1e6)
    torch.accelerator.synchronize()
    return min(means)


# ---------------------------------------------------------------- floors


@triton.jit
def empty_kernel(x_ptr):
    pass


@triton.jit
def read_kernel(
    sums_ptr, source_ptr, num_tiles, TILE: tl.constexpr, STAGES: tl.constexpr
):
    """Reads whole tiles of int32; the sums keep the loads alive."""
    total = tl.zeros([TILE], tl.int32)
    first, step = tl.program_id(0), tl.num_programs(0)
    for tile in tl.range(first, num_tiles, step, num_stages=STAGES):
        offset = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
        total += tl.load(source_ptr + offset)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


# Programs per multiprocessor, int32 a tile, stages, warps.
READ_CONFIGS = [(2, 4096, 4, 8), (4, 4096, 2, 8), (4, 2048, 4, 4), (8, 2048, 2, 4)]
READ_SIZES = [2**20, 2**22, 2**24, 2**26, 2**28, 2**30, 2**32, 2**33]


def read_call(source: torch.Tensor, num_bytes: int, config: tuple) -> Call:
    """Reads the first bytes of an int32 tensor, in whole tiles."""
    programs, tile, stages, num_warps = config
    grid = (programs * num_units(),)
    sums = torch.empty(grid, dtype=torch.int32, device=source.device)
    num_tiles = triton.cdiv(num_bytes // 4, tile)
    return lambda: read_kernel[grid](
        sums, source, num_tiles, TILE=tile, STAGES=stages, num_warps=num_warps
    )


def num_units() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


class ReadFloor:
    """What only reading so many bytes takes, by size: measured, and interpolated."""

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        """Takes pairs of (bytes, microseconds), at least two."""
        self.points = sorted(points)

    def us(self, num_bytes: float) -> float:
        """Between points, and past the last, time grows linearly with bytes."""
        sizes = [size for size, _ in self.points]
        right = min(max(bisect_left(sizes, num_bytes), 1), len(sizes) - 1)
        (size0, us0), (size1, us1) = self.points[right - 1 : right + 1]
        return us0 + (num_bytes - size0) * (us1 - us0) / (size1 - size0)

    @classmethod
    def measure(cls, max_bytes: int, warm_l2: bool = False) -> "ReadFloor":
        sizes = [size for size in READ_SIZES if size < 2 * max_bytes]
        sizes = sizes if len(sizes) > 1 else READ_SIZES[:2]
        source = read_source(sizes[-1])
        points = []
        for size in sizes:
            graphs = {
                str(config): capture(read_call(source, size, config))
                for config in READ_CONFIGS
            }
            points.append((size, min(take_turns(graphs, 8, warm_l2).values())))
        return cls(points)


def read_source(num_bytes: int) -> torch.Tensor:
    """Random int32 that a read call may take whole tiles of."""
    spare = max(tile for _, tile, *_ in READ_CONFIGS)
    source = torch.empty(num_bytes // 4 + spare, dtype=torch.int32, device="cuda")
    return source.random_()


def empty_us(warm_l2: bool = False) -> float:
    """An empty kernel."""
    x = torch.empty(1, device="cuda")
    graph = capture(lambda: empty_kernel[(1,)](x))
    return statistics.median(replay_us(graph, 30, warm_l2))


def gemm_flops(dtype: torch.dtype, size: int = 8192) -> float:
    """Floating-point operations a second of torch's product of square matrices."""
    a, b = (
        torch.randn(size, size, device="cuda", dtype=torch.bfloat16).to(dtype)
        for _ in range(2)
    )
    if dtype.itemsize == 1:
        one = torch.ones((), device="cuda")
        call = lambda: torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        )
    else:
        call = lambda: a @ b
    (us,) = take_turns({"gemm": capture(call)}, 15).values()
    return 2 * size**3 / us * 1e6


# ---------------------------------------------------------------- tables


def environment(commit: str | None = None) -> dict[str, str]:
    """Device and versions, for the head of a table."""
    found = {"device": "CPU, Triton's interpreter"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        units = properties.multi_processor_count
        found["device"] = f"{properties.name}, {units} multiprocessors"
        found["driver"] = output_of(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    for package in ("torch", "triton", "vllm"):
        found[package] = package_version(package)
    found["torch"] = torch.__version__
    here = str(Path(__file__).resolve().parent)
    found["commit"] = commit or output_of(
        "git", "-C", here, "describe", "--always", "--dirty", "--tags"
    )
    return {name: value for name, value in found.items() if value}


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def output_of(*command: str) -> str:
    """First line that a command prints; empty if there is no such command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


class Table:
    """Rows that are printed as they come and go to a CSV file.

    The file begins with the environment, one `# name: value` a line. It is written
    row by row: an interrupted run leaves what it measured.
    """

    def __init__(
        self,
        fields: Iterable[str],
        head: Mapping[str, str],
        path: Path | None = None,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        """Prints the head of the table and begins the file.

        Args:
            fields: columns, in order.
            head: the environment.
            path: of the file; None: only print.
            widths: of printed columns that need more or less than 7 or their name; a
                column of width 0 goes to the file alone.

        """
        self.fields = list(fields)
        given = widths or {}
        self.widths = {k: given.get(k, max(len(k), 7)) for k in self.fields}
        self.rows: list[dict[str, object]] = []
        self.path = path
        for name, value in head.items():
            print(f"# {name}: {value}")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                file.writelines(f"# {name}: {value}\n" for name, value in head.items())
                csv.writer(file).writerow(self.fields)
        self.show(dict(zip(self.fields, self.fields)))

    def show(self, row: Mapping[str, object]) -> None:
        cells = [as_text(row.get(k)).rjust(w) for k, w in self.widths.items() if w]
        print("  ".join(cells).rstrip(), flush=True)

    def add(self, row: Mapping[str, object]) -> None:
        self.rows.append(dict(row))
        self.show(row)
        if self.path is not None:
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerow(as_text(row.get(k)) for k in self.fields)


def as_text(value: object) -> str:
    """A cell: four digits of a float are enough, None is empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
