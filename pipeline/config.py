"""What a recipe may say. Each section is one class, each field says what it does; `minrnn train --help` prints this file.

A recipe is YAML with these sections; `--section.field value` on the command line wins over it. `read_recipe` (recipe.py) puts both together and
reports every mistake at once.
"""

import ast
import inspect
import os
import textwrap
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from ..common.errors import UserError
from ..data import Task, build_task, is_synthetic
from ..models import MinRNNConfig
from ..models.configuration_minrnn import PRESETS


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, and docstrings are descriptions."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _without_nul(cls, value: Any) -> Any:
        """No name of a file, folder, dataset or server holds a NUL; the system's functions raise where one does."""
        if isinstance(value, str) and "\0" in value:
            raise PydanticCustomError("nul_character", "input should have no NUL character")
        return value

    def errors(self) -> dict[str, str]:
        """What is wrong with values that have the right types, by field."""
        return {}


def expand_home(path: str | None) -> str | None:
    """A path with the home folder in place of `~`: what is opened, compared and written down.

    Corpora and MLflow's database keep theirs, which are expanded where they are opened: config.yaml has always had them as they are written.
    """
    return None if path is None else os.path.expanduser(path)


class RunSection(Section):
    """The run itself."""

    dir: str = Field(default="runs/default", min_length=1)
    """The run's own folder: config.yaml, metrics.jsonl, loss.png, samples.txt, checkpoints/, model/."""
    seed: int = Field(default=0, ge=0)
    """Of the weights, the data order and the dropout. The same seed gives the same run."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from the newest valid checkpoint in run.dir, if any. never: refuse a folder that has one. must: one without."""
    change: list[str] = []
    """Settings that are meant to differ from those the run was started with, e.g. [optim.lr]; any other difference stops a resume."""
    _expand = field_validator("dir")(expand_home)


def docstring_of(cls: type) -> str:
    """A class's docstring without indentation, which Python 3.13 drops and others keep.

    It is read from the source, as pydantic reads those of fields: Python leaves docstrings out under PYTHONOPTIMIZE=2.
    """
    definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(definition, ast.ClassDef)
    return ast.get_docstring(definition) or ""


class ModelSection(Section):
    """The model: the fields of MinRNNConfig. The vocabulary and its special tokens come from the tokenizer."""

    preset: Literal["default", "paper"] = "default"
    """Where the fields below start from: `paper` is the block as published, `default` ours."""
    init_from: str | None = None
    """An export (a folder or a hub id) of the same shape, whose weights the run starts from."""
    _expand = field_validator("init_from")(expand_home)

    # In the order, and with the descriptions, of MinRNNConfig (tests/pipeline/test_recipe.py).
    hidden_size: int = MinRNNConfig.hidden_size
    """Width of the residual stream."""
    num_hidden_layers: int = MinRNNConfig.num_hidden_layers
    """Number of blocks."""
    cell: str = MinRNNConfig.cell
    """Name of the recurrent cell: `"mingru"` or `"minlstm"` with decays in (0, 1), `"mingru_signed"`
    or `"minlstm_signed"` in (-1, 1)."""
    expansion_factor: int | float = MinRNNConfig.expansion_factor
    """Recurrent width / hidden_size (the paper's alpha)."""
    candidate_activation: str = MinRNNConfig.candidate_activation
    """Activation of the candidate: `"g"` (x + 0.5 for x >= 0, else sigmoid), `"none"`, `"tanh"` or
    `"silu"`."""
    output_gate: bool = MinRNNConfig.output_gate
    """Multiply the cell's output by silu of one more projection."""
    conv_kernel: int = MinRNNConfig.conv_kernel
    """Width of the causal depthwise convolution before the cell; 0 or 1 for none."""
    intermediate_size: int = MinRNNConfig.intermediate_size
    """Width of the MLP; 0 for none."""
    hidden_act: str = MinRNNConfig.hidden_act
    """Activation of the MLP."""
    gated_mlp: bool = MinRNNConfig.gated_mlp
    """MLP as down(act(gate) * up) (as in Llama) instead of down(act(up))."""
    memory_length: int | float = MinRNNConfig.memory_length
    """Before training, the channels' memory lengths 1 / (1 - a) are spread log-uniformly from 2 to
    this many tokens; 2 starts every gate half open."""
    initializer_range: int | float | None = MinRNNConfig.initializer_range
    """Standard deviation of the weights; `None` for fan_in ** -0.5."""
    dropout: int | float = MinRNNConfig.dropout
    """Probability of dropping an element of a block's output, in training."""
    rms_norm_eps: int | float = MinRNNConfig.rms_norm_eps
    """Epsilon of the RMS norms."""
    tie_word_embeddings: bool = MinRNNConfig.tie_word_embeddings
    """Use the embedding as output projection."""
    max_position_embeddings: int = MinRNNConfig.max_position_embeddings
    """The longest input that harnesses should send. The recurrence itself has no limit; harnesses try
    out batches of this length and cut texts to it."""
    scan_backend: str | None = MinRNNConfig.scan_backend
    """Backend of the scan (see `scan.linear_scan`); `None` for the fastest on the device."""
    use_cache: bool = MinRNNConfig.use_cache
    """Return the state, so that the sequence can go on."""

    def user_fields(self) -> dict[str, Any]:
        """The fields of MinRNNConfig that the user set."""
        return {
            name: value
            for name, value in self.model_dump(exclude={"preset", "init_from"}).items()
            if name in self.model_fields_set
        }

    def errors(self) -> dict[str, str]:
        config = MinRNNConfig()
        for name, value in {**PRESETS[self.preset], **self.user_fields()}.items():
            setattr(config, name, value)
        return config.errors()


