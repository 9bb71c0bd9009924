"""One sequence over several real processes: logits, states, gradients and bytes are those of one process."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import VOCAB, assert_close, generator, new_model, random_ids
from torch import Tensor
from torch._dynamo.utils import counters
from torch.multiprocessing.spawn import spawn

from minrnn.models import MinRNNCache, MinRNNForCausalLM
from minrnn.models.context_parallel import ContextGroup, use_context_parallel
from minrnn.models.minimal_coefficients import MINIMAL_CELLS
from minrnn.models.recompute import checkpointing_options
from minrnn.models.registry import CELLS

BATCH, TIME = 2, 24
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, a text, and a way to run them."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    documents: bool = True
    carried: bool = True
    chunks: int = 1
    recompute: str = "none"
    autocast: bool = False
    compiled: bool = False
    uneven: bool = False


MINLSTM = {"cell": "minlstm", "preset": "paper"}  # no output gate
PUBLISHED = [cell for cell in CELLS if cell not in MINIMAL_CELLS]
ATTENTION = {"attention_every": 2, "attention_window": 5}
TWO_TAP = {"two_tap_input": True, "conv_kernel": 0}
OPTIONS = {"output_norm": True, "residual_scales": True, "logit_softcap": 2.0}
LIGHT = [
    Case("two chunks", chunks=2),
    Case("minlstm fp64", {**MINLSTM, "conv_kernel": 6}, torch.float64),
    Case("bf16, selective", autocast=True, recompute="selective", chunks=2),
    *(Case(cell, {"cell": cell}, torch.float64) for cell in PUBLISHED),
    *(
        Case(f"{cell}, learnt state", {"cell": cell, "learn_h0": True}, torch.float64, carried=carried)
        for cell in ("mingru", "gilr_lstm", "rglru", "lru")
        for carried in (False, True)
    ),
    *(
        Case(f"{cell}, options of the block", {"cell": cell, **OPTIONS}, torch.float64)
        for cell in ("mingru", "minlstm_normalized", "lru")
    ),
    *(
        Case(f"{cell}, two taps of the input", {"cell": cell, **TWO_TAP}, torch.float64, chunks=2)
        for cell in ("mingru", "hgrn")
    ),
    Case("attention", {**ATTENTION, "cell": "minlstm"}, torch.float64, chunks=2),
    Case("learnt state, one text", {"learn_h0": True}, documents=False, carried=False, chunks=2),
]
CASES = [
    *LIGHT,
    Case("nothing carried", documents=False, carried=False),
    Case("two chunks, fp64", dtype=torch.float64, chunks=2),
    Case("no convolution", {"conv_kernel": 0}, chunks=2),
    Case("two taps", {"conv_kernel": 2}),
    Case("minlstm", {**MINLSTM, "conv_kernel": 4}, chunks=2),
    Case("torch backend", {"scan_backend": "torch"}, chunks=2),
    Case("slices of different lengths", uneven=True, dtype=torch.float64, chunks=2),
    Case("selective", recompute="selective", chunks=2),
    Case("full", recompute="full", chunks=2),
    Case("options of the block, full", OPTIONS, recompute="full", chunks=2),
    Case("attention, bf16", ATTENTION, autocast=True, recompute="selective", chunks=2),
    Case("attention, full", {**ATTENTION, **OPTIONS}, recompute="full", uneven=True),
    Case("full, fp64", {"cell": "minlstm"}, torch.float64, recompute="full", chunks=2),
    Case("bf16", autocast=True),
    Case("compiled", compiled=True, chunks=2),
    Case("rwkv4, selective", {"cell": "rwkv4"}, recompute="selective", chunks=2),
    Case("lru, full", {"cell": "lru"}, recompute="full", chunks=2),
    Case("compiled, selective", compiled=True, recompute="selective", chunks=2),
    *(Case(f"{cell}, bf16", {"cell": cell}, autocast=True, recompute="selective") for cell in PUBLISHED),
]


def slice_of(case: Case, group: ContextGroup | None) -> slice:
    """Which tokens of a chunk are this process's."""
    if group is None:
        return slice(0, TIME)
    edges = [TIME * c // group.size + (c % 2 if case.uneven else 0) for c in range(group.size)]
    return slice(edges[group.rank], [*edges, TIME][group.rank + 1])


def document_starts(case: Case, size: int) -> Tensor | None:
    """Random starts, one on the first token of a slice and one right after it; the last slice has none."""
    starts = torch.rand(BATCH, case.chunks * TIME, generator=generator(2)) < 0.15
    starts[0, TIME // size] = starts[1, TIME // size + 1] = True
    starts[:, TIME - TIME // size : TIME] = False
    return starts if case.documents else None


def carried_state(model: MinRNNForCausalLM, case: Case) -> MinRNNCache:
    cache, random = MinRNNCache(model.config.num_hidden_layers), generator(3)
    shapes = model.config.state_shapes(BATCH) if case.carried else []
    for layer, (width, inputs) in zip(cache.layers, shapes, strict=case.carried):
        recurrent = conv = None
        if width is not None:  # positive, as the denominators of averages are
            recurrent = torch.rand(width, generator=random, dtype=case.dtype).requires_grad_()
        if inputs is not None:
            conv = torch.randn(inputs, generator=random, dtype=case.dtype)
            if width is None:
                conv[..., -1] = 1  # keys and values of tokens
            conv.requires_grad_()
        layer.replace(recurrent, conv, 0)
    return cache


def run(model: MinRNNForCausalLM, case: Case, size: int, group: ContextGroup | None = None) -> Results:
    """Logits, last states, and the gradients for states and parameters of a loss that reads them all."""
    ids, labels, starts = (
        random_ids(BATCH, case.chunks * TIME),
        random_ids(BATCH, case.chunks * TIME, seed=1),
        document_starts(case, size),
    )
    cache, own_slice = carried_state(model, case), slice_of(case, group)
    leaves = {f"d {name}": tensor for name, tensor in states(cache).items()}
    pieces, loss = [], torch.zeros((), dtype=case.dtype)
    for chunk in range(case.chunks):
        tokens = slice(chunk * TIME + own_slice.start, chunk * TIME + own_slice.stop)
        slice_starts = None if starts is None or not starts[:, tokens].any() else starts[:, tokens]
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            pieces.append(
                model(
                    ids[:, tokens], past_key_values=cache, use_cache=True, document_starts=slice_starts
                ).logits
            )
        targets = labels[:, tokens].flatten()
        loss = loss + torch.nn.functional.cross_entropy(
            pieces[-1].flatten(0, 1).to(case.dtype), targets, reduction="sum"
        )
    last = states(cache)
    for seed, tensor in enumerate(last.values()):
        loss = loss + (tensor * torch.randn(tensor.shape, generator=generator(seed), dtype=case.dtype)).sum()
    leaves |= {f"parameter {name}": parameter for name, parameter in model.named_parameters()}
    loss.backward()
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert grads.keys() == leaves.keys()
    model.zero_grad()
    return (
        {"logits": torch.cat(pieces, dim=1).detach()}
        | {name: tensor.detach() for name, tensor in last.items()}
        | grads
    )


def states(cache: MinRNNCache) -> Results:
    """Every layer's, by name."""
    named = {
        f"{kind} {i}": getattr(layer, kind)
        for i, layer in enumerate(cache.layers)
        for kind in ("recurrent", "conv")
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def summed(results: Results) -> Results:
    """With the gradients of parameters summed over the processes."""
    for name, tensor in results.items():
        if name.startswith("parameter"):
            dist.all_reduce(tensor)
    return results


def distance(results: Results, exact: Results) -> float:
    """Of everything that both hold, relative."""
    actual, expected = (
        torch.cat([tensors[name].double().flatten() for name in exact]) for tensors in (results, exact)
    )
    return ((actual - expected).norm() / expected.norm()).item()


def check(case: Case, group: ContextGroup) -> None:
    model = new_model(dtype=case.dtype, **case.fields).train()
    exact = run(model, Case(**{**vars(case), "autocast": False}), group.size) if case.autocast else {}
    whole = run(model, case, group.size)
    if (options := checkpointing_options(case.recompute)) is not None:
        model.activation_checkpointing_enable(options)
    use_context_parallel(model, group)
    if case.compiled:
        torch._dynamo.reset()
        for block in model.model.layers:
            block.compile(backend="aot_eager")
    actual = summed(run(model, case, group.size, group))
    is_compiled = (
        case.compiled and case.recompute == "none"
    )  # a checkpointed block that holds messages runs as it is
    assert is_compiled == bool(counters["stats"]["unique_graphs"])
    counters.clear()
    for results in (exact, whole):
        if "logits" in results:
            chunks = results["logits"].split(TIME, dim=1)
            results["logits"] = torch.cat([chunk[:, slice_of(case, group)] for chunk in chunks], dim=1)
    if case.autocast:  # two ways to round
        assert distance(actual, exact) <= 1.5 * distance(whole, exact)
        return
    assert actual.keys() == whole.keys()
    for name, expected in whole.items():
        assert_close(actual[name], expected, atol=1e-10 if case.dtype == torch.float64 else 1e-5, name=name)
    replicated = [
        tensor.flatten() for name, tensor in actual.items() if name.split()[0] in ("recurrent", "conv", "d")
    ]
    if replicated:
        assert_replicated(torch.cat(replicated), group)


def assert_replicated(tensor: Tensor, group: ContextGroup) -> None:
    all_of_them = [torch.empty_like(tensor) for _ in range(group.size)]
    dist.all_gather(all_of_them, tensor, group=group.process_group)
    assert all(torch.equal(other, tensor) for other in all_of_them)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of each message this process sends."""
    sizes, original = [], dist.all_gather

    def counting(gathered: list[Tensor], message: Tensor, **options: Any):
        sizes.append(message.numel() * message.element_size())
        return original(gathered, message, **options)

    dist.all_gather = counting
    try:
        yield sizes
    finally:
        dist.all_gather = original


def check_bytes(group: ContextGroup) -> None:
    """As the module says, and the same for every length."""
    for time, autocast, recompute in (
        (6, False, "none"),
        (60, False, "none"),
        (60, True, "none"),
        (6, True, "selective"),
        (6, False, "full"),
    ):
        model = new_model().train()
        use_context_parallel(model, group)
        if (options := checkpointing_options(recompute)) is not None:
            model.activation_checkpointing_enable(options)
        width, itemsize = model.config.state_size, 2 if autocast else 4
        inputs = itemsize * BATCH * (model.config.conv_kernel - 1) * model.config.hidden_size
        forward, backward = [inputs, 8 * BATCH * width], [4 * BATCH * width, inputs]
        with counted() as sent, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(random_ids(BATCH, time)).logits
        assert sent == model.config.num_hidden_layers * forward
        with counted() as sent:
            logits.sum().backward()
        assert sent == model.config.num_hidden_layers * (
            backward if recompute == "none" else forward + backward
        )


def check_refusals(group: ContextGroup) -> None:
    model, ids = new_model(), random_ids(BATCH, 8)
    use_context_parallel(model, group)
    with pytest.raises(
        ValueError,
        match=r"must hold the 3 tokens that the next one reads \(.*\), but this one has 2: "
        "use longer chunks, or fewer processes",
    ):
        model(ids[:, :2])
    with pytest.raises(ValueError, match="cannot be padded: pass no attention_mask"):
        model(ids, attention_mask=(torch.arange(8) < 7).expand(BATCH, 8).long())
    with pytest.raises(
        ValueError,
        match=f"is rank {group.rank} of {group.size} in the process group, but ContextGroup says 7 of 8",
    ):
        use_context_parallel(model, ContextGroup(group.process_group, 7, 8))
    use_context_parallel(model, None)
    assert model(ids[:, :2]).logits.shape == (BATCH, 2, VOCAB)


def check_tokens_read(group: ContextGroup) -> None:
    model = new_model(conv_kernel=0)
    use_context_parallel(model, group)
    with torch.inference_mode():
        cache = model(random_ids(BATCH, 1), use_cache=True).past_key_values
    assert cache.get_seq_length() == group.size


def work(rank: int, size: int, rendezvous: Path, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=600)
    )
    process_group = dist.new_group(list(range(size)))
    assert isinstance(process_group, dist.ProcessGroup)
    group = ContextGroup(process_group, rank, size)
    try:
        for case in cases:
            try:
                check(case, group)
            except Exception as error:
                error.add_note(f"in the case {case.name!r}, process {rank} of {size}")
                raise
        check_bytes(group)
        check_refusals(group)
        check_tokens_read(group)
    except BaseException:  # the others wait for this one's messages
        traceback.print_exc()
        os._exit(1)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (2, LIGHT),
        pytest.param(2, CASES[len(LIGHT) :], marks=pytest.mark.slow),
        pytest.param(4, CASES, marks=pytest.mark.slow),
    ],
    ids=["two", "two-all", "four-all"],
)
def test_slices_equal_the_whole(tmp_path, size, cases):
    spawn(work, (size, tmp_path / "rendezvous", cases), nprocs=size)
