"""Muon's steps: as defined, for every projection by itself, from whole matrices and from ZeRO's shards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_helpers import Values, losses, stop_at_step_7
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from minrnn.common.errors import UserError
from minrnn.launch.estimates import engine_memory, measure, num_moments
from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.models.registry import CELLS
from minrnn.pipeline import muon
from minrnn.pipeline.families.build import NO_SPECIAL_TOKENS, build_causal_lm
from minrnn.pipeline.families.registry import config_of
from minrnn.pipeline.launch_checks import check_launch
from minrnn.pipeline.matrices import block_matrices
from minrnn.pipeline.optim import build_optimizer
from minrnn.pipeline.optim_section import OptimSection
from minrnn.pipeline.recipe import build_recipe
from minrnn.pipeline.zero_shards import Piece, Shard

Run = Callable[[Values], Path]
Widths = tuple[int, ...]
MATRICES = st.lists(
    st.tuples(st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple), st.integers(1, 9)),
    min_size=1,
    max_size=5,
)


def random_matrices(shapes: list[tuple[Widths, int]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(sum(rows), columns, dtype=torch.float64, generator=generator) for rows, columns in shapes
    ]


def optimizer_of(
    matrices: list[nn.Parameter], widths: list[Widths], dtype=torch.float64, decay=0.1
) -> muon.Muon:
    group = {"params": matrices, "weight_decay": decay, "is_muon": True}
    return muon.Muon([group], dict(zip(matrices, widths, strict=True)), 0.9, dtype, lr=0.01)


def naive_orthogonal(matrix: Tensor) -> Tensor:
    """As published, of one matrix [A, B]: on its singular values, which the polynomial maps one by one."""
    u, s, v = torch.linalg.svd(matrix / matrix.norm().clamp(min=1e-7), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@settings(max_examples=25)
@given(MATRICES, st.integers(0, 10**6))
def test_every_projection_is_orthogonalised_by_itself(shapes: list[tuple[Widths, int]], seed: int):
    """Two steps with Nesterov momentum, decay and scaling equal the definition on separate parts."""
    widths = [rows for rows, _ in shapes]
    whole = [nn.Parameter(matrix) for matrix in random_matrices(shapes, seed)]
    parts = [[part.detach().clone() for part in p.split(rows)] for p, rows in zip(whole, widths, strict=True)]
    momenta = [[torch.zeros_like(part) for part in of_matrix] for of_matrix in parts]
    optimizer = optimizer_of(whole, widths)
    for step in range(2):
        for parameter, gradient in zip(whole, random_matrices(shapes, seed + step + 1), strict=True):
            parameter.grad = gradient
        for i, parameter in enumerate(whole):
            assert parameter.grad is not None
            for j, gradient in enumerate(parameter.grad.split(widths[i])):
                momenta[i][j] = 0.9 * momenta[i][j] + 0.1 * gradient
                direction = naive_orthogonal(0.1 * gradient + 0.9 * momenta[i][j])
                scale = 0.2 * max(gradient.shape) ** 0.5
                parts[i][j] = (1 - 0.01 * 0.1) * parts[i][j] - 0.01 * scale * direction
        optimizer.step()
        for parameter, expected in zip(whole, parts, strict=True):
            torch.testing.assert_close(parameter.detach(), torch.cat(expected), rtol=1e-9, atol=1e-9)


def test_a_matrix_of_one_projection_takes_the_steps_of_torch():
    """torch's products are in bf16, so the steps agree within its rounding."""
    shapes: list[tuple[Widths, int]] = [((12,), 20), ((20,), 12), ((8,), 8)]
    ours, theirs = ([nn.Parameter(matrix.float()) for matrix in random_matrices(shapes, 0)] for _ in range(2))
    mine = optimizer_of(ours, [rows for rows, _ in shapes], torch.bfloat16)
    peer = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for step in range(1, 4):
        for a, b, gradient in zip(ours, theirs, random_matrices(shapes, step), strict=True):
            a.grad = b.grad = gradient.float()
        mine.step()
        peer.step()
    for a, b, start in zip(ours, theirs, random_matrices(shapes, 0), strict=True):
        moved = (b.detach() - start).norm()
        assert (a.detach() - b.detach()).norm() < 0.02 * moved


