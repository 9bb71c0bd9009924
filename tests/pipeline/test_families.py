"""Families in a recipe: sizes that meet a number of parameters, and errors before training."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.models.minimal_cells import MinimalMixer
from minrnn.models.registry import CELLS
from minrnn.pipeline.classification import classifier_fields, new_model
from minrnn.pipeline.export import model_config
from minrnn.pipeline.families import registry
from minrnn.pipeline.families.build import build_causal_lm, check_memory, search_sizes
from minrnn.pipeline.families.sizes import (
    TOLERANCE,
    InvalidSizeError,
    NoSizeError,
    Size,
    SizeRule,
    find_size,
    mlp,
)
from minrnn.pipeline.family_settings import with_sizes
from minrnn.pipeline.recipe import build_recipe, resolved_config
from minrnn.pipeline.recipe_on_resume import check_unchanged, with_saved_settings

VOCAB = 264
NO_TOKENIZER = SimpleNamespace(bos_token_id=None, eos_token_id=None, pad_token_id=None)


def errors_of(values: dict[str, Any]) -> list[str]:
    with pytest.raises(UserError) as raised:
        build_recipe(values)
    return str(raised.value).splitlines()


RULES = [
    SizeRule(64, mlp(8 / 3)),
    SizeRule(32, mlp(2.0), finest_step=8),
    SizeRule(8, None, finest_step=1),
    SizeRule(1, None),
]


def distance_to_target(rule: SizeRule, count: Callable[[Size], int], width: int, target: int) -> float:
    """How far the sizes of a width are from the target, if the fine size could be any number."""
    low, high = (0, 0) if rule.fine is None else rule.fine(width)[::2][:2]
    return abs(min(max(target, count((width, low))), count((width, high))) - target)


@given(st.integers(10_000, 10**9), st.sampled_from(RULES), st.integers(1, 24), st.sampled_from([1, 2, 3, 5]))
def test_a_size_is_within_two_percent_or_the_nearest_is_named(
    target: int, rule: SizeRule, layers: int, period: int
):
    """Widths that are no multiple of `period` are not valid."""

    def number_of(size: Size) -> int:
        width, fine = size
        return 264 * width + layers * (4 * width**2 + 3 * width * fine)

    def count(size: Size) -> int:
        if size[0] % period:
            raise InvalidSizeError(f"of width {size[0]}")
        return number_of(size)

    message = ""
    try:
        size, number = find_size("model", rule, count, target)
    except NoSizeError as error:
        message = str(error)
    else:
        assert number == number_of(size)
        assert abs(number - target) <= TOLERANCE * target
        assert size[0] % (rule.finest_step or rule.step) == size[0] % period == 0
    if message:
        assert f"has {target:,} parameters within 2%; the nearest has" in message
        finest = rule.finest_step or rule.step
        for width in range(finest, 16_000, finest):
            unit = 0 if rule.fine is None else 3 * layers * width  # parameters of a step of the fine size
            distance = distance_to_target(rule, number_of, width, target)
            assert width % period or distance > TOLERANCE * target or unit > TOLERANCE * target


@pytest.mark.parametrize("name", registry.FAMILIES)
@pytest.mark.parametrize(("target", "layers"), [(3_000_000, 4), (11_000_000, 6)])
def test_every_family_with_rules_has_the_size(name: str, target: int, layers: int):
    recipe = build_recipe({"model": {"family": name, "num_parameters": target, "num_hidden_layers": layers}})
    recipe = with_sizes(recipe, VOCAB)
    config = model_config(recipe.resolved_model_fields(), NO_TOKENIZER, VOCAB, name)
    with torch.device("meta"):
        model = build_causal_lm(name, config)
    assert abs(model.num_parameters() / target - 1) <= TOLERANCE
    assert config.num_hidden_layers == layers


BLOCKS: list[dict[str, Any]] = [{}, {"intermediate_size": 0}, {"expansion_factor": 3}]
# The preset sets a field that only these cells have.
PAPER = [(cell, {"preset": "paper"}) for cell in CELLS if CELLS[cell] is MinimalMixer]


@pytest.mark.parametrize(("cell", "more"), [*itertools.product(CELLS, BLOCKS), *PAPER])
def test_ours_are_counted_whatever_the_block(cell: str, more: dict[str, Any]):
    fields = {"cell": cell, "num_parameters": "1.5M", "num_hidden_layers": 3, **more}
    recipe = with_sizes(build_recipe({"model": fields}), VOCAB)
    config = model_config(recipe.resolved_model_fields(), NO_TOKENIZER, VOCAB)
    with torch.device("meta"):
        model = build_causal_lm("minrnn", config)
    assert abs(model.num_parameters() / 1.5e6 - 1) <= TOLERANCE
    assert config.cell == cell
    assert config.expansion_factor == more.get("expansion_factor", 1.5)


@pytest.mark.parametrize("name", registry.FAMILIES)
def test_one_line_of_the_documented_recipe_switches_the_family(name: str):
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    values = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    values["model"]["family"] = name
    recipe = with_sizes(build_recipe(values), VOCAB)
    assert recipe.model.sizes
    assert recipe.batch.carry_state == (name in registry.CARRYING)


def test_a_classifier_is_counted_with_its_own_head():
    values = {
        "model": {"num_parameters": "200k", "num_hidden_layers": 2},
        "data": {"corpus": "lra/listops"},
        "batch": {"chunk": 2000, "carry_state": False},
    }
    recipe = with_sizes(build_recipe(values), 32)
    fields = {**recipe.resolved_model_fields(), **classifier_fields("lra/listops", {})}
    with torch.device("meta"):
        model = new_model("minrnn", model_config(fields, NO_TOKENIZER, 32))
    assert type(model).__name__ == "MinRNNForSequenceClassification"
    assert abs(model.num_parameters() / 200_000 - 1) <= TOLERANCE


def test_fields_of_the_user_are_kept():
    sizes = search_sizes("llama", 1_000_000, {"num_attention_heads": 4, "num_key_value_heads": 2}, 264)
    assert sizes.keys() == {"hidden_size", "intermediate_size"}
    assert search_sizes("gpt2", 51_840_256, {"n_layer": 6}, 1300).keys() == {"n_embd", "n_head"}


@pytest.mark.parametrize(
    "model",
    [
        {"family": "llama", "family_config": {"num_attention_heads": 6, "num_key_value_heads": 3}},
        {"cell": "mlstm", "head_dim": 80},
        {"cell": "lru", "expansion_factor": 0.3},
    ],
)
def test_fields_need_fit_the_width_that_is_chosen_only(model: dict[str, Any]):
    fits_default = {**model, "num_hidden_layers": 2}
    assert errors_of({"model": fits_default})
    recipe = with_sizes(build_recipe({"model": {**fits_default, "num_parameters": "3M"}}), VOCAB)
    saved = resolved_config(recipe)
    assert build_recipe(saved).model.sizes == recipe.model.sizes


@pytest.mark.parametrize("heads", [4, 8])
def test_a_given_number_of_heads_is_that_of_keys_too(heads: int):
    fields = {"num_hidden_layers": 2, "num_attention_heads": heads}
    for name in ("llama", "qwen3"):
        sizes = search_sizes(name, 3_000_000, fields, VOCAB)
        assert sizes["num_key_value_heads"] == heads


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"family": "xlstm", "tie_word_embeddings": True},
            "error: model.tie_word_embeddings: xlstm cannot tie its head to the embedding; use false",
        ),
        (
            {"family": "llama", "family_config": {"hidden_act": "foo"}},
            "error: model.family_config.hidden_act: llama cannot be built: KeyError: 'foo'",
        ),
    ],
)
def test_an_error_of_every_size_is_said_without_a_search(model: dict[str, Any], message: str, monkeypatch):
    monkeypatch.setattr("minrnn.pipeline.families.build.find_size", lambda *_: pytest.fail("searched"))
    with pytest.raises(UserError) as raised:
        with_sizes(build_recipe({"model": {**model, "num_parameters": "3M", "num_hidden_layers": 2}}), VOCAB)
    assert str(raised.value) == message


LLAMA = {"family": "llama", "num_hidden_layers": 2, "hidden_size": 64}
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown family": (
        {"model": {"family": "lama"}},
        "model.family: 'lama' is none of minrnn, gru, lstm, or a model type of transformers' causal language "
        "models (did you mean llama or mllama?)",
    ),
    "a field that the family lacks": (
        {"model": {**LLAMA, "dropout": 0.1}},
        "model.dropout: LlamaConfig has no dropout (did you mean attention_dropout?); leave it out; fields "
        "of llama are set in model.family_config",
    ),
    "a misspelt field": (
        {"model": {**LLAMA, "family_config": {"num_atention_heads": 4}}},
        "model.family_config: LlamaConfig has no num_atention_heads (did you mean num_attention_heads?)",
    ),
    "a wrong value": (
        {"model": {**LLAMA, "family_config": {"num_attention_heads": "four"}}},
        "model.family_config.num_attention_heads: Validation error for field 'num_attention_heads'",
    ),
    "a width that does not fit": (
        {"model": {**LLAMA, "hidden_size": 50}},
        "model.hidden_size: Class validation error for validator 'validate_architecture'",
    ),
    "a dropout that is no probability": (
        {"model": {**LLAMA, "family_config": {"attention_dropout": 2}}},
        "model.family_config.attention_dropout: must be in [0, 1], not 2",
    ),
    "no layers": (
        {"model": {"family": "gpt2", "family_config": {"n_layer": 0}}},
        "model.family_config.n_layer: must be at least 1, not 0",
    ),
    "no layers, by the general name": (
        {"model": {"family": "gpt2", "num_hidden_layers": -1}},
        "model.num_hidden_layers: must be at least 1, not -1",
    ),
    "a vocabulary": (
        {"model": {**LLAMA, "family_config": {"vocab_size": 9}}},
        "model.family_config: vocab_size is the tokenizer's",
    ),
    "a field twice": (
        {"model": {"family": "gpt2", "hidden_size": 64, "family_config": {"n_embd": 32}}},
        "model.family_config: n_embd is also set in the section model itself; say it once",
    ),
    "fields of another family for ours": (
        {"model": {"family_config": {"n_head": 2}}},
        "model.family_config: is for other families; minrnn's fields are set in the section model itself",
    ),
    "a preset": (
        {"model": {**LLAMA, "preset": "paper"}},
        "model.preset: is a form of minrnn's block; llama has none, so leave it out",
    ),
    "a number of parameters and a width": (
        {"model": {**LLAMA, "num_parameters": "3M"}},
        "model.num_parameters: chooses the size, but hidden_size is set as well; leave either out",
    ),
    "an unknown unit": (
        {"model": {"num_parameters": "1T"}},
        "model.num_parameters: must be a number such as 150000, 300k, 10M or 1.5B, not '1T'",
    ),
    "the same for ours": (
        {"model": {"hidden_size": 64, "intermediate_size": 64, "num_parameters": 10**6}},
        "model.num_parameters: chooses the size, but hidden_size and intermediate_size are set as well",
    ),
    "sizes without a number of parameters": (
        {"model": {"sizes": {"hidden_size": 64}}},
        "model.sizes: is what minrnn writes for num_parameters, which is not set; leave it out",
    ),
    "a family without a width": (
        {"model": {"family": "blt", "num_parameters": "3M"}},
        "model.num_parameters: cannot size blt: BltConfig has no hidden_size",
    ),
    "a family of several models": (
        {"model": {"family": "gemma3", "num_parameters": "3M"}},
        "model.family: gemma3 is made of several models, not only of one that reads text; use gemma3_text",
    ),
    "a state that is asked for": (
        {"model": LLAMA, "batch": {"carry_state": True}},
        "batch.carry_state: llama has no state to carry from chunk to chunk; use false",
    ),
    "context parallelism": (
        {"model": {"family": "gru"}, "parallel": {"context": 2}},
        "parallel.context: only minrnn can divide a sequence among processes, not gru; use 1",
    ),
    "recomputation": (
        {"model": LLAMA, "train": {"recompute": "full"}},
        "train.recompute: is for minrnn's blocks, not for llama; use none",
    ),
    "compilation": (
        {"model": LLAMA, "train": {"compile": True}},
        "train.compile: is for minrnn's blocks, not for llama; use false",
    ),
    "a long chunk": (
        {"model": {"family": "gpt2", "max_position_embeddings": 128}, "batch": {"chunk": 256}},
        "batch.chunk: gpt2 has 128 positions, and a chunk 256 tokens; lower it, or raise "
        "model.max_position_embeddings",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_before_training(case: str):
    values, message = ERRORS[case]
    (line,) = errors_of(values)
    assert line.startswith(f"error: {message}")


def test_all_errors_are_reported_at_once():
    values = {"model": {"family": "mamba", "cell": "mingru", "dropout": 0.1, "family_config": {"x": 1}}}
    keys = [line.split(": ")[1] for line in errors_of(values)]
    assert keys == ["model.cell", "model.dropout", "model.family_config"]


def test_a_target_that_cannot_be_met_names_the_nearest():
    recipe = build_recipe({"model": {"family": "gpt2", "num_parameters": "1M", "num_hidden_layers": 2}})
    with pytest.raises(
        UserError, match=r"no gpt2 of 2 layers has 1,000,000 parameters within 2%; the nearest"
    ):
        with_sizes(recipe, 264)


@pytest.mark.parametrize("name", ["minrnn", "llama", "gru"])
def test_resolved_sizes_are_read_back_and_kept_on_resume(name: str):
    fields = {"family": name, "num_parameters": "1M", "num_hidden_layers": 2}
    values = {"model": fields, "train": {"precision": "fp32"}}
    recipe = with_sizes(build_recipe(values), 264)
    saved = yaml.safe_load(yaml.safe_dump(resolved_config(recipe)))
    assert saved["model"]["sizes"] == recipe.model.sizes != {}
    assert with_sizes(build_recipe(saved), 264).resolved_model_fields() == recipe.resolved_model_fields()
    assert build_recipe(values).model.sizes == {}
    assert with_saved_settings(build_recipe(values), saved).model.sizes == saved["model"]["sizes"]
    check_unchanged(saved, build_recipe(values), "run")
    fields["num_parameters"] = "2M"
    assert with_saved_settings(build_recipe(values), saved).model.sizes == {}
    with pytest.raises(UserError, match=r"model.num_parameters: is 2000000, but the run in run was started"):
        check_unchanged(saved, build_recipe(values), "run")


@pytest.mark.parametrize("name", ["minrnn", "llama", "gru"])
@given(target=st.integers(300_000, 3_000_000), layers=st.integers(1, 4))
@settings(max_examples=5)
def test_sizes_of_another_number_are_searched_again(name: str, target: int, layers: int):
    """As in a config.yaml that becomes the recipe of another run."""
    model = {"family": name, "num_parameters": "1M", "num_hidden_layers": 2}
    values = resolved_config(with_sizes(build_recipe({"model": model}), VOCAB))
    fields = values["model"] if name == "minrnn" else values["model"]["family_config"]
    fields["num_hidden_layers"] = layers
    values["model"]["num_parameters"] = target
    recipe = with_sizes(build_recipe(values), VOCAB)
    config = model_config(recipe.resolved_model_fields(), NO_TOKENIZER, VOCAB, name)
    with torch.device("meta"):
        built = build_causal_lm(name, config)
    assert abs(built.num_parameters() - target) <= TOLERANCE * target
    assert config.num_hidden_layers == layers


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(["minrnn", "gru", "llama"], 2)])
def test_a_run_does_not_resume_with_another_family(first: str, second: str):
    """Its fields, and the state that it carries, are no errors of their own."""
    fields = {"num_hidden_layers": 3}
    saved = resolved_config(build_recipe({"model": {"family": first, **fields}}))
    with pytest.raises(UserError) as raised:
        check_unchanged(saved, build_recipe({"model": {"family": second, **fields}}), "run")
    (line,) = str(raised.value).splitlines()
    assert f"model.family: is '{second}', but the run in run was started with '{first}'" in line


def test_a_model_that_does_not_fit_into_memory_is_refused(monkeypatch):
    """As llama is without any size: it has that of the published model."""
    monkeypatch.setattr("minrnn.pipeline.families.build.main_memory", lambda: 16 * 10**9)
    config = registry.config_of("llama", {"num_hidden_layers": 32})
    with pytest.raises(
        UserError, match=r"model.family: this llama has 6,738,.* 27 GB in fp32, of 16 GB here"
    ):
        check_memory("llama", config)
    check_memory("llama", registry.config_of("llama", {"num_hidden_layers": 2}))


def test_a_missing_package_is_named(monkeypatch):
    def fail(config):
        raise ImportError("this model needs the package `xyz`: pip install xyz")

    monkeypatch.setattr("minrnn.pipeline.families.build.causal_lm", fail)
    with pytest.raises(UserError, match=r"model.family: llama needs a package: .*pip install xyz"):
        build_causal_lm("llama", registry.config_of("llama", {}))


def test_other_libraries_cannot_take_a_family_s_name(monkeypatch):
    """As flash-linear-attention does for mamba, when it is imported."""

    class OtherConfig(transformers.PreTrainedConfig):
        model_type = "mamba"

    registered = transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content
    monkeypatch.setitem(registered, "mamba", OtherConfig)
    registry.config_class.cache_clear()
    assert registry.config_class("mamba") is transformers.MambaConfig
    config = registry.config_of("mamba", {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 264})
    assert isinstance(build_causal_lm("mamba", config), transformers.MambaForCausalLM)
