"""The graph columns: kernels called through the C interface on torch tensors, checked, then timed."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from benchmarks import baselines, native, timing
from benchmarks.native import Library, Operands, Problem
from benchmarks.progress import Progress
from benchmarks.shapes import Cell, weight_bytes
from benchmarks.store import Store

DEVICE = "cuda"
_ALIGNMENT = 256
# A kernel may err this many times as much as dequantising to x's type and a dense product do.
_ERROR_RATIO = 2.0
MOST_TOKENS_COOL = 64  # products of more draw more power than reading memory does
_TINYGEMM_ERROR_RATIO = 4.0  # it rounds each weight once more


class WrongResult(Exception):
    """A kernel's output differs from the reference; its time would mean nothing."""


def stream() -> int:
    """The current CUDA stream, as the C interface takes it."""
    return torch.cuda.current_stream().cuda_stream


def device_facts(library: Library) -> dict[str, Any]:
    """What a results file says about the machine."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "library": library.version,
    }


class Layer:
    """One weight: random codes, scales and zeros, and their packed copies for a cold rotation.

    Attributes: codes uint8 [K, N], scales and zeros [G, N] in x's type (zeros None if symmetric),
    w float32 [K, N], dense [N, K] in x's type.
    """

    def __init__(self, library: Library, n: int, k: int, dtype: str, group_size: int, zeros: bool) -> None:
        self.library, self.n, self.k = library, n, k
        self.dtype, self.group_size = dtype, group_size
        self.torch_dtype = getattr(torch, dtype)
        random = torch.Generator(DEVICE).manual_seed(0)
        groups = math.ceil(k / group_size)
        self.codes = torch.randint(0, 16, (k, n), dtype=torch.uint8, device=DEVICE, generator=random)
        # Outputs of standard normal activations come out near 1.
        spread = torch.rand((groups, n), device=DEVICE, generator=random) + 0.5
        self.scales = (spread / (4.6 * math.sqrt(k))).to(self.torch_dtype)
        self.zeros = None
        if zeros:
            self.zeros = torch.randint(0, 16, (groups, n), device=DEVICE, generator=random).to(
                self.torch_dtype
            )
        group = torch.arange(k, device=DEVICE) // group_size
        self.w = self.codes.float()
        self.w -= 8 if self.zeros is None else self.zeros.float()[group]
        self.w *= self.scales.float()[group]
        self.dense = self.w.t().to(self.torch_dtype).contiguous()
        self._pack(weight_bytes(n, k, group_size, zeros))
        self._dense_copies: list[Any] | None = None
        self._tinygemm_copies: list[Any] | None = None
        self._floor: timing.Graph | None = None

    def _pack(self, copy_bytes: int) -> None:
        qweight_bytes = math.ceil(self.k / 64) * math.ceil(self.n / 16) * 512
        parts = [self.scales] if self.zeros is None else [self.scales, self.zeros]
        sizes = [qweight_bytes] + [part.numel() * part.element_size() for part in parts]
        self.offsets, end = [], 0
        for size in sizes:
            self.offsets.append(end)
            end += math.ceil(size / _ALIGNMENT) * _ALIGNMENT
        first = torch.zeros(end, dtype=torch.uint8, device=DEVICE)
        self.library.pack_cuda(self.codes.data_ptr(), self.k, self.n, first.data_ptr(), stream())
        for part, offset, size in zip(parts, self.offsets[1:], sizes[1:], strict=True):
            first[offset : offset + size] = part.contiguous().view(torch.uint8).reshape(-1)
        self.packed = [first] + [first.clone() for _ in range(timing.plan_copies(copy_bytes) - 1)]

    def activations(self, m: int) -> Any:
        """Random [m, K]."""
        random = torch.Generator(DEVICE).manual_seed(m)
        x = torch.randn((m, self.k), device=DEVICE, generator=random)
        return x.to(self.torch_dtype)

    def reference(self, x: Any) -> Any:
        """float32 [M, N], from the codes as they were before packing."""
        return torch.mm(x.float(), self.w)

    def problem(self, m: int) -> Problem:
        """The static part of a call with m tokens."""
        code = native.DTYPES[self.dtype]
        return Problem(m, self.n, self.k, self.group_size, code, code, int(self.zeros is not None), 0)

    def epilogue(self, m: int, epilogue: str | None) -> dict[str, Any]:
        """What an epilogue has beside x and out: no residual and no scale, so that out is the product's.

        The sums of squares of "swiglu" make its factor 1.
        """
        if epilogue is None:
            return {}
        blocks = (self.n if epilogue == "add_norm" else self.k) // 16
        beside = {"squares": torch.full((m, blocks), 16.0, device=DEVICE)}
        if epilogue == "add_norm":
            like = {"dtype": self.torch_dtype, "device": DEVICE}
            beside |= {name: torch.zeros((m, self.n), **like) for name in ("residual", "scaled")}
            beside["norm_scale"] = torch.ones(self.n, **like)
        return beside

    def kernel(
        self,
        x: Any,
        out: Any,
        config: str,
        device: native.Device,
        bias: Any = None,
        epilogue: str | None = None,
    ) -> Callable[[int], None]:
        """Call i runs `config` on packed copy i."""
        problem = self.problem(x.shape[0])
        problem.has_bias = int(bias is not None)
        problem.epilogue = native.EPILOGUES[epilogue]
        beside = self.epilogue(x.shape[0], epilogue)
        size = self.library.workspace_bytes(problem, device, config)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=DEVICE)
        operands = []
        for packed in self.packed:
            pointers = [packed.data_ptr() + offset for offset in self.offsets]
            operands.append(
                Operands(
                    x=x.data_ptr(),
                    qweight=pointers[0],
                    scales=pointers[1],
                    zeros=None if self.zeros is None else pointers[2],
                    bias=None if bias is None else bias.data_ptr(),
                    out=out.data_ptr(),
                    workspace=workspace.data_ptr(),
                    workspace_bytes=size,
                    alpha=1.0,
                    num_squares=beside["squares"].shape[1] if beside else 0,
                    **{name: array.data_ptr() for name, array in beside.items()},
                )
            )
        name, keep = config.encode(), (x, out, bias, workspace, beside)

        def call(i: int, _keep: Any = keep) -> None:
            self.library.run_cuda(problem, operands[i], name, stream())

        return call

    def floor(self) -> timing.Graph:
        """Streams packed copies from memory and does nothing with them."""
        if self._floor is None:
            sink = torch.zeros(64, dtype=torch.uint8, device=DEVICE)

            def call(i: int) -> None:
                packed = self.packed[i]
                self.library.read_floor_cuda(packed.data_ptr(), packed.numel(), sink.data_ptr(), stream())

            self._floor = timing.Graph(call, len(self.packed))
        return self._floor

    def dense_copies(self) -> list[Any]:
        """`dense` and its copies."""
        if self._dense_copies is None:
            size = self.dense.numel() * self.dense.element_size()
            more = timing.plan_copies(size) - 1
            self._dense_copies = [self.dense] + [self.dense.clone() for _ in range(more)]
        return self._dense_copies

    def tinygemm_copies(self) -> list[Any]:
        """What baselines.tinygemm takes, and its copies."""
        if self._tinygemm_copies is None:
            first = baselines.tinygemm_pack(self.codes, self.scales, self.zeros)
            self._tinygemm_copies = [first] + [
                tuple(part.clone() for part in first) for _ in range(len(self.packed) - 1)
            ]
        return self._tinygemm_copies


class Check:
    """Compares outputs with the float32 product, against what a dense product in x's type errs."""

    def __init__(self, layer: Layer, x: Any):
        self.expected = layer.reference(x)
        self.norm = torch.linalg.vector_norm(self.expected, dim=1)
        self.row_error, self.max_error = self._errors(torch.mm(x, layer.dense.t()))

    def _errors(self, out: Any) -> tuple[float, float]:
        difference = out.float() - self.expected
        row = torch.linalg.vector_norm(difference, dim=1) / self.norm
        return row.max().item(), difference.abs().max().item()

    def __call__(self, out: Any, ratio: float = _ERROR_RATIO) -> None:
        """Raises WrongResult, also for NaN."""
        row, largest = self._errors(out)
        if not (row <= ratio * self.row_error and largest <= ratio * self.max_error):
            raise WrongResult(
                f"row error {row:.2e}, largest {largest:.2e}; a dense product errs "
                f"{self.row_error:.2e} and {self.max_error:.2e}"
            )


