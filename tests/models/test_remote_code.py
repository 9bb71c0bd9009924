"""A saved model contains its code: it loads without minrnn, without numba, and beside the package."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import generate, logits_of, new_model
from transformers.dynamic_module_utils import get_imports

from minrnn.data import byte_tokenizer

PROMPTS = ["def main", "x", "import os, sys"]
NUM_TOKENS = 12

# Hides the packages named in the second argument from all finders, as if they were not installed.
HIDE_PACKAGES = """
import json, sys

folder, hidden = sys.argv[1], json.loads(sys.argv[2])

class HidingFinder:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [HidingFinder(finder) for finder in sys.meta_path]
for name in hidden:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can still be imported")

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoTokenizer, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
"""

GENERATE = """
torch.set_num_threads(1)
prompts, num_tokens = json.loads(sys.argv[3]), int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # else it asks, on stdout
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert not any(name.partition(".")[0] in hidden for name, module in sys.modules.items() if module is not None)

def new_tokens(texts):
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return output[:, inputs["input_ids"].shape[1] :].tolist()

alone, batched = [new_tokens([prompt])[0] for prompt in prompts], new_tokens(prompts)
ids = tokenizer(prompts[:1], return_tensors="pt")["input_ids"]
loss = model(ids, labels=ids).loss
norm = loss.detach()
if "numba" in hidden:  # otherwise the backward kernel would be compiled again, for seconds
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
model.save_pretrained(f"{folder}-again-{len(hidden)}")
body = AutoModel.from_pretrained(f"{folder}-again-{len(hidden)}", trust_remote_code=True)
assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
if model.config.model_type == "minrnn":  # torch's RNNs have no classifier
    labels, again = {"trust_remote_code": True, "num_labels": 3}, f"{folder}-again-{len(hidden)}"
    classifier = AutoModelForSequenceClassification.from_pretrained(again, **labels)
    assert torch.equal(classifier.model(ids).last_hidden_state, body(ids).last_hidden_state)
assert type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()  # Trainer's label smoothing shifts
options = {"model": folder, "tokenizer": tokenizer, "trust_remote_code": True, "device": "cpu"}
features = pipeline("feature-extraction", **options)(prompts[0])
assert torch.allclose(torch.tensor(features), model.model(ids).last_hidden_state, atol=1e-5)
print(json.dumps({"alone": alone, "batched": batched, "loss": loss.item(), "norm": norm.item()}))
"""

SIDE_BY_SIDE = """
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ids = torch.arange(24).reshape(2, 12)

def run(model):
    model.train()
    output = model(ids, labels=ids)
    return [output.logits, *torch.autograd.grad(output.loss, list(model.parameters()))]

def load(source):
    if source == "package":
        from minrnn.models import MinRNNForCausalLM as factory
    elif "minrnn.models" in sys.modules:
        # AutoModelForCausalLM would take the package's classes, which are registered.
        factory = get_class_from_dynamic_module("modeling_minrnn.MinRNNForCausalLM", source)
    else:
        return AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    return factory.from_pretrained(folder)

sources = json.loads(sys.argv[3])
models = [load(sources[0])]
before = run(models[0])
models += [load(source) for source in sources[1:]]
results = [run(model) for model in models]
packages = [type(model).__module__.rpartition(".")[0] for model in models]
scans, operators = ([sys.modules[package + name] for package in packages] for name in (".scan", ".operators"))
for values in results:
    assert all(torch.equal(value, other) for value, other in zip(before, values, strict=True))
for module in scans:
    a, b = torch.rand(2, 5, 3), torch.rand(2, 5, 3)
    values = [module.linear_scan(a, b, backend=backend)[0] for backend in ("reference", "torch")]
    assert all(torch.allclose(value, values[0], atol=1e-6) for value in values)
