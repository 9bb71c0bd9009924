"""Adapters of PEFT on any part of the model: loss, gradient, generation, and what is merged."""

import pytest
import torch
from helpers import assert_close, generate, logits_of, new_model, random_ids

peft = pytest.importorskip("peft")

TARGETS = {
    "head": {"target_modules": ["lm_head"]},
    "head, whole": {"target_modules": ["in_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "all projections": {"target_modules": "all-linear"},
    "projection by parameter": {"target_modules": [], "target_parameters": ["in_proj.weight"]},
    "gate bias": {"target_modules": ["out_proj"], "target_parameters": ["mixer.gate_bias"]},
    "convolution": {"target_modules": [], "target_parameters": ["mixer.conv_weight"]},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "fields", [{"cell": "mingru"}, {"cell": "minlstm"}, {"logit_softcap": 0.5, "num_tokens": 39}]
)
def test_adapters(target, fields):
    base, ids = new_model(dtype=torch.float64, tie_word_embeddings=False, **fields), random_ids(2, 9) % 39
    plain = logits_of(base, ids)
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **TARGETS[target])
    model = peft.get_peft_model(base, options)
    whole, without_logits = (
        model(input_ids=ids, labels=ids),
        model(input_ids=ids, labels=ids, skip_logits=True),
    )
    assert whole.logits is not None
    assert without_logits.logits is None
    assert_close(without_logits.loss, whole.loss, atol=1e-12)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for actual, expected in zip(
        torch.autograd.grad(without_logits.loss, trained),
        torch.autograd.grad(whole.loss, trained),
        strict=True,
    ):
        assert_close(actual, expected, atol=1e-12)
    assert not torch.allclose(logits_of(base, ids), plain), "the adapter does nothing: a weak test"
    output = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    adapted = logits_of(model, ids)
    merged = model.merge_and_unload()
    assert torch.equal(generate(merged, ids, 5), output)
    assert_close(logits_of(merged, ids), adapted, atol=1e-9)
