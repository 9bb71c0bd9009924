"""`minrnn eval` of models of transformers: requests are read whole, and what they cannot do is recorded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import config as datasets_config
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_families import FIELDS, tiny_model
from tokenizers_of_each_kind import KINDS
from transformers import PreTrainedModel

from minrnn.common.errors import UserError
from minrnn.data import byte_tokenizer
from minrnn.evals.harness.command import main
from minrnn.evals.harness.model import MinRNNLM
from minrnn.launch.generate import main as generate
from minrnn.pipeline.families.build import build_causal_lm
from minrnn.pipeline.families.limits import NO_DOCUMENTS, NO_STATE
from minrnn.pipeline.families.registry import config_of
from minrnn.pipeline.loading import family_limits, read_weights

TOKENIZER = byte_tokenizer()
TASKS = Path(__file__).parent / "lm_eval_tasks"
NAMES = ("llama", "mamba2", "recurrent_gemma")
MODELS = {name: tiny_model(name) for name in NAMES}
TEXTS = st.text("ab \ncé", max_size=12)


def requests(kind: Any, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


def score(model: PreTrainedModel, tokens: list[int], num_scored: int) -> tuple[float, bool]:
    """Log-likelihood of the last tokens of a text, read alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens[:-1]]), use_cache=False).logits[0, -num_scored:]
    targets = torch.tensor(tokens[-num_scored:])
    total = logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
    return total, bool((logits.argmax(-1) == targets).all())


@settings(max_examples=12)
@given(
    name=st.sampled_from(NAMES),
    pairs=st.lists(st.tuples(TEXTS, TEXTS.filter(bool)), min_size=1, max_size=5),
    size=st.integers(1, 4),
)
def test_log_likelihoods_are_those_of_each_text_alone(name: str, pairs: list[tuple[str, str]], size: int):
    model = MODELS[name]
    lm = MinRNNLM(model, TOKENIZER, batch_size=size)
    values = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (value, is_greedy) in zip(pairs, values, strict=True):
        num_scored = len((context + continuation).encode()) - len(context.rstrip().encode())
        tokens = [TOKENIZER.bos_token_id, *(context + continuation).encode()]
        expected, expected_greedy = score(model, tokens, num_scored)
        assert value == pytest.approx(expected, rel=1e-4)
        assert is_greedy == expected_greedy


def test_llama_scores_and_writes_as_with_lm_evals_own_class():
    model, factory = MODELS["llama"], HFLM
    hf: Any = factory(pretrained=model, tokenizer=TOKENIZER, batch_size=2)  # pyright: ignore[reportCallIssue, reportArgumentType]
    lm = MinRNNLM(model, TOKENIZER, batch_size=2)
    pairs = [("", "It begins"), ("A state", " goes on"), ("A state", " ends"), ("x", "y")]
    values, expected = (
        each.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True) for each in (lm, hf)
    )
    for (value, is_greedy), (hf_value, hf_greedy) in zip(values, expected, strict=True):
        assert value == pytest.approx(hf_value, rel=1e-5)
        assert is_greedy == hf_greedy
    options = {"until": ["\n"], "max_gen_toks": 7, "do_sample": False}
    contexts = [(text, options) for text in ("A state", "x = ", "another", "ab")]
    assert lm.generate_until(requests("generate_until", *contexts), disable_tqdm=True) == hf.generate_until(
        requests("generate_until", *contexts), disable_tqdm=True
    )


def without_bos() -> Any:
    """Of gpt2's kind with <s> for the end and nothing for the beginning, as Qwen's."""
    tokenizer = KINDS["gpt2"]()
    tokenizer.bos_token = None
    return tokenizer


HUB: dict[str, Any] = {"gpt2": KINDS["gpt2"](), "llama": KINDS["llama"](), "no bos": without_bos()}
HUB_MODEL = build_causal_lm("llama", config_of("llama", {**FIELDS["llama"], "vocab_size": 400})).eval()
PIECES = st.lists(st.sampled_from(["the cat", " sat", "\n", " ", "x", "<s>", "<|endoftext|>"]), max_size=4)


