"""Loading models: dtype, trust in a tokenizer's code, memory."""

import ast
import io
import json
from pathlib import Path

import pytest
import torch
from tiny_families import tiny_model

from minrnn.common.errors import UserError
from minrnn.data import byte_tokenizer
from minrnn.launch.cli import main
from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.models.dtypes import DTYPES
from minrnn.pipeline.code_trust import require_code_trust
from minrnn.pipeline.loading import read_weights, weights_dtype
from minrnn.pipeline.options import DTYPE_NAMES

CPU, MPS = torch.device("cpu"), torch.device("mps")


@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
def test_auto_keeps_dtypes_that_would_lose_precision(stored: torch.dtype):
    assert weights_dtype(stored, "auto", CPU) == stored


def test_auto_converts_bf16_only_if_fp32_is_faster(monkeypatch):
    for rates, expected in (
        ({"fp32": 100e9, "bf16": 1e9}, torch.float32),
        ({"fp32": 100e9, "bf16": 400e9}, torch.bfloat16),
    ):
        monkeypatch.setattr("minrnn.pipeline.loading.measure_rates", lambda *_, rates=rates: rates)
        assert weights_dtype(torch.bfloat16, "auto", CPU) == expected


def test_a_slow_dtype_is_used_with_a_warning(monkeypatch, capsys):
    monkeypatch.setattr("minrnn.pipeline.loading.measure_rates", lambda *_: {"fp32": 100e9, "bf16": 1e9})
    assert weights_dtype(torch.float32, "bf16", CPU) == torch.bfloat16
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: --dtype: matrix products reach 1 GFLOP/s in bf16 here, and 100 GFLOP/s in fp32"
    )


def test_unsupported_dtypes_and_devices_are_errors():
    with pytest.raises(
        UserError,
        match="--dtype: mps does not support fp64, in which the weights are stored; use --dtype fp32",
    ):
        weights_dtype(torch.float64, "auto", MPS)
    with pytest.raises(UserError, match="--dtype: must be auto, fp32, bf16, fp64, not float32"):
        weights_dtype(torch.float32, "float32", CPU)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder, tokenizer = tmp_path / "export" / "model", byte_tokenizer()
    MinRNNForCausalLM(MinRNNConfig(hidden_size=8, num_hidden_layers=1, intermediate_size=0)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def errors_of(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


COMMANDS = {
    "generate": ("--max-new-tokens", "1", "--device", "cpu"),
    "long-context": ("--corpus", "python-stdlib", "--tokens", "100", "--device", "cpu"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tokenizer_s_code_runs_only_if_trusted(export: Path, command: str, monkeypatch, capsys):
    """A pipe cannot answer for a person. The code of a model of minrnn is never run, but this package's."""
    code, ran = export / "tokenization_own.py", export.parent / "code-was-run"
    code.write_text(
        "from pathlib import Path\n\nfrom transformers import PreTrainedTokenizerFast\n\n"
        f"Path({str(ran)!r}).touch()\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (export / "modeling_own.py").write_text(code.read_text())
    own_tokenizer = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    own_model = {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}
    for name, own in (("tokenizer_config.json", own_tokenizer), ("config.json", own_model)):
        (export / name).write_text(json.dumps({**json.loads((export / name).read_text()), **own}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    stderr = errors_of([command, str(export), *COMMANDS[command]], capsys)
    assert stderr.startswith("error: MODEL: the tokenizer of ")
    assert "brings code of its own, which is not run; read it in" in stderr
    assert not ran.exists()
    if command == "generate":
        main([command, str(export), *COMMANDS[command], "--trust-remote-code"])
        assert ran.exists()


OWN_MODEL = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({ran!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_model"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    """A model that only its own code can run. The code makes the file code-was-run."""
    folder = tmp_path / "own" / "model"
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "modeling_own.py").write_text(OWN_MODEL.format(ran=str(tmp_path / "code-was-run")))
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_model", "architectures": ["OwnModel"], "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Terminal(io.StringIO):
    """A terminal at which a person types."""

    def isatty(self) -> bool:
        return True


def test_a_tokenizer_in_the_auto_map_of_a_model_is_no_error():
    classes = ["modeling_own.OwnModel", [None, "tokenization_own.OwnTokenizer"]]
    with pytest.raises(UserError, match=r"brings code of its own \(modeling_own.py\), which is not run"):
        require_code_trust("me/model", "model", classes, False)


def test_a_model_s_code_runs_only_if_trusted(own_model: Path, monkeypatch, capsys):
    ran, command = (
        own_model.parent.parent / "code-was-run",
        ["generate", str(own_model), "--max-new-tokens", "1"],
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    stderr = errors_of(command, capsys)
    assert "brings code of its own (modeling_own.py), which is not run; read it in" in stderr
    assert "add --trust-remote-code to run it" in stderr
    assert not ran.exists()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    with pytest.raises(SystemExit):
        main(command)
    assert "It can do anything that you can. Run it? [y/N]" in capsys.readouterr().err
    assert not ran.exists()
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    main([*command, "--prompt", "def main"])
    assert ran.exists()
    ran.unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO())
    main([*command, "--prompt", "def main", "--trust-remote-code"])
    assert capsys.readouterr().out.startswith("def main")


def test_every_load_passes_trust_remote_code():
    """Without the argument, transformers asks at a prompt."""
    root = Path(__file__).parents[2]
    for path in [
        path
        for folder in ("models", "data", "pipeline", "launch", "evals")
        for path in (root / folder).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
            ):
                assert "trust_remote_code" in {keyword.arg for keyword in node.keywords}, (
                    f"{path}:{node.lineno}"
                )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 1_000_000}, "GB for weights in fp32, by its config.json, of"),
        ({"num_hidden_layers": 10**12}, "GB for weights in fp32, by its config.json, of"),
        ({"vocab_size": 10**18, "hidden_size": 10**6}, "is larger than can be counted, by its config.json"),
    ],
)
def test_a_model_larger_than_the_memory_is_refused(
    export: Path, changes: dict[str, int], message: str, capsys
):
    values = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**values, **changes}))
    line = errors_of(["generate", str(export), *COMMANDS["generate"]], capsys)
    assert line.startswith("error: MODEL: ")
    assert message in line


def test_the_names_of_dtypes_are_the_same_in_options_and_models():
    assert tuple(DTYPES) == DTYPE_NAMES


def test_errors_name_the_setting_that_names_the_model(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    for name in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError) as caught:
            read_weights(str(name), key="model.init_from")
        assert [key for key, _ in caught.value.errors] == ["model.init_from"]
