"""Registers, spills, shared memory and instructions of the compiled Triton kernels; needs no GPU.

    minrnn figures kernels      ->  a table, and evals/results/triton-kernels.json

Launches are planned as for a real call, on tensors without memory. Their kernels are compiled for sm_80 and
sm_90 with the specialisations that a launch on aligned tensors gets. Four numbers tell whether a scan can be
bound by memory, as it should be:

- registers per thread: with up to 128, two programs of 8 warps share a multiprocessor, so one computes while
  the other waits;
- bytes in flight: what a program requests before it waits. Two programs on each of 132 multiprocessors at
  4.3 TB/s and 0.8 us need 13 KB each;
- issue: an H200 issues about 2.9e13 thread instructions per second (132 x 4 x 32 at 1.7 GHz), and 4.3e12 / n
  elements of n bytes arrive in one; this is the fraction of the first that the loop spends on the second;
- special: the same for special functions (exp2, reciprocal), which run at an eighth of the rate.
"""

# pyright: reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false, reportMissingImports=false
# (triton may be missing)

import argparse
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UserError
from ...common.files import user_path, write_json
from ...models import cell_scan_triton, scan_triton
from ...models.boundaries import Boundaries
from ...models.cell_spec import FUSED_CELLS, CellInputs, CellSpec
from ...models.launches_triton import Launch
from ...models.minimal_coefficients import MINIMAL_CELLS
from ..output import RESULTS
from ..record import command_line, commit, versions

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError:
    triton = None

OUT = RESULTS / "triton-kernels.json"
BATCH, TIME, WIDTH = 8, 8192, 2048
NUM_CHUNKS = 4  # the launches of the two-pass case look the same for any number
ISSUE_RATE = 132 * 4 * 32 * 1.7e9  # thread instructions per second on an H200
BANDWIDTH = 4.3e12
TYPE_NAMES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    torch.float64: "*fp64",
}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that has a shape and a dtype, but no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def name_parts(launches: list[Launch], name: str) -> Iterator[tuple[str, Launch]]:
    """Each launch with the name of its part in the pass."""
    parts = ["one pass"] if len(launches) == 1 else ["summaries", "combine", "replay"]
    yield from ((f"{name}, {part}", launch) for part, launch in zip(parts, launches, strict=True))


def general_launches(dtype: torch.dtype, num_chunks: int, time: int = TIME) -> Iterator[tuple[str, Launch]]:
    """Forward and backward of the scan of given (a, b), a in fp32 as the cells give it, b in `dtype`."""
    a, b, state = empty(BATCH, time, WIDTH), empty(BATCH, time, WIDTH, dtype=dtype), empty(BATCH, WIDTH)
    name = str(dtype).removeprefix("torch.")
    yield from name_parts(
        scan_triton.forward_launches(a, b, state, False, num_chunks=num_chunks)[1], f"scan forward {name}"
    )
    yield from name_parts(
        scan_triton.backward_launches(a, b, state, b, state, num_chunks=num_chunks)[1],
        f"scan backward {name}",
    )


def cell_launches(
    cell: str,
    activation: str,
    output_gate: bool,
    dtype: torch.dtype,
    num_chunks: int,
    boundaries: bool = False,
    time: int = TIME,
) -> Iterator[tuple[str, Launch]]:
    """Forward and backward of a cell; with `boundaries`, document starts and lengths as well."""
    num_gates = MINIMAL_CELLS[cell].num_gates
    projected = empty(BATCH, time, WIDTH * (num_gates + 1 + output_gate), dtype=dtype)
    gate_bias, state, h = empty(num_gates, WIDTH), empty(BATCH, WIDTH), empty(BATCH, time, WIDTH, dtype=dtype)
    starts = empty(BATCH, time, dtype=torch.bool) if boundaries else None
    lengths = empty(BATCH, dtype=torch.int64) if boundaries else None
    spec = CellSpec(cell, activation, output_gate)
    inputs = CellInputs(projected, gate_bias, state, Boundaries(starts, lengths))
    form = f"{cell} {activation}{' gated' if output_gate else ''}{' boundaries' if boundaries else ''}"
    name = f"{form} {{}} {str(dtype).removeprefix('torch.')}"
    forward = cell_scan_triton.forward_launches(inputs, spec, return_decay=False, num_chunks=num_chunks)
    yield from name_parts(forward[1], name.format("forward"))
    backward = cell_scan_triton.backward_launches(
        inputs, spec, h=h, grad_y=h, grad_last=state, num_chunks=num_chunks
    )
    yield from name_parts(backward[1], name.format("backward"))


def all_launches() -> Iterator[tuple[str, Launch]]:
    """Every variant that training launches: dtypes, cells, candidates, output gate, boundaries, one or two
    passes; and one token of decoding.
    """
    dtypes = (torch.bfloat16, torch.float32)
    for dtype, num_chunks in itertools.product(dtypes, (1, NUM_CHUNKS)):
        yield from general_launches(dtype, num_chunks)
    for cell, output_gate, dtype, num_chunks in itertools.product(
        FUSED_CELLS["triton"], (False, True), dtypes, (1, NUM_CHUNKS)
    ):
        yield from cell_launches(cell, "none", output_gate, dtype, num_chunks)
    for cell, activation in itertools.product(FUSED_CELLS["triton"], ("g", "tanh", "silu")):
        yield from cell_launches(cell, activation, False, torch.bfloat16, 1)
    for cell in FUSED_CELLS["triton"]:
        yield from cell_launches(cell, "none", True, torch.bfloat16, 1, boundaries=True)
    yield from (
        (f"{name}, one token", launch)
        for name, launch in cell_launches("mingru", "none", True, torch.bfloat16, 1, time=1)
    )


