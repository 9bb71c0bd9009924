"""`minrnn bench scan`: how close the recurrence comes to the speed at which memory can be read.

Ideal traffic, in tensors of [batch, time, width]; any further traffic of a contender lowers its rate:

    scan    forward 3 (a, b, h)      forward and backward 8 (a, b, h;  a, h, g, da, db)
    cell    forward 3 (k, u, h)      forward and backward 9 (k, u, h;  k, u, h, g, dk, du)

The results are GB/s of ideal traffic, and their ratio to `torch.add` (3 tensors, the result newly allocated)
and to a plain copy (2), on tensors of the same shape and dtype, in the same rotation. Whole layers of equal
width, projections included, are reported in seconds.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...models.minimal_coefficients import mingru
from ...models.scan import linear_scan
from ...pipeline.machine import supports
from ..memory import available_bytes
from ..output import si, table
from .agreement import relative_error
from .command import Settings, parse_counts, parse_shapes
from .measure import DTYPES, Stopwatch, Timing, Unavailable, failure_reason, round_robin
from .record import Record
from .scan_peers import CELL_PEERS, LAYER_PEERS, OUR_SCANS, SCAN_PEERS, ScanPeer

DESCRIPTION = """Time h_t = a_t * h_{t-1} + b_t, alone and inside a layer, compared with peers and with the
machine's memory. Prints tables, writes JSON and a plot."""
EXAMPLES = """
  minrnn bench scan                                           # two shapes, fp32 and bf16, many lengths
  minrnn bench scan --peers mambapy,log-space --lengths none  # two peers, no sweep of lengths
  minrnn bench scan --device cuda --shapes 8x8192x2048,1x65536x2048 --dtypes bf16
"""
PEERS = tuple(
    dict.fromkeys(name for name in (*SCAN_PEERS, *CELL_PEERS, *LAYER_PEERS) if not name.startswith("minrnn"))
)
TRAFFIC = {
    ("scan", "forward"): 3,
    ("scan", "forward+backward"): 8,
    ("cell", "forward"): 3,
    ("cell", "forward+backward"): 9,
}
Shape = tuple[int, int, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--shapes",
        default="8x1024x512,8x4096x1024",
        help="batch x time x width, separated by commas (default: %(default)s)",
    )
    parser.add_argument("--dtypes", default="fp32,bf16", help="of the tensors (default: %(default)s)")
    lengths = "512,1024,2048,4096,8192,16384,32768,65536,1048576"
    parser.add_argument(
        "--lengths",
        default=lengths,
        help="lengths for a sweep of the scan, or none (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens", type=int, default=65_536, help="batch x time in the sweep (default: %(default)s)"
    )
    parser.add_argument(
        "--layers", default="8x1024x384", help="shapes for the whole layers, or none (default: %(default)s)"
    )


def resolve(arguments: argparse.Namespace, settings: Settings) -> None:
    """Parse the lists in the arguments, in place."""
    arguments.shapes = parse_shapes(settings, "--shapes", arguments.shapes)
    arguments.layers = parse_shapes(settings, "--layers", arguments.layers)
    arguments.lengths = parse_counts(settings, "--lengths", arguments.lengths)
    arguments.dtypes = settings.choices("--dtypes", arguments.dtypes, tuple(DTYPES))
    settings.at_least("--tokens", arguments.tokens, 1)
    if arguments.lengths and not arguments.shapes:
        settings.errors.append(
            (
                "--lengths",
                "the sweep takes the width of the first of --shapes, and there is none; use --lengths none",
            )
        )


