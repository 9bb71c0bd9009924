"""The plan agrees with the model, the kernels and the engines."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from minrnn.common.errors import UserError
from minrnn.launch import estimates, plan
from minrnn.launch.activation_memory import block_bytes
from minrnn.launch.cli import main
from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.models.minimal_coefficients import MINIMAL_CELLS
from minrnn.models.recompute import RECOMPUTE, checkpointing_options
from minrnn.models.registry import CELLS
from minrnn.pipeline.classification import new_model
from minrnn.pipeline.config import Recipe
from minrnn.pipeline.launch_checks import deepspeed_values
from minrnn.pipeline.recipe import build_recipe, read_recipe

MODELS = st.fixed_dictionaries(
    {
        "preset": st.sampled_from(["default", "paper"]),
        "cell": st.sampled_from(["mingru", "minlstm"]),
        "hidden_size": st.integers(8, 40),
        "num_hidden_layers": st.integers(1, 3),
        "expansion_factor": st.sampled_from([1.0, 1.5, 2.0]),
        "intermediate_size": st.sampled_from([0, 24, 64]),
        "conv_kernel": st.sampled_from([0, 1, 4]),
        "tie_word_embeddings": st.booleans(),
    }
)


@given(MODELS, st.integers(16, 300))
def test_parameters_are_those_of_the_real_model(fields: dict, vocab_size: int):
    recipe = build_recipe({"model": fields})
    model = estimates.measure(recipe, vocab_size)
    real = MinRNNForCausalLM(MinRNNConfig(**recipe.resolved_model_fields(), vocab_size=vocab_size))
    assert model.parameters == real.num_parameters()


@given(st.integers(1, 10**11), st.integers(1, 4096), st.sampled_from(["fp32", "bf16"]))
def test_sixteen_bytes_per_parameter_sharded_by_stage(num_parameters: int, processes: int, precision: str):
    """Weights, gradients and two moments. The shards of all processes add up to the whole."""

    def states(engine: str) -> float:
        parts = estimates.engine_memory(num_parameters, processes, precision, engine)
        return parts["weights"] + parts["gradients"] + parts["moments"]

    n, p = num_parameters, processes
    assert states("DDP") == 16 * n
    assert states("ZeRO-1") == pytest.approx(8 * n + 8 * n / p)
    assert states("ZeRO-2") == pytest.approx(4 * n + 12 * n / p)
    assert states("ZeRO-3") * p == pytest.approx(16 * n)
    for engine in ("ZeRO-1", "ZeRO-2", "ZeRO-3"):
        assert estimates.engine_memory(n, p, precision, engine)["own copy"] * p == pytest.approx(4 * n)
    assert estimates.engine_memory(n, p, "fp64", "DDP")["weights"] == 8 * n


TOKENS = 2048


def kept_bytes(recipe: Recipe, recompute: str, layers: int) -> int:
    """Bytes that a forward pass over TOKENS tokens keeps."""
    torch.manual_seed(0)
    fields = {**recipe.resolved_model_fields(), "num_hidden_layers": layers}
    model = MinRNNForCausalLM(MinRNNConfig(**fields, vocab_size=16)).train()
    torch.nn.Module.to(model, torch.float64 if recipe.train.precision == "fp64" else torch.float32)
    if (options := checkpointing_options(recompute)) is not None:
        model.activation_checkpointing_enable(options)
    ids = torch.arange(TOKENS).view(1, -1) % 16

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            return model(input_ids=ids, shift_labels=ids, skip_logits=True).loss

    return kept_by(loss)


def kept_by(loss: Callable[[], torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass."""
    loss()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        value = loss()  # its graph holds the activations
    total = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert value.requires_grad
    return total


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(
    ("precision", "fields"),
    [
        ("bf16", {}),
        ("bf16", {"cell": "minlstm", "output_gate": False}),
        ("bf16", {"preset": "paper"}),
        ("bf16", {"intermediate_size": 0, "conv_kernel": 0}),
        ("fp32", {}),
        ("bf16", {"cell": "mingru_signed"}),
        ("bf16", {"cell": "minlstm_signed", "candidate_activation": "silu", "output_gate": False}),
        ("fp32", {"cell": "mingru_signed", "candidate_activation": "g", "output_gate": False}),
        ("fp32", {"cell": "minlstm_signed"}),
        ("fp64", {}),
        (
            "fp64",
            {
                "cell": "minlstm_signed",
                "candidate_activation": "tanh",
                "intermediate_size": 0,
                "conv_kernel": 0,
            },
        ),
        *(("bf16", {"cell": cell}) for cell in CELLS if cell not in MINIMAL_CELLS),
        ("fp32", {"cell": "rwkv4"}),
        ("fp64", {"cell": "s4d"}),
        ("fp64", {"ternary": True}),
        ("fp32", {"residual_scales": True}),
        ("bf16", {"residual_scales": True, "output_norm": True}),
        ("fp32", {"cell": "lru", "output_norm": True}),
        ("fp32", {"two_tap_input": True, "conv_kernel": 0}),
    ],
)
def test_activations_are_what_the_blocks_keep(precision: str, fields: dict, recompute: str):
    """models/recompute.py states them for one kind of block in bf16; these are the other kinds and
    precisions."""
    recipe = build_recipe(
        {"model": {"hidden_size": 64, "intermediate_size": 128, **fields}, "train": {"precision": precision}}
    )
    model = estimates.measure(recipe, 16)
    measured = (kept_bytes(recipe, recompute, 5) - kept_bytes(recipe, recompute, 2)) / 3
    if recompute == "none" and precision == "bf16":
        measured -= (
            estimates.working_memory(model, estimates.workload_of(recipe, 1), precision)["bf16 copies"]
            / model.config.num_hidden_layers
        )
    assert measured / TOKENS == pytest.approx(block_bytes(model.config, precision)[recompute], rel=0.04)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_blocks_with_attention(precision: str, recompute: str):
    """Of every second block of four; the others keep what they keep in a model without attention."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    sizes |= {"attention_every": 2, "attention_window": 256}
    recipe = build_recipe({"model": sizes, "train": {"precision": precision}})
    model = estimates.measure(recipe, 16)
    measured = (kept_bytes(recipe, recompute, 6) - kept_bytes(recipe, recompute, 2)) / 2
    if recompute == "none" and precision == "bf16":
        copies = estimates.working_memory(model, estimates.workload_of(recipe, 1), precision)["bf16 copies"]
        measured -= copies / 2
    pair = sum(block_bytes(model.config, precision, layer, TOKENS)[recompute] for layer in (0, 1))
    assert measured / TOKENS == pytest.approx(pair, rel=0.04)
    short = [block_bytes(model.config, precision, 1, tokens)["none"] for tokens in (64, 2048)]
    assert short[0] > 1.2 * short[1]  # the keys before the chunk


@pytest.mark.parametrize(("corpus", "texts"), [("lra/image", 1), ("lra/retrieval", 2)])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_classifier_has_no_logits_of_tokens(corpus: str, texts: int, pooling: str):
    """It keeps the hidden states of all texts, once or twice, besides what its blocks keep."""
    values: dict = {"model": {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128}}
    values["model"] |= {"pooling": pooling, "bidirectional": True}
    values |= {"data": {"corpus": corpus}, "batch": {"lanes": 2, "chunk": 4000}}
    recipe = build_recipe({**values, "train": {"precision": "fp32"}})
    estimate, workload = estimates.measure(recipe, 264), estimates.workload_of(recipe, 1)
    assert workload.tokens == 2 * texts * 4000
    model: Any = new_model("minrnn", estimate.config).train()
    shape = (2, 4000) if texts == 1 else (2, 2, 4000)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.tensor([0, 1])
    kept = kept_by(lambda: model(input_ids=ids, labels=labels, use_cache=False).loss)
    common = estimates.working_memory(estimate, workload, "fp32")
    rest = kept - estimates.activations(estimate, workload, "fp32", "none")
    assert 0.45 * common["loss"] < rest < 1.1 * common["loss"]
    assert common["carried states"] == 0


def test_a_plan_counts_both_texts_of_pairs(capsys):
    main(["plan", "--config", "lra-retrieval", "--processes", "1", "--tflops", "100"])
    text = capsys.readouterr().out
    assert "512,000 a step (at most: 1 readers x 64 lanes x 4000 x 2 texts)" in text
    assert "1 micro batches of 512,000 tokens a step" in text


@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 3), st.integers(1, 8))
def test_a_step_is_divided_evenly_or_refused(readers: int, processes: int, context: int, lanes: int):
    recipe = build_recipe(
        {"batch": {"readers": 2**readers, "lanes": lanes, "chunk": 64}, "parallel": {"context": 2**context}}
    )
    if context > processes or processes - context > readers:
        with pytest.raises(UserError, match=r"parallel\.context|batch\.readers"):
            estimates.workload_of(recipe, 2**processes)
        return
    workload = estimates.workload_of(recipe, 2**processes)
    assert workload.tokens * workload.readers * workload.processes == 2**readers * lanes * 64


def test_a_plan_of_several_chunks(capsys):
    """More micro batches of the same size; a forward pass more of all chunks but the last."""
    lines = {}
    for chunks in (1, 4):
        main([
            *("plan", "--config", "fineweb-1b", "--vocab-size", "50264", "--processes", "16"),
            *("--tflops", "989", "--batch.backprop_chunks", str(chunks)),
        ])  # fmt: skip
        lines[chunks] = capsys.readouterr().out.splitlines()
    assert "4,194,304 a step (64 readers x 4 lanes x 4096 x 4 chunks)" in lines[4][1]
    assert lines[4][3].startswith("a process   16 micro batches of 16,384 tokens")
    seconds = {chunks: float(lines[chunks][4].split()[1]) for chunks in lines}
    assert seconds[4] == pytest.approx(4 * 1.25 * seconds[1], rel=0.01)
    sent = {chunks: [float(line.split()[-1]) for line in lines[chunks][-6:-1]] for chunks in lines}
    expected = [1, 1, 17 / 5, 60 / 12, 60 / 12]
    np.testing.assert_allclose(np.divide(sent[4], sent[1]), expected, rtol=0.01)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "2 to 4,096 tokens (model.memory_length), 0% of them more than the 4,096"),
        (
            ["--model.memory_length", "1e5"],
            "2 to 100,000 tokens (model.memory_length), 30% of them more than the",
        ),
        (
            ["--model.memory_length", "2"],
            "2 to 2 tokens (model.memory_length), 0% of them more than the 4,096",
        ),
        (
            ["--model.memory_length", "1e5", "--batch.backprop_chunks", "8"],
            "10% of them more than the 32,768",
        ),
    ],
)
def test_a_plan_says_how_far_channels_remember(options, expected, capsys):
    main(["plan", "--config", "fineweb-1b", "--vocab-size", "50264", *options])
    assert expected in capsys.readouterr().out


def test_micro_batches_are_counted_by_lanes_and_chunks():
    """As many as DeepSpeed accumulates; by_micro_lanes is for one chunk, however many a step has."""
    changes = [{}, {"backprop_chunks": 3}]
    model, sizes = None, []
    for batch in changes:
        values = {
            "batch": {"readers": 2, "lanes": 4, **batch},
            "train": {"micro_lanes": 2, "precision": "fp32"},
        }
        recipe = build_recipe(values)
        model = model or estimates.measure(recipe, 264)
        workload = estimates.workload_of(recipe, 1)
        assert workload.micro_batches == deepspeed_values(recipe)["gradient_accumulation_steps"]
        assert (workload.micro_batches, workload.micro_lanes) == (4 * batch.get("backprop_chunks", 1), 2)
        sizes.append(estimates.by_micro_lanes(model, workload, "fp32", 1e6))
    assert sizes[0] == sizes[1]
    assert list(sizes[0]) == [4, 2, 1]


def test_plan_of_fineweb_1b(capsys):
    recipe = read_recipe(["--config", "fineweb-1b"])
    assert estimates.measure(recipe, 50_264).parameters == pytest.approx(1.0e9, rel=0.05)
    for processes in (8, 16, 32, 64):
        estimates.workload_of(recipe, processes)
    main(
        [
            "plan",
            "--config",
            "fineweb-1b",
            "--vocab-size",
            "50264",
            "--processes",
            "16",
            "--gpu-memory",
            "40GB",
            "--tflops",
            "312",
        ]
    )
    output = capsys.readouterr().out
    tokens_per_parameter = float(output.split(" per parameter")[0].split()[-1])
    assert tokens_per_parameter == pytest.approx(20, rel=0.05)
    for engine in plan.ENGINES:
        assert any(line.startswith(engine) for line in output.splitlines())
    assert " s a step" in output
    rows = {line.split("  ")[0]: line for line in output.splitlines() if "*" in line}
    assert rows["DDP"].count("*") < rows["ZeRO-3"].count("*"), "what is shared among 16 leaves room for more"


def test_more_engines_fit_with_more_memory(capsys):
    counts = []
    for memory in ("5GB", "20GB", "45GB", "80GiB"):
        main(["plan", "--config", "fineweb-1b", "--vocab-size", "50264", "--gpu-memory", memory])
        lines = capsys.readouterr().out.splitlines()
        counts.append(sum(line.count("*") for line in lines if line.startswith(plan.ENGINES)))
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--processes", "3"],
            "error: batch.readers: 8 readers cannot be shared evenly by 3 processes; use [1, 2, 4, 8]",
        ),
        (
            ["--processes", "6", "--context", "4"],
            "error: parallel.context: 6 processes cannot form groups of 4",
        ),
        (
            ["--context", "8", "--batch.chunk", "100"],
            "error: batch.chunk: 100 tokens must divide by the 8 processes of parallel.context",
        ),
        (
            ["--context", "8", "--batch.chunk", "16"],
            "error: batch.chunk: 16 tokens must divide by the 8 processes of parallel.context and leave each "
            "at least the 3 tokens that the convolution looks back",
        ),
        (
            ["--context", "2", "--batch.chunk", "64", "--model.attention_every", "2"],
            "error: batch.chunk: 64 tokens must divide by the 2 processes of parallel.context and leave each "
            "at least the 511 tokens that the attention looks back",
        ),
        (
            ["--processes", "6", "--context", "2"],
            "error: batch.readers: 8 readers cannot be shared evenly by 3 groups of 2 processes; "
            "use [2, 4, 8, 16] processes",
        ),
        (["--context", "0"], "error: parallel.context: input should be greater than or equal to 1"),
        (["--gpu-memory", "80"], "error: --gpu-memory: '80' is not a size such as 80GB"),
        (["--processes", "0", "--fraction", "2"], "error: --fraction: must be positive and at most 1, not 2"),
        (["--batch.lane", "8"], "error: batch.lane: unknown key (did you mean batch.lanes?)"),
    ],
)
def test_user_errors(options: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", "--vocab-size", "264", "--batch.readers", "8", *options])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("context", [1, 2])
def test_fewer_lanes_at_a_time_need_less_memory(context: int):
    """What the plan shows for another train.micro_lanes is what it computes if the recipe sets it."""

    def plan_of(micro_lanes: int | None) -> tuple[estimates.Workload, dict[int, float], float]:
        values = {"train": {"micro_lanes": micro_lanes, "precision": "bf16"}, "batch": {"readers": 4}}
        recipe = build_recipe(values | {"parallel": {"context": context}})
        workload, model = estimates.workload_of(recipe, 2), estimates.measure(recipe, 264)
        kept = estimates.activations(model, workload, "bf16", "none")
        loss = estimates.working_memory(model, workload, "bf16")["loss"]
        return workload, estimates.by_micro_lanes(model, workload, "bf16", kept), kept + loss

    whole, sizes, _ = plan_of(None)
    assert list(sizes) == [16, 8, 4, 2, 1]
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    for micro_lanes, size in sizes.items():
        workload, same, total = plan_of(micro_lanes)
        assert same == pytest.approx(sizes)
        assert total == pytest.approx(size)
        assert workload.micro_batches * workload.tokens == whole.micro_batches * whole.tokens