def compile_launch(launch: Launch, architecture: int) -> dict[str, Any]:
    """Compile a launch's kernel for sm_`architecture`, specialised as for tensors aligned to 16 bytes; see
    `read_machine_code`.
    """
    signature, constants, attributes = {}, dict(launch.constants), {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
            continue
        signature[name] = (
            TYPE_NAMES[value.dtype] if isinstance(value, Tensor) else "i64" if abs(value) >= 2**31 else "i32"
        )
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
    tail = launch.constants.get("TAIL", 0)
    return read_machine_code(compiled.asm["cubin"], tail) | {"shared": compiled.metadata.shared}


def read_machine_code(cubin: bytes, tail: int) -> dict[str, Any]:
    """Registers per thread, bytes of spills, and instructions by kind of the largest loop (with `tail` 1, the
    second largest).

    The masked loop over the tail of a sequence is not counted.
    """
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        listing = subprocess.run(
            [tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    loop = Counter(re.sub(r"^@!?U?P\w+ ", "", line).split()[0] for line in loops(listing)[tail])
    return {"registers": int(match[1]), "spills": int(match[2]), "loop": dict(loop.most_common())}


def loops(listing: str) -> list[list[str]]:
    """Instructions between each backward branch and its target, the longest loop first; one empty loop if
    there is none.
    """
    instructions, labels = [], {}
    for line in map(str.strip, listing.splitlines()):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    bodies = [[]]
    for end, instruction in enumerate(instructions):
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        if branch and labels.get(branch[1], end) < end:
            bodies.append(instructions[labels[branch[1]] : end + 1])
    return sorted(bodies, key=len, reverse=True)


def bytes_moved(launch: Launch) -> tuple[float, float]:
    """Bytes per element that a kernel over time reads and writes."""
    arguments, constants = launch.arguments, launch.constants
    num_elements = float(launch.arguments["time"] or 0) * BATCH * WIDTH
    is_general, is_backward = "a" in arguments, "h0" in arguments
    if is_general:
        outputs = ("da", "db") if is_backward else ("h",)
    else:
        outputs = ("d_projected",) if is_backward else ("y", "h")

    def size(*names: str) -> float:
        tensors = (arguments[name] for name in names)
        return (
            sum(tensor.numel() * tensor.itemsize for tensor in tensors if isinstance(tensor, Tensor))
            / num_elements
        )

    written = size(*outputs)
    if is_general:
        read = size("a", "grad_h" if is_backward else "b")
    else:
        gates, output_gate = MINIMAL_CELLS[constants["CELL"]].num_gates, constants["OUTPUT_GATE"]
        # summaries read only what decides the state
        used = gates + 1 + output_gate if written else gates + (output_gate if is_backward else 1)
        read = size("projected") * used / (gates + 1 + output_gate) + (size("grad_y") if is_backward else 0)
    return read + (size("h") if is_backward and written else 0), written


def describe(name: str, launch: Launch, architecture: int) -> dict[str, Any]:
    """One row of the report."""
    code, constants = compile_launch(launch, architecture), launch.constants
    row = {"kernel": name, "sm": architecture, "warps": launch.num_warps, **code}
    if "LANES" in constants:
        per_warp = constants["ROWS"] * constants["CHANNELS"] / 32
        read, written = bytes_moved(launch)
        counted = {kind: count / per_warp for kind, count in code["loop"].items()}
        per_element = sum(counted.values())
        special = sum(count for kind, count in counted.items() if kind.startswith("MUFU"))
        row |= {"rows": constants["ROWS"], "lanes": constants["LANES"], "channels": constants["CHANNELS"]}
        row |= {"bytes_read": read, "bytes_written": written}
        row["bytes_in_flight"] = int(read * constants["LANES"] * constants["ROWS"] * constants["CHANNELS"])
        row |= {"instructions_per_element": round(per_element, 2), "special_per_element": round(special, 2)}
        elements = BANDWIDTH / (read + written)
        row |= {
            "issue": round(per_element * elements / ISSUE_RATE, 3),
            "special": round(8 * special * elements / ISSUE_RATE, 3),
        }
    return row


def main(argv: list[str]) -> None:
    """Compile all kernels, print one line each, write the JSON."""
    parser = argparse.ArgumentParser(
        prog="minrnn figures kernels",
        description="Report registers, spills and instructions of Triton kernels.",
    )
    parser.add_argument("--out", type=user_path, default=OUT, help="where to write the JSON")
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90], help="architectures to compile for")
    arguments = parser.parse_args(argv)
    if triton is None:
        raise UserError("kernels", "needs the package triton: pip install triton")
    rows = []
    print(f"{'kernel':62} sm  regs spills shared  read+written  in flight  instr/elt  issue special")
    for name, launch, architecture in (
        (*named_launch, sm) for named_launch in all_launches() for sm in arguments.sm
    ):
        row = describe(name, launch, architecture)
        rows.append({key: value for key, value in row.items() if key != "loop"})
        line = f"{name:62} {architecture} {row['registers']:5} {row['spills']:6} {row['shared']:6}"
        if "issue" in row:
            line += f"  {row['bytes_read']:5.1f} + {row['bytes_written']:4.1f} {row['bytes_in_flight']:10}"
            line += f" {row['instructions_per_element']:10.1f} {row['issue']:6.2f} {row['special']:6.2f}"
        print(line, flush=True)
    report = {
        "command": command_line("minrnn figures kernels", argv),
        "commit": commit(),
        "versions": versions(),
        "shape": [BATCH, TIME, WIDTH],
        "bandwidth": BANDWIDTH,
        "issue_rate": ISSUE_RATE,
        "kernels": rows,
    }
    write_json(arguments.out, report)
