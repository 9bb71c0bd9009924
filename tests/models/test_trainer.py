"""transformers' Trainer with a carried state: the order of rows, resume, evaluation, and what is refused."""

import copy
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, new_model, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from minrnn.models import TorchRNNConfig, TorchRNNForCausalLM
from minrnn.models.trainer import MinRNNTrainer, TextLanes

LANES, TIME = 2, 8
TEXTS = [random_ids(1, length, seed=length)[0].tolist() for length in (30, 3, 2, 17, 5, 41)]


@pytest.fixture(autouse=True)
def flags_of_a_trainer(poisoned_memory):
    """Trainer sets seeds and flags itself."""
    torch.use_deterministic_algorithms(False)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class Losses(TrainerCallback):
    """The logged losses, by step."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.by_step[state.global_step] = logs["loss"]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": LANES,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**defaults, **options})


def trainer_of(folder: Path, model: Any = None, dataset: Any = None, **options: Any) -> MinRNNTrainer:
    return MinRNNTrainer(
        model=new_model(dropout=0.1) if model is None else model,
        args=arguments(folder, **options),
        train_dataset=TextLanes(TEXTS, LANES, TIME) if dataset is None else dataset,
    )


def train(trainer: MinRNNTrainer, **options: Any) -> dict[int, float]:
    losses = Losses()
    trainer.add_callback(losses)
    trainer.train(**options)
    return losses.by_step


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(lambda x: max(x) > 1),
    lanes=st.integers(1, 4),
    time=st.integers(1, 9),
)
@settings(max_examples=40)
def test_lanes_hold_whole_documents(lengths, lanes, time):
    """Each lane reads documents from their first token to their last, and none is left out."""
    documents = [[100 * i + t for t in range(length)] for i, length in enumerate(lengths)]
    rows = list(itertools.islice(iter(TextLanes(documents, lanes, time)), lanes * 40))
    seen = set()
    for lane in range(lanes):
        inputs, targets, starts = (
            torch.cat([row[name] for row in rows[lane::lanes]])
            for name in ("input_ids", "shift_labels", "document_starts")
        )
        edges = [*starts.nonzero().flatten().tolist(), len(starts)]
        assert edges[0] == 0
        for low, high in itertools.pairwise(edges):
            tokens = [*inputs[low:high].tolist(), int(targets[high - 1])]
            document = documents[tokens[0] // 100]
            assert tokens == document[: len(tokens)]
            assert targets[low : high - 1].tolist() == tokens[1:-1]
            assert high == len(starts) or len(tokens) == len(document)
            seen.add(tokens[0] // 100)
    total = 40 * time * lanes
    if total >= 2 * sum(lengths) + lanes * 20:
        assert seen == {i for i, length in enumerate(lengths) if length > 1}


def test_an_evaluation_reads_a_part():
    assert len(list(TextLanes(TEXTS, 3, 4, num_batches=5))) == 15
    with pytest.raises(ValueError, match="a document of at least 2 tokens"):
        next(iter(TextLanes([[1]], 1, 1)))
    with pytest.raises(ValueError, match="at least 1 lane and 1 token, not 0 and 5"):
        TextLanes(TEXTS, 0, 5)


@pytest.mark.parametrize("cell", ["mingru", "lstm"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_losses_are_those_of_a_loop_that_carries_the_state(cell, accumulate, tmp_path):
    """fp64; with accumulation, a step reads `accumulate` pieces of each lane one after the other."""
    if cell == "lstm":
        config = TorchRNNConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, cell=cell)
        model: Any = TorchRNNForCausalLM(config).double()
    else:
        model = new_model(dtype=torch.float64)
    expected_model = copy.deepcopy(model).train()
    options = {"max_steps": 3, "gradient_accumulation_steps": accumulate, "weight_decay": 0.0}
    trainer = trainer_of(tmp_path, model, lr_scheduler_type="constant", **options)
    losses = train(trainer)
    optimizer = torch.optim.AdamW(expected_model.parameters(), 1e-2, weight_decay=0.0)
    rows = iter(TextLanes(TEXTS, LANES, TIME))
    state = None
    for step in range(1, 4):
        loss = torch.zeros((), dtype=torch.float64)
        for _ in range(accumulate):
            batch = list(itertools.islice(rows, LANES))
            inputs = {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
            num_scored = accumulate * LANES * TIME
            output = expected_model(
                **inputs, past_key_values=state, use_cache=True, num_items_in_batch=num_scored
            )
            state = output.past_key_values.detach_()
            output.loss.backward()
            loss += output.loss.detach()
        torch.nn.utils.clip_grad_norm_(expected_model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-6)
    carried = trainer.carried
    assert carried is not None
    assert state is not None
    for actual, expected in zip(carried.tensors(), state.tensors(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


class Ended(torch.utils.data.Dataset):
    """The rows of TextLanes with an end: two epochs of 8 batches."""

    def __init__(self) -> None:
        self.rows = list(TextLanes(TEXTS, LANES, TIME, num_batches=8))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


@pytest.mark.parametrize(
    ("dataset", "options", "step"),
    [
        (None, {}, 4),
        (None, {"gradient_accumulation_steps": 2}, 2),
        (Ended, {"train_sampling_strategy": "sequential", "max_steps": 12}, 4),
        (Ended, {"train_sampling_strategy": "sequential", "max_steps": 12}, 8),  # the end of an epoch
    ],
)
def test_a_resumed_training_equals_one_that_did_not_stop(dataset, options, step, tmp_path):
    """To the bit, dropout included."""
    options = {"save_strategy": "steps", "save_steps": step, **options}
    model = new_model(dropout=0.1)
    start = copy.deepcopy(model)
    make = dataset or (lambda: None)
    first = trainer_of(tmp_path, model, make(), **options)
    whole = train(first)
    second = trainer_of(tmp_path, start, make(), **options)
    resumed = train(second, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert list(resumed) == [number for number in whole if number > step]
    assert all(resumed[number] == whole[number] for number in resumed)
    for name, tensor in model.state_dict().items():
        assert torch.equal(start.state_dict()[name], tensor), name


def test_a_checkpoint_must_fit(tmp_path):
    model = new_model()
    train(trainer_of(tmp_path, model, max_steps=2, save_strategy="steps", save_steps=2))
    other = trainer_of(tmp_path, model, gradient_accumulation_steps=2, max_steps=4)
    with pytest.raises(ValueError, match="saved with gradient_accumulation_steps = 1, not 2: set it so"):
        other.train(resume_from_checkpoint=True)
    lost = tmp_path / "checkpoint-9"
    shutil.copytree(tmp_path / "checkpoint-2", lost)
    (lost / "minrnn_state_0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-9 holds no state of process 0 .* resume from another"):
        trainer_of(tmp_path, model).train(resume_from_checkpoint=True)


def test_an_evaluation_has_its_own_state(tmp_path):
    """Its loss is that of the lanes read in one piece, and training goes on as if there were none."""
    model = new_model()
    evaluated = TextLanes(TEXTS, 1, TIME, num_batches=6)
    plain = train(trainer_of(tmp_path, copy.deepcopy(model), max_steps=4))
    trainer = MinRNNTrainer(
        model=copy.deepcopy(model),
        args=arguments(
            tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=1
        ),
        train_dataset=TextLanes(TEXTS, LANES, TIME),
        eval_dataset=evaluated,
    )
    assert train(trainer) == plain
    row = {
        name: torch.cat([row[name] for row in evaluated]).unsqueeze(0)
        for name in ("input_ids", "shift_labels", "document_starts")
    }
    with torch.no_grad():
        trained: Any = trainer.model
        expected = trained.eval()(**row).loss.item()
    with pytest.raises(
        ValueError, match="TextLanes has 3 lanes, but a global batch of an evaluation has 1 rows"
    ):
        trainer.evaluate(TextLanes(TEXTS, 3, TIME, num_batches=2))
    for _ in range(2):
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_bf16_autocast(tmp_path):
    """The carried state stays in fp32."""
    trainer = trainer_of(tmp_path, bf16=True, max_steps=2)
    assert len(train(trainer)) == 2
    assert trainer.carried is not None
    assert all(
        layer.recurrent is not None and layer.recurrent.dtype == torch.float32
        for layer in trainer.carried.layers
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size changes the rows"),
        ({"ignore_data_skip": True}, "ignore_data_skip resumes at other rows"),
        ({"per_device_train_batch_size": 3}, "TextLanes has 2 lanes, but a global batch has 3 rows"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers above 1 would repeat the rows"),
        ({"label_smoothing_factor": 0.1}, "label smoothing needs labels that are not yet shifted"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches divides rows"),
    ],
)
def test_what_breaks_the_order_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=f"MinRNNTrainer: {message}"):
        trainer_of(tmp_path, **options)


def test_other_datasets_and_models_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="train_sampling_strategy 'random' would mix the rows: set it to"):
        trainer_of(tmp_path, dataset=Ended())
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no state to carry: use Trainer"):
        trainer_of(tmp_path, llama)
    with pytest.raises(ValueError, match=r": auto_.*; ignore_.*; TextLanes has 2 lanes"):
        trainer_of(tmp_path, auto_find_batch_size=True, ignore_data_skip=True, per_device_train_batch_size=1)


def test_arguments_may_be_positional_as_those_of_trainer(tmp_path):
    lanes = TextLanes(TEXTS, LANES, TIME)
    trainer = MinRNNTrainer(new_model(), arguments(tmp_path, max_steps=1), default_data_collator, lanes)
    assert list(train(trainer)) == [1]


def test_a_batch_says_where_documents_start(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in random_ids(4, TIME)]
    trainer = trainer_of(tmp_path, dataset=rows, train_sampling_strategy="sequential")
    with pytest.raises(ValueError, match="needs shift_labels, document_starts in every batch"):
        trainer.train()


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch):
    """docs/transformers.md, with a small model, few steps, and a stand-in for the tokenizer."""
    page = Path(__file__).parents[2] / "docs" / "transformers.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 20

    class Tokenizer:
        eos_token_id = 1

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [0, *text.encode()]}

        def __len__(self) -> int:
            return 256

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Tokenizer())
    monkeypatch.chdir(tmp_path)
    for old, new in (
        ("max_steps=100", "max_steps=2, use_cpu=True"),
        ("256", "8"),
        ("num_batches=10", "num_batches=2"),
    ):
        assert old in block
        block = block.replace(old, new)
    small = "MinRNNConfig(hidden_size=16, num_hidden_layers=1, "
    names: dict[str, Any] = {}
    exec(block.replace("MinRNNConfig(", small), names)
    assert names["trainer"].state.global_step == 2
    assert (tmp_path / "out" / "checkpoint-2" / "minrnn_state_0.safetensors").is_file()


SCRIPT = """
import json, sys
import torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trainer import TEXTS, TIME, Losses, new_model, trainer_of
from minrnn.models.trainer import TextLanes

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
trainer = trainer_of(folder, new_model(learn_h0=True), TextLanes(TEXTS, 4, TIME), **options)
losses = Losses()
trainer.add_callback(losses)
trainer.train(*sys.argv[3:])
if trainer.args.process_index == 0:
    (folder / "losses.json").write_text(json.dumps(losses.by_step))
"""


@pytest.mark.slow
def test_two_processes_share_the_lanes(tmp_path):
    """Their losses are those of one process with all rows, also after a resume."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def losses(name: str, processes: int, *arguments: str, **options: Any) -> dict[str, float]:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
        ]
        options = {**saving, "per_device_train_batch_size": 4 // processes, **options}
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        command += [str(script), str(folder), json.dumps(options), *arguments]
        subprocess.run(command, check=True, timeout=1200)
        return json.loads((folder / "losses.json").read_text())

    one, two = losses("one", 1), losses("two", 2)
    assert list(two) == ["1", "2", "3", "4"]
    assert two == pytest.approx(one, rel=1e-5)
    resumed = losses("two", 2, str(tmp_path / "two" / "checkpoint-2"))
    assert resumed == {step: two[step] for step in ("3", "4")}