@settings(max_examples=25)
@given(MATRICES, st.integers(1, 4), st.integers(0, 10**6), st.booleans(), st.data())
def test_shards_take_the_steps_of_whole_matrices(
    shapes: list[tuple[Widths, int]], num_processes: int, seed: int, by_parameter: bool, data
):
    """Shards as ZeRO 1 and 2 cut them (a group laid end to end), and as ZeRO 3 does (each parameter), padded.
    All processes run here, one after the other, on a recorded gather."""
    widths = {str(i): rows for i, (rows, _) in enumerate(shapes)}
    whole = [nn.Parameter(matrix) for matrix in random_matrices(shapes, seed)]
    sizes = [[matrix.numel()] if by_parameter else [] for matrix in whole]
    pieces: list[dict[str, Piece]] = [{} for _ in range(num_processes)]
    if by_parameter:
        offset = 0
        for name, (size,) in zip(widths, sizes, strict=True):
            part = -(-size // num_processes)
            for rank in range(num_processes):
                if rank * part < size:
                    pieces[rank][name] = Piece(rank * part, offset, min(part, size - rank * part))
            offset += part
        length = offset
    else:
        total = sum(matrix.numel() for matrix in whole)
        length = -(-total // num_processes) + data.draw(st.integers(0, 2))
        begin = 0
        for name, matrix in zip(widths, whole, strict=True):
            for rank in range(num_processes):
                first = max(begin, rank * length)
                end = min(begin + matrix.numel(), (rank + 1) * length)
                if first < end:
                    pieces[rank][name] = Piece(first - begin, first - rank * length, end - first)
            begin += matrix.numel()

    def cut(matrices: list[Tensor]) -> list[Tensor]:
        shards = [torch.zeros(length, dtype=torch.float64) for _ in range(num_processes)]
        for shard, of_rank in zip(shards, pieces, strict=True):
            for name, (start, offset, size) in of_rank.items():
                shard[offset : offset + size] = matrices[int(name)].flatten()[start : start + size]
        return shards

    parameters = [nn.Parameter(shard) for shard in cut([matrix.detach() for matrix in whole])]
    shape_of = {name: matrix.shape for name, matrix in zip(widths, whole, strict=True)}
    optimizers = []
    for rank, parameter in enumerate(parameters):
        optimizer = optimizer_of([parameter], [()])
        optimizer.shards = {parameter: Shard(rank, pieces, shape_of, widths, torch.device("cpu"))}
        optimizers.append(optimizer)
    single = optimizer_of(whole, list(widths.values()))
    for step in range(2):
        gradients = random_matrices(shapes, seed + step + 1)
        for parameter, gradient in zip(whole, gradients, strict=True):
            parameter.grad = gradient
        single.step()
        momenta = [single.state[matrix]["momentum_buffer"] for matrix in whole]
        directions = cut([g.lerp(m, 0.9) for g, m in zip(gradients, momenta, strict=True)])
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                torch.distributed,
                "all_gather_into_tensor",
                lambda out, local, directions=directions: out.copy_(torch.cat(directions)),
            )
            for parameter, gradient, optimizer in zip(parameters, cut(gradients), optimizers, strict=True):
                parameter.grad = gradient
                optimizer.step()
    for parameter, expected in zip(parameters, cut([matrix.detach() for matrix in whole]), strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_singular_values_are_near_one_and_zeros_stay(height: int, width: int, seed: int):
    height, width = sorted((height, width))
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(height, height, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    singular = 0.1 + 0.9 * torch.rand(height, generator=generator, dtype=torch.float64)
    matrix = u @ torch.diag(singular) @ v[:height]
    result = muon.orthogonalize(torch.stack([matrix, torch.zeros_like(matrix)]))
    assert torch.linalg.svdvals(result[0]).sub(0.95).abs().max() < 0.35
    assert not result[1].any()


class Products(TorchDispatchMode):
    """Counts batched products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)
        return func(*args, **(kwargs or {}))


def model_of(**fields: Any) -> MinRNNForCausalLM:
    return MinRNNForCausalLM(MinRNNConfig(**{"hidden_size": 16, "intermediate_size": 24, **fields}))


def with_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def test_a_step_has_as_many_products_as_shapes():
    """Three for each shape in each of five steps, for any number of layers, and the FLOPs of the plan."""
    for num_layers in (1, 6):
        model = with_gradients(model_of(num_hidden_layers=num_layers))
        optimizer = build_optimizer(model, OptimSection(name="muon"))
        recipe = build_recipe(
            {
                "model": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": num_layers},
                "optim": {"name": "muon"},
            }
        )
        shapes = measure(recipe, 264).muon
        # gate, candidate, output gate and its transpose out_proj; gate, up and its transpose down_proj
        assert len(shapes) == 7 * num_layers
        assert {tuple(sorted(shape)) for shape in shapes} == {(16, 24)}
        with Products() as products, FlopCounterMode(display=False) as flops:
            optimizer.step()
        assert products.count == 3 * 5
        assert flops.get_total_flops() == muon.flops_per_step(shapes)


def test_large_batches_are_divided(monkeypatch: pytest.MonkeyPatch):
    parts = [torch.randn(4, 6, dtype=torch.float64) for _ in range(5)]
    whole = muon.orthogonal_updates(parts, [(2, 2)] * 5)
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 24)
    for a, b in zip(whole, muon.orthogonal_updates(parts, [(2, 2)] * 5), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", sorted(CELLS))
def test_the_matrices_are_the_projections_of_the_blocks(cell: str):
    """Every linear layer of a block, and nothing else: biases, convolutions, norms, embeddings and head are
    AdamW's."""
    model = model_of(cell=cell, num_hidden_layers=2, tie_word_embeddings=False)
    matrices, parameters = block_matrices(model), dict(model.named_parameters())
    linear = {
        f"model.layers.{name}.weight"
        for name, module in model.model.layers.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert matrices.keys() == linear
    for name, widths in matrices.items():
        assert sum(widths) == len(parameters[name])
    mixer = model.model.layers[1].get_submodule("mixer")
    assert list(matrices["model.layers.1.mixer.in_proj.weight"]) == mixer.widths
    optimizer = with_gradients(model) and build_optimizer(model, OptimSection(name="muon"))
    optimizer.step()
    names = {id(parameter): name for name, parameter in parameters.items()}
    with_momentum = {
        names[id(p)] for p, state in optimizer.state.items() if state.keys() == {"momentum_buffer"}
    }
    assert with_momentum == linear
    assert {names[id(p)] for group in optimizer.param_groups for p in group["params"]} == parameters.keys()


def test_matrices_of_other_families():
    fields = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}
    llama = {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, **NO_SPECIAL_TOKENS}
    matrices = block_matrices(build_causal_lm("llama", config_of("llama", {**fields, **llama})))
    attention, mlp = ("q", "k", "v", "o"), ("gate", "up", "down")
    assert matrices == {
        f"model.layers.0.{kind}.{name}_proj.weight": (width,)
        for kind, names, widths in (
            ("self_attn", attention, (16, 8, 8, 16)),
            ("mlp", mlp, (24, 24, 16)),
        )
        for name, width in zip(names, widths, strict=True)
    }
    for family, gates in (("lstm", 4), ("gru", 3)):
        model = build_causal_lm(family, config_of(family, {**fields, **NO_SPECIAL_TOKENS}))
        expected = {f"model.rnn.weight_{kind}_l0": (16,) * gates for kind in ("ih", "hh")}
        assert block_matrices(model) == expected
    gpt2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, **NO_SPECIAL_TOKENS}
    names = block_matrices(build_causal_lm("gpt2", config_of("gpt2", gpt2))).keys()
    assert names == {
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_a_model_without_matrices_is_refused():
    model = model_of(num_hidden_layers=1)
    model.model.layers = nn.ModuleList()
    with pytest.raises(UserError, match=r"optim\.name: muon finds no matrix .* use adamw"):
        build_optimizer(model, OptimSection(name="muon"))


def test_a_run_with_muon_resumes_to_the_bit(
    values: Values, run_recipe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And it learns, with one number of state for each element of a matrix."""
    values["optim"]["name"] = "muon"
    values["train"]["sample_tokens"] = 0
    whole = run_recipe(values)
    assert losses(whole)[-1][1] < losses(whole)[0][1] - 0.5
    values["run"]["dir"] = str(tmp_path / "stopped")
    stop_at_step_7(values, run_recipe, monkeypatch)
    assert losses(run_recipe(values)) == losses(whole)
    checkpoint = sorted((whole / "checkpoints").glob("step-*"))[-1]
    saved = load_file(checkpoint / "optimizer.safetensors")
    kinds = {key.partition(".")[0]: [] for key in saved}
    for key in saved:
        kinds[key.partition(".")[0]].append(key.partition(".")[2])
    assert kinds["exp_avg"] == kinds["exp_avg_sq"] == kinds["step"]
    assert all(name.endswith("proj.weight") and ".layers." in name for name in kinds["momentum_buffer"])
    recipe = build_recipe(values)
    model = measure(recipe, len(load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]))
    numbers = sum(tensor.numel() for key, tensor in saved.items() if not key.startswith("step."))
    assert numbers == num_moments(model.parameters, model.muon) < 2 * model.parameters
    assert engine_memory(model.parameters, 1, "fp32", "DDP", model.muon)["moments"] == 4 * numbers


def test_settings_that_contradict_are_refused(values: Values, run_recipe: Run, tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match=r"optim\.momentum: is for muon, not for adamw"):
        build_recipe({"optim": {"momentum": 0.9}})
    values["train"] |= {"steps": 2, "sample_tokens": 0, "eval_every": None, "save_every": 1}
    run_recipe(values)
    values["optim"]["name"], values["train"]["steps"] = "muon", 3
    with pytest.raises(UserError, match=r"optim\.name: is 'muon', but the run .* was started with 'adamw'"):
        run_recipe(values)
    values["run"]["change"] = ["optim.name"]
    with pytest.raises(UserError, match=r"optim\.name cannot change within a run"):
        run_recipe(values)
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "zero_force_ds_cpu_optimizer": True}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(UserError, match=r"zero_force_ds_cpu_optimizer: .* would replace Muon"):
        check_launch(build_recipe({"optim": {"name": "muon"}}))
    with pytest.raises(
        UserError, match=r"zero_force_ds_cpu_optimizer: .* would replace the one with cautious"
    ):
        check_launch(build_recipe({"optim": {"cautious_decay": True}}))
