"""Other uses of a model by transformers: save, load, pipelines, Trainer."""

from typing import Any

import pytest
import torch
from helpers import VOCAB, logits_of, new_model, random_ids
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from minrnn.data import byte_tokenizer
from minrnn.models import MinRNNForCausalLM, MinRNNModel


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", ["mingru", "minlstm"])
def test_round_trip_is_exact(tmp_path, tied, dtype, cell):
    model, ids = new_model(dtype=dtype, cell=cell, tie_word_embeddings=tied), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    for factory in (AutoModelForCausalLM, MinRNNForCausalLM):
        loaded = factory.from_pretrained(tmp_path)
        assert isinstance(loaded, MinRNNForCausalLM)
        assert loaded.dtype == dtype
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(
            torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items()
        )
        assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    body = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, MinRNNModel)
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_initialisation_follows_the_seed_and_loading_draws_nothing(tmp_path):
    first, again = new_model(seed=3), new_model(seed=3)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())
    first.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = MinRNNForCausalLM.from_pretrained(tmp_path).train()
    loaded.init_weights()
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_vocabulary_can_grow():
    model, ids = new_model(), random_ids(2, 5)
    before = logits_of(model, ids)
    model.resize_token_embeddings(VOCAB + 8)
    after = logits_of(model, ids)
    assert after.shape[-1] == model.config.vocab_size == VOCAB + 8
    assert torch.equal(after[..., :VOCAB], before)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_resized_head_is_not_drawn_again():
    model, ids = new_model(tie_word_embeddings=False), random_ids(2, 5)
    before = logits_of(model, ids)
    model.resize_token_embeddings(VOCAB + 8)
    model.post_init()
    assert torch.equal(logits_of(model, ids)[..., :VOCAB], before)


def test_label_smoothing_trains_on_the_next_token(tmp_path):
    """Trainer's loss from the logits is that of the next token, whichever package holds the class."""
    model, ids = new_model(), random_ids(4, 12)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True
    )
    smoothed: Any = Trainer(model=model, args=arguments).compute_loss(
        model, {"input_ids": ids, "labels": ids}, num_items_in_batch=4 * 11
    )
    expected = torch.nn.functional.cross_entropy(
        logits_of(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1
    )
    assert torch.allclose(smoothed, expected, atol=1e-5)


def test_text_generation_pipeline():
    tokenizer = byte_tokenizer()
    model = new_model(vocab_size=264, pad_token_id=tokenizer.pad_token_id)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["def main", "x", "Grüße"]
    options = {"max_new_tokens": 6, "do_sample": False, "return_tensors": True}
    alone = [writer(text, **options)[0]["generated_token_ids"] for text in texts]
    batched = [output[0]["generated_token_ids"] for output in writer(texts, batch_size=3, **options)]
    for text, single, together in zip(texts, alone, batched, strict=True):
        prompt = tokenizer(text)["input_ids"]
        assert list(single)[: len(prompt)] == prompt
        assert len(single) == len(prompt) + 6
        assert [token for token in together if token != tokenizer.pad_token_id] == list(single)
    assert writer("def main", max_new_tokens=6)[0]["generated_text"].startswith("def main")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_trains(tmp_path, accumulate):
    model = new_model(cell="minlstm")
    ids = random_ids(8, 12)
    before = model.state_dict()["model.embed_tokens.weight"].clone()
    rows: Any = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        data_seed=1,
    )
    torch.use_deterministic_algorithms(False)  # Trainer sets seeds and flags itself
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses), losses  # ln 40 = 3.7
    assert not torch.equal(model.state_dict()["model.embed_tokens.weight"], before)