def checked_kernel(
    layer: Layer, x: Any, out: Any, check: Check, config: str, device: native.Device
) -> Callable[[int], None]:
    """The kernel's call, once every element of its output has been found right."""
    call = layer.kernel(x, out, config, device)
    out.fill_(math.nan)
    call(0)
    check(out)
    return call


def warm_up() -> None:
    """Brings the clocks up; float32 products, the reference, are exact from here on."""
    torch.set_float32_matmul_precision("highest")
    x = torch.randn((4096, 4096), device=DEVICE)
    for _ in range(20):
        torch.mm(x, x)
    torch.cuda.synchronize()


def layers(library: Library, todo: list[Cell]) -> Iterator[tuple[Layer, Cell]]:
    """Each cell with its layer: those of a shape are kept while neighbours in the list are of it too."""
    held: dict[str, Layer] = {}
    last = None
    for cell in todo:
        shape = cell._replace(m=0, dtype="")
        if shape != last:
            held.clear()
            torch.cuda.empty_cache()
            last = shape
        if cell.dtype not in held:
            held[cell.dtype] = Layer(library, cell.n, cell.k, cell.dtype, cell.group_size, cell.zeros)
        yield held[cell.dtype], cell


def _graphs(
    store: Store, layer: Layer, cell: Cell, device: native.Device, columns: list[str]
) -> dict[str, timing.Graph]:
    """The graphs of a cell's columns; a column that fails is recorded instead."""
    x = layer.activations(cell.m)
    out = torch.empty((cell.m, cell.n), dtype=layer.torch_dtype, device=DEVICE)
    check = Check(layer, x)
    graphs = {"floor_us": layer.floor()} if "floor_us" in columns else {}
    if "us" in columns:
        try:
            config = layer.library.select(layer.problem(cell.m), device)
            store.update(cell, kernel=config)
            call = checked_kernel(layer, x, out, check, config, device)
            graphs["us"] = timing.Graph(call, len(layer.packed))
        except (WrongResult, native.NativeError) as error:
            store.fail(cell, "us", str(error))
    if "dense_us" in columns:
        copies = layer.dense_copies()
        dense_out = torch.empty_like(out)
        graphs["dense_us"] = timing.Graph(
            lambda i: baselines.torch_dense(x, copies[i], dense_out), len(copies)
        )
    if "tinygemm_us" in columns:
        try:
            packed = layer.tinygemm_copies()
            check(baselines.tinygemm(x, packed[0], cell.group_size), _TINYGEMM_ERROR_RATIO)
            graphs["tinygemm_us"] = timing.Graph(
                lambda i: baselines.tinygemm(x, packed[i], cell.group_size), len(packed)
            )
        except (WrongResult, RuntimeError) as error:
            store.fail(cell, "tinygemm_us", str(error).splitlines()[0])
    return graphs