class DataSection(Section):
    """What is read, and in which order."""

    corpus: str = Field(default="python-stdlib", min_length=1)
    """python-stdlib, a file, folder or glob (parquet; JSON lines, csv, tsv or text, plain, .gz or .zst), a hub dataset, or a task:
    synthetic/NAME."""
    task: dict[str, Any] = {}
    """Options of a synthetic task (docs/synthetic.md), e.g. {length: 64, num_tokens: 4}. It has no use for the settings of text, below."""
    subset: str | None = None
    """Configuration of a hub dataset, e.g. sample-10BT."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset; pin a commit for a run that can be repeated."""
    text_field: str = "text"
    """Column or key that holds a document's text."""
    skip_broken: bool = False
    """Leave out what is broken, and count it, instead of stopping: documents that are not UTF-8, not JSON, or without text; row groups of
    parquet files that are damaged; and what a cut or damaged file holds behind the damage."""
    join: str | None = Field(default=None, min_length=1)
    """Join documents into long ones. folder: the files of a folder; package: all files below a folder of the corpus's root; in both, files
    directly in the root stay as they are. Rows: the name of a column, e.g. book_id; consecutive rows with the same value are one document.
    A window of the shuffle holds data.shuffle_window documents, so lower that where they are very long."""
    order: Literal["documents", "windows"] = "documents"
    """documents: every lane reads documents to their end. windows: random crops of the joined text, nothing carried."""
    tokenizer: str = Field(default="bytes", min_length=1)
    """bytes, or a tokenizer of the hub or a folder."""
    _expand = field_validator("tokenizer")(expand_home)
    trust_remote_code: bool = False
    """Run the code that a tokenizer brings along; read it before."""
    shuffle_window: int = Field(default=1024, ge=1)
    """Documents that are shuffled together; resuming reads at most this many again."""
    validation: str | None = None
    """A corpus of its own for validation. Otherwise python-stdlib's held-out modules, or `validation_fraction` of the corpus."""
    validation_split: str = "validation"
    """Split of a hub dataset in `validation`."""
    validation_fraction: float = Field(default=0.01, gt=0.0, lt=1.0)
    """Share of the documents (of the text's end, in order windows) that is held out."""
    validation_tokens: int | None = Field(default=500_000, ge=1)
    """Validate on whole documents until they have this many tokens; null for all."""
    workers: int = Field(default=1, ge=0)
    """Processes that read ahead; 0 reads in the training process."""

    def errors(self) -> dict[str, str]:
        if not is_synthetic(self.corpus):
            errors = {}
            if self.task:
                errors["task"] = f"is for synthetic corpora (synthetic/TASK), not for {self.corpus}"
            if self.join is not None and self.order == "windows":
                errors["join"] = (
                    "is for data.order documents; windows reads the whole corpus as one text, so leave it out"
                )
            return errors
        errors = {
            name: f"is for text; {self.corpus} makes its own examples, so leave it out"
            for name, field in type(self).model_fields.items()
            if name not in ("corpus", "task", "workers") and getattr(self, name) != field.default
        }
        try:
            build_task(self.corpus, self.task)
        except UserError as error:
            errors |= {key.removeprefix("data."): message for key, message in error.errors}
        return errors


class BatchSection(Section):
    """The global batch: readers x lanes x chunk tokens, whatever the number of processes."""

    readers: int = Field(default=1, ge=1)
    """Corpus cursors. Processes share them evenly and accumulate over theirs: times parallel.context it is the largest number of processes."""
    lanes: int = Field(default=16, ge=1)
    """Rows of a reader's chunk: streams of documents side by side."""
    chunk: int = Field(default=256, ge=1)
    """Tokens of a lane that one step sees, and how far gradients reach."""
    carry_state: bool = True
    """Hand the state from one chunk to the next (reset at documents)."""

    @property
    def tokens_per_step(self) -> int:
        """Of all processes."""
        return self.readers * self.lanes * self.chunk


