"""The comparison is fair: peers compute the recurrence, have as many parameters, and decode as if they had
read the context.
"""

import pytest
import torch

from minrnn.evals.bench.decoders import make_decoder
from minrnn.evals.bench.language_models import (
    FAMILIES,
    OTHER_PEERS,
    Options,
    build,
    compute_logits,
    find_size,
)
from minrnn.evals.bench.measure import Unavailable
from minrnn.evals.bench.scan import layer_work, recurrence_work, scan_error, scan_operands
from minrnn.evals.bench.scan_peers import CELL_PEERS, LAYER_PEERS, OUR_SCANS, SCAN_PEERS
from minrnn.models import linear_scan

CPU = torch.device("cpu")


def load_or_skip(peer):
    try:
        return peer.load(CPU)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("shape", [(2, 64, 5), (1, 300, 3)])
@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("scan", n) for n in {**OUR_SCANS, **SCAN_PEERS}), *(("cell", n) for n in CELL_PEERS)],
)
def test_all_contenders_compute_the_recurrence(kind: str, name: str, shape: tuple[int, int, int]):
    peer = ({**OUR_SCANS, **SCAN_PEERS} if kind == "scan" else CELL_PEERS)[name]
    function = load_or_skip(peer)
    operands = scan_operands(kind, shape, torch.float32, CPU, seed=0)
    assert scan_error(kind, peer, function, operands) < 2e-5
    has_log_inputs = "log" in name or name == "minGRU-pytorch"  # whose gradients are those of log a and log b
    if kind == "scan" and not has_log_inputs:
        gradients = recurrence_work(function, peer, operands, "forward+backward")()
        leaves = [tensor.double().requires_grad_() for tensor in operands]
        exact = torch.autograd.grad(linear_scan(*leaves, backend="reference")[0].sum(), leaves)
        for actual, expected in zip(gradients, exact, strict=True):
            torch.testing.assert_close(peer.output(actual).double(), expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_log_space_scan():
    peer = SCAN_PEERS["log-space"]
    a, b = scan_operands("scan", (2, 40, 3), torch.float64, CPU, seed=1)
    actual = recurrence_work(load_or_skip(peer), peer, (a.float(), b.float()), "forward+backward")()
    leaves = [a.requires_grad_(), b.requires_grad_()]
    exact = torch.autograd.grad(linear_scan(*leaves, backend="reference")[0].sum(), leaves)
    for gradient, expected, leaf in zip(actual, exact, leaves, strict=True):
        # d/d log x = x d/dx
        torch.testing.assert_close(gradient.double(), expected * leaf.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", LAYER_PEERS)
def test_layers_have_one_width_and_gradients(name: str):
    try:
        layer = LAYER_PEERS[name](CPU, 6)
    except Unavailable as error:
        pytest.skip(str(error))
    x = torch.randn(2, 9, 6)
    assert layer(x).shape == x.shape
    assert all(torch.isfinite(gradient).all() for gradient in layer_work(layer, x, "forward+backward")())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("target", "num_layers"), [(10_700_000, 6), (1_000_000, 3)])
def test_parameters_agree_within_two_percent(family: str, target: int, num_layers: int):
    try:
        size, count = find_size(family, target, num_layers)
    except Unavailable as error:
        pytest.skip(str(error))
    assert abs(count / target - 1) <= 0.02
    with torch.device("meta"):
        model = FAMILIES[family].build(size, Options(num_layers))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_default_size_has_width_384():
    assert find_size("minrnn", 10_700_000, 6)[0][0] == 384


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in OTHER_PEERS])
def test_a_step_after_reading_equals_reading_all_tokens(family: str):
    try:
        model, _, _ = build(family, 400_000, Options(2), CPU)
    except Unavailable as error:
        pytest.skip(str(error))
    torch.manual_seed(1)
    for parameter in model.parameters():  # as initialised, some predict the last token whatever came before
        torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    tokens = torch.randint(256, (2, 20))
    with torch.inference_mode():
        decoder = make_decoder(family, model, 2, 4)
        decoder.read(tokens[:, :-1])
        actual = decoder.step(tokens[:, -1:])
        assert actual.tolist() == compute_logits(model, tokens)[:, -1:].argmax(-1).tolist()
        assert decoder.state_bytes() > 0 or family == "llama"


def test_a_llama_with_a_fake_state_has_its_whole_context():
    model, _, _ = build("llama", 400_000, Options(2), CPU)
    decoder = make_decoder("llama", model.eval(), 1, max_steps=4)
    with torch.inference_mode():
        decoder.set_fake_state(50)
        one_token = decoder.state_bytes() / 54
        assert one_token == 2 * 2 * decoder.model.config.hidden_size * 4
        for _ in range(3):
            decoder.rewind()
            for _ in range(4):
                decoder.step(torch.zeros(1, 1, dtype=torch.long))
            assert int(decoder.state.layers[0].cumulative_length) == 54