@pytest.mark.parametrize("kind", HUB)
@settings(max_examples=10)
@given(context=PIECES.map("".join), continuation=PIECES.map("".join).filter(bool))
def test_models_of_the_hub_read_what_lm_evals_own_class_reads(kind: str, context: str, continuation: str):
    tokenizer, factory = HUB[kind], HFLM
    hf: Any = factory(pretrained=HUB_MODEL, tokenizer=tokenizer, batch_size=1)  # pyright: ignore[reportCallIssue, reportArgumentType]
    lm = MinRNNLM(HUB_MODEL, tokenizer, batch_size=1)
    assert lm.prefix_token_id == hf.prefix_token_id
    assert lm.tok_encode(context) == hf.tok_encode(context)
    assume(context.strip())  # hf's own asserts that there is a context
    pair = requests("loglikelihood", (context, continuation))
    ((value, _),), ((expected, _),) = (each.loglikelihood(pair, disable_tqdm=True) for each in (lm, hf))
    assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_context_without_a_token_begins_as_an_empty_one():
    """A space moves to the continuation, and this tokenizer writes no token of its own."""
    lm = MinRNNLM(HUB_MODEL, HUB["no bos"])
    ((value, _),) = lm.loglikelihood(requests("loglikelihood", (" ", "x")), disable_tqdm=True)
    tokens = [lm.eot_token_id, *HUB["no bos"].encode(" x")]
    assert value == pytest.approx(score(HUB_MODEL, tokens, len(tokens) - 1)[0], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_texts_do_not_depend_on_the_batch(name: str):
    lm = MinRNNLM(MODELS[name], TOKENIZER, batch_size=3)
    options = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    texts = ("ab", "cd", "a longer text", "b")
    together = lm.generate_until(
        requests("generate_until", *((text, options) for text in texts)), disable_tqdm=True
    )
    alone = [
        lm.generate_until(requests("generate_until", (text, options)), disable_tqdm=True)[0] for text in texts
    ]
    assert together == alone


def test_a_document_is_read_in_windows_of_the_model_s_positions():
    model = tiny_model("llama", max_position_embeddings=16)
    lm = MinRNNLM(model, TOKENIZER)
    assert lm.rolling == "windows of 16 tokens, state reset"
    text = "a text of more than sixteen bytes, in windows"
    (value,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    tokens, total = [TOKENIZER.bos_token_id, *text.encode()], 0.0
    for first in range(0, len(text) - 15, 16):
        total += score(model, tokens[first : first + 17], 16)[0]
    total += score(model, tokens[-17:], len(text) % 16)[0]  # lm-eval lets the last window overlap
    assert value == pytest.approx(total, rel=1e-5)
    lm.rolling_window = 17
    with pytest.raises(ValueError, match="a window of 17 tokens, but the model has 16 positions"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    with pytest.raises(ValueError, match="longer than the 16 positions of this llama"):
        lm.loglikelihood(requests("loglikelihood", ("a" * 20, "b")), disable_tqdm=True)
    assert MinRNNLM(MODELS["mamba2"], TOKENIZER).rolling == "the whole document at once"


def test_the_command_records_what_a_model_cannot_do(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(TASKS)  # the tasks name their files relative to their own folder
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    MODELS["mamba2"].save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    out = tmp_path / "results.json"
    options = ["--include-path", str(TASKS), "--bootstrap-iters", "0", "--device", "cpu", "--limit", "2"]
    main([str(tmp_path / "model"), "--tasks", "tiny_choice,tiny_document", *options, "--out", str(out)])
    config = json.loads(out.read_text())["config"]
    assert config["limits"] == [NO_STATE, NO_DOCUMENTS]
    capsys.readouterr()


def test_more_tokens_than_positions_are_refused_before_the_prompt_is_printed(tmp_path: Path, capsys):
    tiny_model("llama", max_position_embeddings=16).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the text has 17 tokens, but this llama has 16 positions"):
        generate([str(tmp_path), "--prompt", "abcd", "--max-new-tokens", "12", "--device", "cpu"])
    assert "abcd" not in capsys.readouterr().out


def test_weights_that_do_not_fit_are_refused(tmp_path: Path):
    MODELS["llama"].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"MODEL: the weights of .* do not fit its config.json \(missing"):
        read_weights(str(tmp_path))


def test_a_model_with_a_state_has_no_limits():
    assert family_limits(tiny_model("lstm")) == []
    assert family_limits(MODELS["llama"]) == [NO_STATE]