def measure(
    store: Store, library: Library, todo: list[Cell], columns: list[str], out_of_time: Callable
) -> None:
    """Fills the graph columns of `todo`, which lists a shape's cells one after the other, both types of an M.

    These are timed by the same alternating replays, so that both types meet the same clocks: products of
    many tokens run at the card's power limit, while tinygemm, of bfloat16 alone, lets it rest. They come
    last, because they lower the clocks for a while after.
    """
    device = library.current_device()
    warm_up()
    work = [cell for cell in todo if any(store.missing(cell, column) for column in columns)]
    work.sort(key=lambda cell: cell.m > MOST_TOKENS_COOL)
    progress = Progress(len(work), "graphs")
    with_layers = layers(library, work)
    for both, cells in itertools.groupby(work, lambda cell: cell._replace(dtype="")):
        if out_of_time():
            break
        graphs, count = {}, len(list(cells))
        # No further: the next shape's weights take the place of these.
        for layer, cell in itertools.islice(with_layers, count):
            wanted = [column for column in columns if store.missing(cell, column)]
            found = _graphs(store, layer, cell, device, wanted)
            graphs |= {(cell, column): graph for column, graph in found.items()}
        if graphs:
            for (cell, column), us in timing.time_graphs(graphs).items():
                store.update(cell, **{column: us})
        progress.step(f"{both.n}x{both.k} M={both.m}", count)
    store.save()