class OptimSection(Section):
    """AdamW; no decay on gates, norms, biases, convolutions and embeddings."""

    lr: float = Field(default=4e-3, gt=0)
    """Peak learning rate."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """After the warmup: wsd holds, then falls linearly over the last `decay_fraction` of the steps; cosine falls all the way."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps of linear warmup."""
    decay_fraction: float = Field(default=0.3, ge=0.0, le=1.0)
    """Share of the steps in which wsd falls."""
    final_lr_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """What the schedule falls to, as a fraction of the peak."""
    schedule_steps: int | None = Field(default=None, ge=1)
    """Steps of the schedule; null for train.steps as the run begins. A run that goes on keeps them, also where train.steps is raised: further
    steps have the last one's rate. `run.change: [optim.schedule_steps]` draws the schedule anew, over train.steps where this is null."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled decay of the output and MLP projections."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the second moment."""
    clip: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient; null for no clipping."""


class TrainSection(Section):
    """The loop."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps in all. A finished run goes on when this is raised, at the learning rate that it ended with (optim.schedule_steps)."""
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"
    """Where to compute. auto: the accelerator if there is one, else the CPU. Of several, each process takes one."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """auto: the faster of fp32 and bf16, as their matrix products measure at the start; a resumed run keeps what it
    began with. bf16 is autocast over fp32 weights; the recurrent state is fp32 all the same."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What is computed again in the backward pass. none: nothing; selective: all but matrix products and scans; full: whole blocks."""
    compile: bool = False
    """torch.compile each block: for GPUs (on a CPU the kernels are fused already). The first step takes longer, and dropout draws anew."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between validations; null for one at the end."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints, beside those of `save_minutes`; null for none of its own."""
    save_minutes: float | None = Field(default=15.0, gt=0)
    """Minutes after which a checkpoint is due, beside those of `save_every`; null for none. One is written at the end, and on signals."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    save_in_background: bool = True
    """Write checkpoints beside the training, from copies in main memory (12 bytes a parameter); false waits for the disk."""
    skip_spikes: float | None = Field(default=None, gt=1.0)
    """Leave out a batch whose loss is not finite, or this many times the median of the last 100; null stops at one that is not finite."""
    max_skips: int = Field(default=10, ge=1)
    """Batches in a row that may be left out before training stops."""
    peer_timeout: float = Field(default=1800.0, gt=0)
    """Seconds in which nobody moves until the process that hangs is named and all leave: more than the longest step, save or export takes."""
    prompts: list[str] = [""]
    """What the samples in samples.txt begin with."""
    sample_tokens: int = Field(default=200, ge=0)
    """Tokens per sample; 0 for no samples."""


class ParallelSection(Section):
    """How processes share the work, beyond their shares of the readers."""

    context: int = Field(default=1, ge=1)
    """Processes to a sequence: each has its part of every chunk's time, and hands its state to the next. They are neighbours in rank."""


class TrackingSection(Section):
    """MLflow mirrors metrics.jsonl: training never waits for it and never stops for it; what it misses is sent later, by the next start too."""

    uri: str | None = Field(default="auto", min_length=1)
    """Tracking server or database; null for none. A relative database stays where the run began. auto: what the environment says in
    MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db."""
    experiment: str = "minrnn"
    """MLflow experiment."""

    def place(self) -> str | None:
        """The URI behind `uri`."""
        return (
            (os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
            if self.uri == "auto"
            else self.uri
        )


@dataclass
class Recipe:
    """A whole run."""

    run: RunSection
    model: ModelSection
    data: DataSection
    batch: BatchSection
    optim: OptimSection
    train: TrainSection
    parallel: ParallelSection
    tracking: TrackingSection

    def synthetic_task(self) -> Task | None:
        """The task that is drawn, where the corpus is one.

        Raises:
            UserError: a chunk does not hold its longest sequence.
        """
        if not is_synthetic(self.data.corpus):
            return None
        task = build_task(self.data.corpus, self.data.task)
        if self.batch.chunk < task.max_train_length:
            told = f"{self.batch.chunk} does not hold the longest sequence of {self.data.corpus}: set it to {task.max_train_length} or more"
            raise UserError("batch.chunk", told)
        return task

    def model_fields_resolved(self) -> dict[str, Any]:
        """Every field of MinRNNConfig that a recipe can set: the user's, then the preset's, then the default."""
        values = self.model.model_dump(exclude={"preset", "init_from"})
        return {**values, **PRESETS[self.model.preset], **self.model.user_fields()}


SECTIONS: dict[str, type[Section]] = {
    "run": RunSection,
    "model": ModelSection,
    "data": DataSection,
    "batch": BatchSection,
    "optim": OptimSection,
    "train": TrainSection,
    "parallel": ParallelSection,
    "tracking": TrackingSection,
}