def run(arguments: argparse.Namespace, record: Record) -> None:
    """Measure all sections; each is written when it is done."""
    device = torch.device(arguments.device)
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            for kind in ("scan", "cell"):
                rows = measure_recurrence(kind, shape, dtype, device, arguments)
                record.add(rows)
                print(_table(rows, kind, f"{kind}, {_format_shape(shape)} {dtype} on {device.type}"))
    for length in arguments.lengths:
        shape = (max(1, arguments.tokens // length), length, arguments.shapes[0][2])
        rows = [
            {**row, "sweep": True}
            for row in measure_recurrence("scan", shape, arguments.dtypes[0], device, arguments)
        ]
        record.add(rows)
        setting = f"{_format_shape(shape)} {arguments.dtypes[0]} on {device.type}"
        print(_table(rows, "scan", f"scan at length {length:,}, {setting}"))
    for shape in arguments.layers:
        for dtype in arguments.dtypes:
            rows = measure_layers(shape, dtype, device, arguments)
            record.add(rows)
            print(_table(rows, "layer", f"whole layer, {_format_shape(shape)} {dtype} on {device.type}"))


def _format_shape(shape: Shape) -> str:
    return " x ".join(f"{size:,}" for size in shape)


def _contenders(kind: str, peers: tuple[str, ...]) -> dict[str, ScanPeer]:
    candidates = {**OUR_SCANS, **SCAN_PEERS} if kind == "scan" else CELL_PEERS
    return {name: peer for name, peer in candidates.items() if name.startswith("minrnn") or name in peers}


def scan_operands(
    kind: str, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, ...]:
    """The operands: a in (0.5, 1) and positive b; for a cell its projections [batch, time, 2 * width]."""
    generator = torch.Generator(device).manual_seed(seed)
    if kind == "cell":
        return (torch.randn(*shape[:2], 2 * shape[2], generator=generator, device=device).to(dtype),)
    a, b = (torch.rand(shape, generator=generator, device=device) for _ in range(2))
    return a.mul_(0.499).add_(0.5).to(dtype), b.add_(0.01).to(dtype)


def measure_recurrence(
    kind: str, shape: Shape, dtype_name: str, device: torch.device, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the scan or the cell at one shape: every contender, forward and with backward, and the memory
    ceilings.
    """
    dtype = DTYPES[dtype_name]
    tensor_bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
    contenders = _contenders(kind, arguments.peers)
    rows: list[dict[str, Any]] = []
    bar = tqdm(
        total=2 * arguments.rounds * (len(contenders) + 2),
        desc=f"{kind} {'x'.join(map(str, shape))} {dtype_name}",
        leave=False,
    )
    with bar:
        for direction in ("forward", "forward+backward"):
            turns, failed, errors = _turns(contenders, kind, direction, shape, dtype, device, arguments)
            timings = round_robin(turns, arguments.rounds, arguments.limit, bar)
            timings |= {name: Timing(reason=reason) for name, reason in failed.items()}
            rates = {"copy": 2 * tensor_bytes, "torch.add": 3 * tensor_bytes}
            ceiling = {
                name: traffic / timings[name].median
                for name, traffic in rates.items()
                if timings[name].seconds
            }
            for name, timing in timings.items():
                moved = rates.get(name, TRAFFIC[kind, direction] * tensor_bytes)
                row = {
                    "section": kind,
                    "contender": name,
                    "direction": direction,
                    "shape": list(shape),
                    "dtype": dtype_name,
                    **timing.row(),
                }
                if timing.seconds:
                    rate = moved / timing.median
                    row |= {
                        "bytes_per_second": rate,
                        **{f"of_{other}": rate / limit for other, limit in ceiling.items()},
                    }
                if name in errors:
                    row["relative_error"] = errors[name]
                rows.append(row)
            turns.clear()  # frees the tensors, since the next direction needs the memory
    return rows


def _turns(
    contenders: Mapping[str, ScanPeer],
    kind: str,
    direction: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    arguments: Any,
):
    """Turns of the contenders that can run, reasons for the others, and errors relative to the fp64
    result.
    """
    elements = shape[0] * shape[1] * shape[2]
    turns: dict[str, Stopwatch] = {}
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    free = available_bytes(device)
    if 4 * elements * dtype.itemsize > 0.9 * free:
        needed_text, free_text = si(4 * elements * dtype.itemsize, "B"), si(free, "B")
        reason = f"the tensors alone need {needed_text} of memory, {free_text} are free"
        return turns, dict.fromkeys((*contenders, "copy", "torch.add"), reason), errors
    operands = scan_operands(kind, shape, dtype, device, arguments.seed)
    plain = (operands[0][..., : shape[2]], operands[-1][..., -shape[2] :])
    turns["copy"] = Stopwatch(lambda: _copy(*plain), device, arguments.min_seconds)
    turns["torch.add"] = Stopwatch(lambda: _add(*plain), device, arguments.min_seconds)
    for name, peer in contenders.items():
        try:
            needed = peer.live_tensors[direction != "forward"] * elements * 4
            if needed > 0.9 * free:
                raise Unavailable(f"needs about {si(needed, 'B')} of memory, {si(free, 'B')} are free")
            function = peer.load(device)
            if elements <= 2**23 and direction == "forward":
                errors[name] = scan_error(kind, peer, function, operands)
            turns[name] = Stopwatch(
                partial(recurrence_work, function, peer, operands, direction), device, arguments.min_seconds
            )
        except Exception as error:
            failed[name] = failure_reason(error)
    return turns, failed, errors


def _copy(x: Tensor, y: Tensor) -> Callable[[], object]:
    target, source = torch.empty_like(x, memory_format=torch.contiguous_format), y.contiguous()
    return lambda: target.copy_(source)


def _add(x: Tensor, y: Tensor) -> Callable[[], object]:
    x, y = x.contiguous(), y.contiguous()
    return lambda: torch.add(x, y)


def recurrence_work(
    function: Callable[..., Tensor], peer: ScanPeer, operands: tuple[Tensor, ...], direction: str
) -> Callable[[], Any]:
    """The call to time: the forward pass without autograd, or the forward pass and the gradients of all
    inputs.
    """
    inputs = peer.inputs(*operands)
    if direction == "forward":
        return torch.no_grad()(lambda: function(*inputs))
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.no_grad():
        gradient = torch.ones_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*leaves), leaves, gradient)


def scan_error(
    kind: str, peer: ScanPeer, function: Callable[..., Tensor], operands: tuple[Tensor, ...]
) -> float:
    """Largest difference from the scan in fp64 on the same operands, relative to the largest |h|."""
    device = operands[0].device if supports(operands[0].device, "fp64") else torch.device("cpu")
    a, b = _coefficients(kind, tuple(tensor.to(device) for tensor in operands))
    with torch.no_grad():
        output = peer.output(function(*peer.inputs(*operands))).to(device)
        return relative_error(output, linear_scan(a, b, backend="torch")[0])


def _coefficients(kind: str, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """a and b in fp64."""
    if kind == "scan":
        return tuple(tensor.double() for tensor in operands)
    k, u = operands[0].double().chunk(2, dim=-1)
    return mingru(k, u, "g")


def measure_layers(
    shape: Shape, dtype_name: str, device: torch.device, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the whole layers at one shape."""
    dtype, rows = DTYPES[dtype_name], []
    generator = torch.Generator(device).manual_seed(arguments.seed)
    x = torch.randn(shape, generator=generator, device=device).to(dtype)
    makers = {
        name: make
        for name, make in LAYER_PEERS.items()
        if name.startswith("minrnn") or name in arguments.peers
    }
    with tqdm(
        total=2 * arguments.rounds * len(makers),
        desc=f"layer {'x'.join(map(str, shape))} {dtype_name}",
        leave=False,
    ) as bar:
        for direction in ("forward", "forward+backward"):
            turns, failed = {}, {}
            for name, make in makers.items():
                try:
                    torch.manual_seed(arguments.seed)
                    layer = make(device, shape[2]).to(device, dtype)
                    turns[name] = Stopwatch(
                        partial(layer_work, layer, x, direction), device, arguments.min_seconds
                    )
                except Exception as error:
                    failed[name] = failure_reason(error)
            timings = round_robin(turns, arguments.rounds, arguments.limit, bar)
            timings |= {name: Timing(reason=reason) for name, reason in failed.items()}
            for name, timing in timings.items():
                row = {
                    "section": "layer",
                    "contender": name,
                    "direction": direction,
                    "shape": list(shape),
                    "dtype": dtype_name,
                    **timing.row(),
                }
                if timing.seconds:
                    row["tokens_per_second"] = shape[0] * shape[1] / timing.median
                rows.append(row)
    return rows


def layer_work(layer: nn.Module, x: Tensor, direction: str) -> Callable[[], Any]:
    """The call to time: the forward pass without autograd, or with the gradients of the input and all
    parameters.
    """
    if direction == "forward":
        return torch.no_grad()(lambda: layer(x))
    leaves = [x.detach().requires_grad_(), *layer.parameters()]
    return lambda: torch.autograd.grad(layer(leaves[0]).sum(), leaves)


def _table(rows: list[dict[str, Any]], kind: str, title: str) -> str:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "": lambda row: f"{row['contender']}, {row['direction']}",
        "ms": lambda row: f"{1e3 * row['median_seconds']:.3g}",
    }
    if kind == "layer":
        columns["tokens/s"] = lambda row: si(row["tokens_per_second"])
    else:
        columns["GB/s"] = lambda row: f"{row['bytes_per_second'] / 1e9:.3g}"
        columns["of torch.add"] = lambda row: f"{row['of_torch.add']:.2f}"
        columns["of copy"] = lambda row: f"{row['of_copy']:.2f}"
        columns["error"] = lambda row: f"{row['relative_error']:.0e}" if "relative_error" in row else ""
    return table(rows, columns, title)


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Draw GB/s of every contender at the first shape, and by length."""
    left, right = figure.subplots(1, 2)
    scans = [row for row in rows if row["section"] == "scan" and "bytes_per_second" in row]
    headline = [
        row
        for row in scans
        if not row.get("sweep") and (row["shape"], row["dtype"]) == (scans[0]["shape"], scans[0]["dtype"])
    ]
    names = list(dict.fromkeys(row["contender"] for row in headline))
    for offset, direction in enumerate(("forward", "forward+backward")):
        rates = {
            row["contender"]: row["bytes_per_second"] / 1e9
            for row in headline
            if row["direction"] == direction
        }
        left.barh(
            [names.index(name) + 0.4 * offset for name in rates], list(rates.values()), 0.38, label=direction
        )
    left.set_yticks([i + 0.2 for i in range(len(names))], names)
    left.invert_yaxis()
    left.set_xlabel("GB/s of ideal traffic")
    if headline:
        left.set_title(f"{_format_shape(tuple(headline[0]['shape']))} {headline[0]['dtype']}", fontsize=9)
        left.legend()
    for name in names:
        points = sorted(
            (row["shape"][1], row["bytes_per_second"] / 1e9)
            for row in _sweep(scans)
            if row["contender"] == name
        )
        if points:
            right.loglog(*zip(*points, strict=True), marker="o", label=name)
    right.set_xlabel("length (tokens)")
    right.set_ylabel("GB/s of ideal traffic, forward and backward")
    if _sweep(scans):
        right.legend(fontsize=7)


def _sweep(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("sweep") and row["direction"] == "forward+backward"]