namespaces = [module.namespace(scan.__file__) for module, scan in zip(operators, scans, strict=True)]
print(json.dumps({"namespaces": namespaces, "files": [scan.__file__ for scan in scans]}))
"""


def start(script: str, home: Path, *arguments: str) -> subprocess.Popen:
    """Run a script in another folder, isolated, offline, with an empty hub cache."""
    home.mkdir()
    (home / "script.py").write_text(script)
    environment = os.environ | {
        "HF_HOME": str(home / "hf"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-I", str(home / "script.py"), *arguments]
    return subprocess.Popen(
        command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> dict:
    output, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors[-4000:]
    return json.loads(output.splitlines()[-1])


def save(folder: Path, cell: str, **fields: Any):
    """An untied model, which does not repeat its last token, and its tokenizer; generation ends by length."""
    tokenizer = byte_tokenizer()
    model = new_model(
        vocab_size=264, cell=cell, tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id, **fields
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_the_saved_folder_holds_the_code(tmp_path):
    save(tmp_path, "mingru")
    saved = {path.name for path in tmp_path.glob("*.py")}
    assert saved >= {
        "modeling_minrnn.py",
        "configuration_minrnn.py",
        "scan.py",
        "cell_scan_numba.py",
        "layers_numba.py",
        "tiles_triton.py",
    }
    # A missing file, or an import that transformers cannot satisfy, would fail when the model is loaded.
    for name in saved:
        tree = ast.walk(ast.parse((tmp_path / name).read_text()))
        siblings = [
            f"{node.module}.py" for node in tree if isinstance(node, ast.ImportFrom) and node.level == 1
        ]
        assert saved >= set(siblings), name
        assert {"torch", "transformers", "huggingface_hub", "numpy"} >= set(
            get_imports(tmp_path / name)
        ) - sys.stdlib_module_names, name
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_minrnn.MinRNNConfig",
        "AutoModel": "modeling_minrnn.MinRNNModel",
        "AutoModelForCausalLM": "modeling_minrnn.MinRNNForCausalLM",
        "AutoModelForSequenceClassification": "modeling_classification.MinRNNForSequenceClassification",
    }


def test_loads_without_the_package(tmp_path):
    """With and without numba: the same text alone and in a left-padded batch; training and saving work."""
    folder = tmp_path / "model"
    model, tokenizer = save(folder, "mingru")
    arguments = (json.dumps(PROMPTS), str(NUM_TOKENS))
    hidden = {"numba": ["minrnn"], "no-numba": ["minrnn", "numba", "llvmlite", "triton"]}
    processes = {
        name: start(
            HIDE_PACKAGES + GENERATE, tmp_path / name, str(folder), json.dumps(hidden[name]), *arguments
        )
        for name in hidden
    }

    expected = []
    for prompt in PROMPTS:
        prompt_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected.append(generate(model, prompt_ids, NUM_TOKENS)[0, prompt_ids.shape[1] :].tolist())
    ids = tokenizer(PROMPTS[:1], return_tensors="pt")["input_ids"]
    loss = model(ids, labels=ids).loss
    norm = torch.stack([grad.norm() for grad in torch.autograd.grad(loss, list(model.parameters()))]).norm()
    for name, process in processes.items():
        result = finish(process)
        assert result["alone"] == expected
        assert result["batched"] == expected
        assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert name == "numba" or result["norm"] == pytest.approx(norm.item(), rel=1e-4)

    for names in hidden.values():
        again = Path(f"{folder}-again-{len(names)}")
        assert torch.equal(logits_of(type(model).from_pretrained(again), ids), logits_of(model, ids))
        assert (again / "scan.py").read_bytes() == (folder / "scan.py").read_bytes()


@pytest.mark.parametrize("version", ["same", "another"])
def test_copies_live_side_by_side(tmp_path, version):
    """The package and exports of it in one process: each keeps its operators, with the same source or not."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        save(folder, "minlstm", scan_backend="torch")
    if version == "another":
        with (folders[0] / "scan.py").open("a") as file:
            file.write("\n# another version\n")
    one, two = map(str, folders)
    sources = ["package", one, two] if version == "same" else [one, "package"]
    result = finish(start(HIDE_PACKAGES + SIDE_BY_SIDE, tmp_path / "home", one, "[]", json.dumps(sources)))
    assert [Path(file).is_relative_to(tmp_path) for file in result["files"]] == [
        source != "package" for source in sources
    ]
    assert len(set(result["files"])) == len(sources)
    assert len(set(result["namespaces"])) == (1 if version == "same" else 2)
