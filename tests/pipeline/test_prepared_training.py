"""Training from a prepared corpus is training from its original; a vocabulary's padding stays unused."""

import json
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_helpers import Values, losses
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minrnn.common.errors import UserError
from minrnn.data import CorpusSpec, load_tokenizer, open_source
from minrnn.data.prepared.make import prepare
from minrnn.data.train_tokenizer import train_tokenizer
from minrnn.pipeline.corpora import single_corpus_spec
from minrnn.pipeline.evaluation import validation_spec
from minrnn.pipeline.recipe import build_recipe

NUM_TOKENS = 515  # padded to 576


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BPE tokenizer with more tokens than bytes."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 6))) for _ in range(1600)]
    texts = [" ".join(words), "the state of a lane goes on where it was cut"]
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, NUM_TOKENS).save_pretrained(folder)
    return str(folder)


def prepared(values: Values, folder: Path) -> Values:
    """The recipe that reads the prepared corpus of a recipe."""
    recipe = build_recipe(values)
    name = recipe.data.tokenizer
    prepare(single_corpus_spec(recipe), load_tokenizer(name), name, folder, workers=0)
    values = deepcopy(values)
    values["data"]["corpus"] = str(folder)
    values["data"].pop("tokenizer", None)
    values["run"]["dir"] += "-prepared"
    return values


def test_the_losses_are_those_of_the_original(
    values: Values, run_recipe: Callable[[Values], Path], tokenizer: str, tmp_path: Path
):
    """Also in validation; the tokenizer is exported with the model, which never generates padding."""
    values["data"]["tokenizer"] = tokenizer
    values["train"]["steps"] = 6
    from_tokens = prepared(values, tmp_path / "tokens")
    folders = [run_recipe(deepcopy(values)), run_recipe(from_tokens)]
    for kind in ("train", "validation"):
        assert losses(folders[0], kind) == losses(folders[1], kind) != []
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in folders]
    bits = [[json.loads(line).get("bits_per_byte") for line in some] for some in lines]
    assert bits[0] == bits[1]
    config = yaml.safe_load((folders[1] / "config.yaml").read_text())
    assert config["data"]["tokenizer"] == str(tmp_path / "tokens" / "tokenizer")
    model: Any = AutoModelForCausalLM.from_pretrained(folders[1] / "model", trust_remote_code=True)
    exported = AutoTokenizer.from_pretrained(folders[1] / "model")
    assert exported.get_vocab() == load_tokenizer(tokenizer).get_vocab()
    assert (model.config.vocab_size, model.config.num_tokens) == (576, NUM_TOKENS)
    ids = exported("state1 goes", return_tensors="pt")["input_ids"]
    assert (model(ids).logits.softmax(-1)[..., NUM_TOKENS:] == 0).all()
    new = model.generate(ids, max_new_tokens=40, do_sample=True, temperature=9.0, top_k=0)
    assert new.max() < NUM_TOKENS


def test_a_family_suppresses_padding_in_generation(
    values: Values, run_recipe: Callable[[Values], Path], tokenizer: str
):
    values["data"]["tokenizer"] = tokenizer
    values["train"]["steps"] = 1
    values["model"] = {
        "family": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "family_config": {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16},
    }
    folder = run_recipe(values) / "model"
    assert GenerationConfig.from_pretrained(folder).suppress_tokens == list(range(NUM_TOKENS, 576))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[NUM_TOKENS:] *= 1000
        ids = torch.tensor([[1, 5, 9]])
        assert model(ids).logits[0, -1].argmax() >= NUM_TOKENS
        assert model.generate(ids, max_new_tokens=9, do_sample=False).max() < NUM_TOKENS


def test_a_prepared_corpus_for_validation_needs_no_split(values: Values, tmp_path: Path):
    """The default of data.validation_split is not the split that it was prepared with. Another one is."""
    folder = prepared(values, tmp_path / "tokens")["data"]["corpus"]
    values["data"]["validation"] = folder
    for split in (None, "train", "test"):
        if split is not None:
            values["data"]["validation_split"] = split
        recipe = build_recipe(values)
        spec, part = validation_spec(recipe, single_corpus_spec(recipe))
        assert isinstance(spec, CorpusSpec)
        if split == "test":
            with pytest.raises(UserError, match=r"data\.split: is 'test', but .* was prepared with 'train'"):
                open_source(spec, part)
        else:
            assert open_source(spec, part).num_shards == 1


def test_another_tokenizer_is_refused_before_the_first_step(
    values: Values, run_recipe: Callable[[Values], Path], tokenizer: str, tmp_path: Path
):
    from_tokens = prepared(values, tmp_path / "tokens")
    from_tokens["data"]["tokenizer"] = tokenizer
    with pytest.raises(UserError, match=r"is not the tokenizer that .* was prepared with \(bytes\)"):
        run_recipe(from_tokens)
