"""transformers' Trainer with the state carried from batch to batch.

    documents -> TextLanes -> rows, lane by lane -> batches [lanes, time] -> model(..., past_key_values=state)

Row i of a batch continues row i of the batch before it: it is the next piece of lane i. `document_starts` say
where a new document begins, and the model drops the state there. So the state is the only thing that a
Trainer lacks, and `MinRNNTrainer` adds it: it hands the state on, detached, and keeps it with checkpoints.
With gradient accumulation, each of a step's batches is the next piece of the same lanes.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, default_data_collator
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, has_length

from .cache import MinRNNCache

NEEDED = ("input_ids", "shift_labels", "document_starts")  # in every batch


class TextLanes(IterableDataset):
    """Documents cut into rows for `MinRNNTrainer`: row n is a piece of lane n mod `lanes`.

    A lane that has read its document goes on with the next one of `documents`, from the first again after the
    last. So the rows have no end, and a Trainer needs `max_steps`.

    Args:
        documents: token ids of each document, <bos> and <eos> included; iterated once for each pass.
        lanes: rows of a global batch: per_device_train_batch_size times the number of processes.
        time: tokens of a row.
        num_batches: pieces of each lane, for an evaluation; None for no end.

    Raises:
        ValueError: on iteration, documents without any token to predict.
    """

    def __init__(
        self, documents: Iterable[Iterable[int]], lanes: int, time: int, num_batches: int | None = None
    ) -> None:
        if lanes < 1 or time < 1:
            raise ValueError(f"TextLanes needs at least 1 lane and 1 token, not {lanes} and {time}.")
        self.documents, self.lanes, self.time, self.num_batches = documents, lanes, time, num_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """input_ids and shift_labels int64 [time], document_starts bool [time]."""
        documents = self._documents()
        nothing = torch.zeros(3, 0, dtype=torch.long)
        rest = [nothing] * self.lanes  # of each lane's documents: inputs, targets, starts
        index = 0
        while self.num_batches is None or index < self.num_batches * self.lanes:
            lane = index % self.lanes
            while rest[lane].shape[1] < self.time:
                rest[lane] = torch.cat([rest[lane], next(documents)], dim=1)
            row, rest[lane] = rest[lane][:, : self.time], rest[lane][:, self.time :]
            yield {"input_ids": row[0], "shift_labels": row[1], "document_starts": row[2].bool()}
            index += 1

    def _documents(self) -> Iterator[Tensor]:
        """Inputs, targets and starts of each document, int64 [3, its tokens - 1], without end."""
        while True:
            num_read = 0
            for document in self.documents:
                tokens = torch.tensor(list(document), dtype=torch.long)
                if len(tokens) > 1:
                    num_read += 1
                    starts = torch.zeros(len(tokens) - 1, dtype=torch.long)
                    starts[0] = 1
                    yield torch.stack([tokens[:-1], tokens[1:], starts])
            if not num_read:
                raise ValueError("TextLanes needs a document of at least 2 tokens.")


class MinRNNTrainer(Trainer):
    """A Trainer for `MinRNNForCausalLM` and `TorchRNNForCausalLM` that carries the state over a stream.

    Batches hold `input_ids`, `shift_labels` (the next tokens, chosen before the text was cut) and
    `document_starts`, as `TextLanes` makes them. The state is dropped where an epoch of a dataset with an end
    begins. An evaluation begins with no state and carries its own. Arguments are those of Trainer.

    Raises:
        ValueError: all arguments that would break the order of rows or the state, in one message; later, a
            batch without what is needed, or a checkpoint without the state of this layout.
    """

    def __init__(
        self, model: Any = None, args: Any = None, data_collator: Any = None, *others: Any, **kwargs: Any
    ) -> None:
        # with a processing_class, Trainer's own default would be a collator that pads
        super().__init__(model, args, data_collator or default_data_collator, *others, **kwargs)
        if errors := self._errors():
            raise ValueError("MinRNNTrainer: " + "; ".join(errors))
        self.data_collator = partial(with_labels, self.data_collator)  # workers may have to pickle it
        self.carried: MinRNNCache | None = None
        """The state after the last batch of the training."""
        self._carried_in_evaluation: MinRNNCache | None = None
        self._goes_on = False  # the next epoch is one that a checkpoint was saved in
        self.add_callback(_StateCallback(self))

    def _errors(self) -> list[str]:
        """What breaks the order of rows, or the state."""
        args, dataset = self.args, self.train_dataset
        model: Any = self.model
        accelerator: Any = args.accelerator_config  # made from a dict or a file by TrainingArguments
        has_end = dataset is None or has_length(dataset)
        is_iterable = isinstance(dataset, IterableDataset)
        rows = args.per_device_train_batch_size * args.world_size
        base = getattr(model, "get_base_model", lambda: model)()
        takes_starts = "document_starts" in inspect.signature(base.forward).parameters
        wrong = {
            f"{type(base).__name__} has no state to carry: use Trainer": not takes_starts,
            "several GPUs in one process would divide the state: start one process for each": args.n_gpu > 1,
            "auto_find_batch_size changes the rows that the state belongs to: choose a batch size": (
                args.auto_find_batch_size
            ),
            "ignore_data_skip resumes at other rows than the state's: leave it out": args.ignore_data_skip,
            "split_batches divides rows in another way: leave it out": accelerator.split_batches,
            f"train_sampling_strategy {args.train_sampling_strategy!r} would mix the rows: "
            "set it to 'sequential'": (
                dataset is not None and has_end and args.train_sampling_strategy != "sequential"
            ),
            "dataloader_num_workers above 1 would repeat the rows of an IterableDataset: use 0 or 1": (
                is_iterable and args.dataloader_num_workers > 1
            ),
            "label smoothing needs labels that are not yet shifted: leave label_smoothing_factor out": (
                args.label_smoothing_factor != 0
            ),
            "compute_loss_func would not get the state: leave it out": self.compute_loss_func is not None,
        }
        errors = [message for message, is_wrong in wrong.items() if is_wrong]
        return errors + self._lane_errors(dataset, rows, "a global batch")

    @staticmethod
    def _lane_errors(dataset: Any, rows: int, batch: str) -> list[str]:
        if not isinstance(dataset, TextLanes) or dataset.lanes == rows:
            return []
        return [f"TextLanes has {dataset.lanes} lanes, but {batch} has {rows} rows: make them equal"]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, from no state or from that of the checkpoint."""
        path = resume_from_checkpoint
        if path is True:
            path = self.args.output_dir and get_last_checkpoint(self.args.output_dir)
        self.carried = self._load_state(Path(path)) if path else None
        self._goes_on = bool(path)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, with the state before it; keeps the state after it."""
        if missing := [name for name in NEEDED if inputs.get(name) is None]:
            raise ValueError(
                f"MinRNNTrainer needs {', '.join(missing)} in every batch; minrnn.models.trainer.TextLanes "
                "makes such rows."
            )
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        state = self.carried if model.training else self._carried_in_evaluation
        inputs |= {"past_key_values": state, "use_cache": True, "skip_logits": not return_outputs}
        result: Any = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        loss, outputs = result
        state = outputs["past_key_values"].detach_()
        if model.training:
            self.carried = state
        else:
            self._carried_in_evaluation = state
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; the rows of the first batch begin with no state."""
        rows = self.args.per_device_eval_batch_size * self.args.world_size
        if errors := self._lane_errors(dataloader.dataset, rows, "a global batch of an evaluation"):
            raise ValueError(f"MinRNNTrainer: {errors[0]}")
        self._carried_in_evaluation = None
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _layout(self) -> dict[str, str]:
        """What the state of a process, and the batches that a resume skips, depend on."""
        return {
            "processes": str(self.args.world_size),
            "per_device_train_batch_size": str(self.args.per_device_train_batch_size),
            "gradient_accumulation_steps": str(self.args.gradient_accumulation_steps),
        }

    def _state_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"minrnn_state_{self.args.process_index}.safetensors"

    def save_state_of_lanes(self, checkpoint: Path) -> None:
        """Write this process's state into a checkpoint."""
        if self.carried is not None:
            checkpoint.mkdir(parents=True, exist_ok=True)  # on each node
            save_file(self.carried.state_dict(), self._state_file(checkpoint), metadata=self._layout())

    def _load_state(self, checkpoint: Path) -> MinRNNCache:
        file = self._state_file(checkpoint)
        if not file.is_file():
            raise ValueError(
                f"{checkpoint} holds no state of process {self.args.process_index} ({file.name}), so "
                "training cannot go on from it as if it had not stopped: resume from another checkpoint."
            )
        with safe_open(file, "pt") as stored:
            saved, names = stored.metadata(), list(stored.keys())
            tensors = {name: stored.get_tensor(name) for name in names}
        for name, value in self._layout().items():
            if saved[name] != value:
                raise ValueError(
                    f"{checkpoint} was saved with {name} = {saved[name]}, not {value}: set it so."
                )
        num_layers = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
        return MinRNNCache(num_layers).load_state_dict(tensors, self.args.device)


class _StateCallback(TrainerCallback):
    """Saves the state with checkpoints, and drops it where an epoch begins."""

    def __init__(self, trainer: MinRNNTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_state_of_lanes(
            Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loader, goes_on = kwargs["train_dataloader"], self.trainer._goes_on
        self.trainer._goes_on = False
        if goes_on and has_length(loader):  # unless the checkpoint is of the end of an epoch
            goes_on = state.global_step % math.ceil(len(loader) / args.gradient_accumulation_steps) != 0
        if not goes_on:
            self.trainer.carried = None


def with_labels(collate: Callable[[Any], dict[str, Any]], rows: Any) -> dict[str, Any]:
    """A batch in which Trainer finds the targets that it counts: those of `shift_labels`."""
    batch = collate(rows)
    return {**batch, "labels": batch["shift_labels"]} if "shift_labels" in batch else batch


__all__ = ["MinRNNTrainer", "TextLanes"]
