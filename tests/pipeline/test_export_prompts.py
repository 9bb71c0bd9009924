"""An export's tokenizer and model, used as README, card and pipelines use them, give training's tokens for
each kind of tokenizer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers_of_each_kind import KINDS, saved
from transformers import AutoTokenizer, pipeline

from minrnn.data import Encoder, TextStream, load_tokenizer, model_vocab_size
from minrnn.launch.cli import main
from minrnn.models import MinRNNForCausalLM
from minrnn.pipeline.export import export_model, model_config, sample
from minrnn.pipeline.recipe import build_recipe, resolved_config

PROMPTS = ["the", "the cat sat on", "x = '<s></s><|endoftext|>'"]
Exported = tuple[Path, Encoder, Any, Any]


@pytest.fixture(scope="module", params=["bytes", *KINDS])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Folder, training's encoder, and the model and tokenizer loaded from the folder."""
    folder = tmp_path_factory.mktemp(request.param)
    name = "bytes" if request.param == "bytes" else saved(request.param, folder / "hub")
    tokenizer = load_tokenizer(name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16, "tie_word_embeddings": False}
    model = MinRNNForCausalLM(model_config(sizes, tokenizer, model_vocab_size(tokenizer), mask=True))
    export_model(model, tokenizer, folder / "model", resolved_config(build_recipe({})), tokens=0)
    out = folder / "model"
    return (
        out,
        Encoder.from_tokenizer(tokenizer, name),
        MinRNNForCausalLM.from_pretrained(out).eval(),
        AutoTokenizer.from_pretrained(out),
    )


def greedy(model: Any, encoder: Encoder, prompt: str, num_tokens: int) -> list[int]:
    """Greedy continuation with one forward pass per token, from the tokens that training reads."""
    ids = [encoder.bos, *encoder.encode(prompt).tolist()]
    for _ in range(num_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == encoder.eos:
            break
    return ids


def test_a_batch_as_in_the_readme_gives_the_logits_of_each_prompt_alone(exported: Exported):
    _, encoder, model, tokenizer = exported
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
        alone = [
            model(torch.tensor([[encoder.bos, *encoder.encode(prompt).tolist()]])).logits[0, -1]
            for prompt in PROMPTS
        ]
    torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-4, atol=1e-5)
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    for row, prompt in zip(written.tolist(), PROMPTS, strict=True):
        expected = greedy(model, encoder, prompt, 4)
        new = expected[1 + len(encoder.encode(prompt)) :]
        assert row[inputs["input_ids"].shape[1] :][: len(new)] == new


def test_pipelines_and_generate_read_prompts_as_training_does(exported: Exported, capfd):
    folder, encoder, model, tokenizer = exported
    writer: Any = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    for prompt in PROMPTS:
        expected = greedy(model, encoder, prompt, 4)
        (output,) = writer(prompt, max_new_tokens=4, do_sample=False, return_tensors=True)
        assert output["generated_token_ids"] == expected
        main(
            [
                "generate",
                str(folder),
                "--prompt",
                prompt,
                "--max-new-tokens",
                "4",
                "--temperature",
                "0",
                "--device",
                "cpu",
            ]
        )
        start = 1 + len(encoder.encode(prompt))
        stream = TextStream(tokenizer, expected[:start])
        assert capfd.readouterr().out == prompt + stream.write(expected[start:]) + stream.end() + "\n"


def test_samples_begin_with_their_prompts(exported: Exported):
    _, _, model, tokenizer = exported
    for text, prompt in zip(sample(model, tokenizer, PROMPTS, 5, seed=0), PROMPTS, strict=True):
        assert text.startswith(prompt)
        assert not any(
            name in text[len(prompt) :]
            for name in (tokenizer.bos_token, tokenizer.eos_token)
            if len(name) > 2
        )


def test_tokens_are_the_same_without_minrnn(tmp_path: Path):
    """All kinds in one process, because it takes seconds to start."""
    encoders = {}
    for kind in KINDS:
        tokenizer = load_tokenizer(saved(kind, tmp_path / "hub" / kind))
        tokenizer.save_pretrained(tmp_path / kind)
        encoders[kind] = Encoder.from_tokenizer(tokenizer, kind)
    script = """
import json, sys
sys.modules["minrnn"] = None
from transformers import AutoTokenizer
folder, kinds, prompts = json.loads(sys.argv[1])
load = AutoTokenizer.from_pretrained
tokenizers = {kind: load(f"{folder}/{kind}", trust_remote_code=True) for kind in kinds}
print(json.dumps({kind: tokenizer(prompts).input_ids for kind, tokenizer in tokenizers.items()}))
"""
    arguments = json.dumps([str(tmp_path), list(KINDS), PROMPTS])
    done = subprocess.run(
        [sys.executable, "-c", script, arguments], capture_output=True, text=True, check=True
    )
    expected = {
        kind: [[encoder.bos, *encoder.encode(prompt).tolist()] for prompt in PROMPTS]
        for kind, encoder in encoders.items()
    }
    assert json.loads(done.stdout.splitlines()[-1]) == expected
