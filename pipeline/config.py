"""Every setting of a recipe. A section is a class, a field's docstring is the text of `minrnn train --help`.

A recipe is YAML with these sections. `--section.field value` on the command line overrides it. `read_recipe`
(recipe.py) combines both and reports all errors at once.
"""

import os
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ..common.errors import UserError
from ..data import LabelledTask, RetryPolicy, RowRules, Task, build_task, is_task
from ..models.configuration_minrnn import PRESETS
from .batch_settings import BatchSection
from .eval_section import EvalSection
from .families.fields import merged_fields
from .families.registry import OURS
from .model_section import NO_CONFIG_FIELDS, ModelSection
from .optim_section import OptimSection
from .push.settings import PushSection
from .section import Section, expand_home
from .source_settings import EXAMPLE, corpus_name, normalized_corpus, source_errors, with_source_commits
from .tracking_store import uri_problem


class RunSection(Section):
    """The run: its folder, seed and resume."""

    dir: str = Field(default="runs/default", min_length=1)
    """The run's folder. It holds config.yaml, metrics.jsonl, loss.png, samples.txt, checkpoints/,
    validation/ and model/."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights, the data order and dropout. The same seed gives the same run."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: resume from the newest valid checkpoint in run.dir, or start from the beginning. never: refuse
    a folder that has a checkpoint. must: refuse a folder without one."""
    change: list[str] = []
    """Settings that may differ from those the run was started with, e.g. [optim.lr]. Any other difference
    stops a resume. data.corpus and data.validation may only name another path or URL of the same text."""
    _expand = field_validator("dir")(expand_home)


class DataSection(Section):
    """The corpus, its order and its tokenizer."""

    corpus: str | list[dict[str, Any]] = "python-stdlib"
    """python-stdlib; python-packages (the source of the installed packages); a file, folder or glob
    (parquet, JSON lines, csv, tsv or text; plain, .gz or .zst), local or a URL (https://, s3://, gs://,
    hf://); a folder of datasets' save_to_disk; a hub dataset; a synthetic task, synthetic/NAME; or a task
    of Long Range Arena, lra/NAME. A list is a weighted mixture of corpora, each a name or a mapping, e.g.
    [a.txt, {corpus: b, weight: 2}]: b gives two thirds of the tokens. A mapping has corpus, weight (default
    1), order (auto, documents, passages), and subset, split, revision, text_field, template, filter, join
    and hold_out, which are by default those of this section."""
    _normalize = field_validator("corpus", mode="before")(normalized_corpus)
    task: dict[str, Any] = {}
    """Options of a task (docs/synthetic.md, docs/lra.md), e.g. {length: 64, num_tokens: 4}. With a task,
    settings for text are errors."""
    cache: str | None = Field(default=None, min_length=1)
    """Folder for the examples of lra/ tasks, which are made once. null: the environment variable
    MINRNN_CACHE, else XDG_CACHE_HOME/minrnn, else ~/.cache/minrnn."""
    subset: str | None = None
    """Configuration of a hub dataset, e.g. sample-10BT."""
    split: str = "train"
    """Split of a hub dataset, or of a DatasetDict of save_to_disk."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset; null for its main branch. It is resolved to a commit at the
    start, and the run keeps that commit."""
    commit: str | None = None
    """The commit that `revision` was resolved to. minrnn writes it to config.yaml; leave it out of a
    recipe."""
    text_field: str = "text"
    """Column or key that holds a document's text."""
    template: str | None = Field(default=None, min_length=1)
    """Several fields as one text, instead of `text_field`, e.g. "{title}\\n\\n{text}". Fields hold text or
    numbers. {{ and }} are braces, \\n is a newline."""
    filter: dict[str, Any] = {}
    """Leave out the rows that do not pass, and count them (documents_filtered in metrics.jsonl). min_bytes
    and max_bytes are of the text. Any other key is a field with a value, a list of values, or a range,
    e.g. {min_bytes: 200, language: [en, de], score: {min: 0.5}}. Null does not pass."""
    skip_broken: bool = False
    """Skip and count damaged data instead of stopping: documents that are not UTF-8, not JSON or without
    text; damaged row groups of parquet files; everything after the damage in other files."""
    join: str | None = Field(default=None, min_length=1)
    """Join documents into long ones. folder: the files of a folder. package: all files below a top-level
    folder of the corpus. In both, files directly in the corpus's root are not joined. Otherwise the name
    of a column, e.g. book_id: consecutive rows with the same value are one document. Lower
    data.shuffle_window if joined documents are very long, since a window holds that many of them."""
    order: Literal["auto", "documents", "continuous", "windows"] = "auto"
    """documents: every lane reads documents to their end, shuffled. continuous, for text files: every lane
    reads on through the text from a position of its own, with the state carried; the end of the text is
    held out. windows: random crops of the whole corpus as one text; no state is carried. auto: continuous for
    text files that are fewer than the lanes of all readers, such as a single long one, else documents."""
    tokenizer: str = Field(default="bytes", min_length=1)
    """bytes, or a tokenizer from the hub or a folder."""
    _expand = field_validator("tokenizer")(expand_home)
    trust_remote_code: bool = False
    """Run the code that a tokenizer contains. Read it first."""
    shuffle_window: int = Field(default=1024, ge=1)
    """Documents that are shuffled together. A resume reads at most this many again."""
    validation: str | None = None
    """A separate corpus for validation. null: python-stdlib's held-out modules, or `validation_fraction`
    of the corpus."""
    validation_subset: str | None = None
    """Configuration of the hub dataset in `validation`."""
    validation_split: str = "validation"
    """Split of the hub dataset in `validation`."""
    validation_revision: str | None = None
    """Commit, tag or branch of the hub dataset in `validation`, as `revision`."""
    validation_commit: str | None = None
    """The commit that `validation_revision` was resolved to. minrnn writes it to config.yaml; leave it out
    of a recipe."""
    validation_fraction: float = Field(default=0.01, gt=0.0, lt=1.0)
    """Fraction of the corpus that is held out; with order continuous or windows, the end of the text."""
    hold_out: Literal["auto", "documents", "shards"] = "auto"
    """What is held out. documents: those whose text has a small hash; finding them reads the corpus up to
    the last of them. shards: whole shards, or the end of one, so nothing else is read. auto: shards for
    hub datasets and for files of rows of more than 256 MB, unless that holds out over a tenth of the
    corpus; otherwise documents."""
    validation_tokens: int | None = Field(default=500_000, ge=1)
    """Validate on whole documents until they have this many tokens in all; null for all documents. They
    are kept in run.dir/validation."""
    workers: int = Field(default=1, ge=0)
    """Processes that read and tokenize ahead, for each training process; 0 reads in a thread of the training
    process. They share its readers. If there are more of them than readers, several work for one reader. The
    data and their order are the same for any number."""
    retries: int = Field(default=10, ge=0)
    """How often a read of a remote corpus is tried again after an error that may pass (no answer, a broken
    connection, status 429 or 5xx), from the byte where it broke. Then the run saves and exits; the same
    command resumes it."""
    retry_wait: float = Field(default=1.0, gt=0)
    """Seconds before the first retry. Each further wait is twice as long, up to 60 seconds, or as long as
    the server asks for."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds without a byte from a remote corpus after which the connection counts as broken."""

    def rules(self) -> RowRules:
        """How a row becomes a text, and which rows are left out.

        Raises:
            UserError: `template` or `filter` is malformed.
        """
        return RowRules.from_settings(self.template, self.filter)

    def network(self) -> RetryPolicy:
        """How long an outage of a remote corpus is waited for."""
        return RetryPolicy(self.retries, self.timeout, self.retry_wait)

    def errors(self) -> dict[str, str]:
        if not is_task(self.corpus):
            errors = {}
            if self.task:
                errors["task"] = f"is for tasks (synthetic/NAME, lra/NAME), not for {self.name}"
            if isinstance(self.corpus, list):
                errors |= source_errors(self.corpus)
                if self.order in ("continuous", "windows"):
                    message = f"{self.order} is for a single corpus; leave it out for a mixture"
                    errors["order"] = f"{message}, whose sources may say order: passages"
            elif self.corpus.startswith("[") and "{" in self.corpus:
                errors["corpus"] = f"is not a list in YAML; write {EXAMPLE}, not {self.corpus!r}"
            try:
                self.rules()
            except UserError as error:
                errors |= {key.removeprefix("data."): message for key, message in error.errors}
            if self.template is not None and self.text_field != "text":
                errors["text_field"] = "is for a single field; name it in data.template and leave this out"
            if self.join is not None and self.order == "windows":
                errors["join"] = (
                    "is for data.order documents; windows reads the whole corpus as one text, so leave it out"
                )
            return errors
        errors = {
            name: f"is for text; {self.corpus} has its own examples, so leave it out"
            for name, field in type(self).model_fields.items()
            if name not in ("corpus", "task", "cache", "workers") and getattr(self, name) != field.default
        }
        try:
            build_task(self.corpus, self.task)
        except UserError as error:
            errors |= {key.removeprefix("data."): message for key, message in error.errors}
        return errors

    @property
    def name(self) -> str:
        """The corpus, or the sources of the mixture, for messages."""
        return corpus_name(self.corpus)

    @property
    def has_filter(self) -> bool:
        """Whether rows of the corpus, or of a source of the mixture, are left out."""
        sources = self.corpus if isinstance(self.corpus, list) else []
        return bool(self.filter) or any(source.get("filter") for source in sources)

    def with_commits_of(self, saved: dict[str, Any]) -> "DataSection":
        """The section with the commits of a saved run's, for the datasets and revisions that both name."""
        commits: dict[str, Any] = {}
        if isinstance(self.corpus, list) and isinstance(saved.get("corpus"), list):
            commits["corpus"] = with_source_commits(
                self.corpus, saved["corpus"], self.revision == saved.get("revision")
            )
        for corpus, prefix in (("corpus", ""), ("validation", "validation_")):
            revision, commit = f"{prefix}revision", f"{prefix}commit"
            is_same = all(getattr(self, name) == saved.get(name) for name in (corpus, revision))
            if is_same and getattr(self, commit) is None and saved.get(commit):
                commits[commit] = saved[commit]
        return self.model_copy(update=commits)


class TrainSection(Section):
    """The training loop."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps in all. Raise it to continue a finished run, at its last learning rate (see
    optim.schedule_steps)."""
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"
    """Device to compute on. auto: the accelerator if there is one, else the CPU. With several
    accelerators, each process takes one."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """auto: the faster of fp32 and bf16, measured with matrix products at the start; a resumed run keeps
    its precision. bf16: autocast over fp32 weights; the recurrent state stays fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again to save memory. none: nothing. selective: all but matrix
    products and scans. full: whole blocks."""
    micro_lanes: int | None = Field(default=None, ge=1)
    """Lanes that are computed at a time, a divisor of batch.lanes; null for all lanes of a reader. Fewer
    need less memory and more time for the same losses, so a recipe fits a smaller GPU without being another
    run. With dropout, it decides which values are dropped. `minrnn plan` shows the memory."""
    compile: bool = False
    """Apply torch.compile to each block. For GPUs: on a CPU the kernels are fused already. The first step
    takes longer, and dropout uses other random numbers."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between validations; null for a single one at the end."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints, in addition to those of `save_minutes`; null for none."""
    save_at: list[Annotated[int, Field(ge=1)]] = []
    """More steps to save, whose checkpoints are kept until the end. Other runs can branch off them."""
    save_minutes: float | None = Field(default=15.0, gt=0)
    """Minutes between checkpoints, in addition to those of `save_every`; null for none. A checkpoint is
    always written at the end and on signals."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep."""
    save_in_background: bool = True
    """Write checkpoints during training, from copies in main memory (12 bytes per parameter). false:
    training waits until they are written."""
    skip_spikes: float | None = Field(default=None, gt=1.0)
    """Skip a batch whose loss is not finite or is more than this many times the median of the last 100
    losses; null: skip none, and stop at a loss that is not finite."""
    max_skips: int = Field(default=10, ge=1)
    """Number of batches in a row that may be skipped before training stops."""
    peer_timeout: float = Field(default=1800.0, gt=0)
    """Seconds without progress in any process until the one that hangs is named and all exit. It must
    exceed the longest step, save and export."""
    prompts: list[str] = [""]
    """Prompts of the samples in samples.txt, for language models of text."""
    sample_tokens: int = Field(default=200, ge=0)
    """Tokens per sample; 0 for no samples."""


class ParallelSection(Section):
    """How processes share the work, besides sharing the readers."""

    context: int = Field(default=1, ge=1)
    """Processes per sequence, neighbours in rank. Each computes its part of every chunk's time and passes
    its state to the next."""


# The field shares its name with ABCMeta.register, which nobody calls on a section.
warnings.filterwarnings("ignore", message='Field name "register" in "TrackingSection" shadows')


class TrackingSection(Section):
    """MLflow, as a mirror of metrics.jsonl, and other trackers (docs/tracking.md). Training never waits for
    MLflow or stops because of it. What could not be sent is sent later, at the latest by the next start."""

    uri: str | None = Field(default="auto", min_length=1)
    """Tracking server or database; null for none. auto: the environment variable MLFLOW_TRACKING_URI, or
    sqlite:///mlflow.db. A relative database path stays relative to the folder where the run was started
    first."""
    experiment: str = Field(default="minrnn", min_length=1)
    """Name of the MLflow experiment, and of the project in W&B."""
    parent: str | None = Field(default=None, pattern=r"^[^'`]+$")
    """Name of the MLflow run in which this one is nested, with all others of the same name in the experiment
    and in neighbouring folders. The first of them creates it. A sweep sets it."""
    register: str | None = Field(default=None, min_length=1)
    """Name in MLflow's model registry: the exported model becomes its next version. null: the model stays in
    run.dir/model only."""
    system_metrics: bool = True
    """Also log CPU, memory, disk, network and GPUs (with nvidia-ml-py installed) of the main process's
    machine, with MLflow's own monitor."""
    also: list[Literal["tensorboard", "wandb"]] = []
    """Trackers besides MLflow, through Accelerate: tensorboard writes to run.dir/tensorboard, wandb is W&B,
    the web service. Each needs the extra of its name (make setup-tensorboard)."""

    def errors(self) -> dict[str, str]:
        if (uri := self.resolved_uri()) is None:
            message = "names a model in MLflow's registry, but tracking.uri is null; leave one out"
            return {} if self.register is None else {"register": message}
        if (problem := uri_problem(uri)) is None:
            return {}
        return {"uri": problem if self.uri != "auto" else f"auto is MLFLOW_TRACKING_URI, which {problem}"}

    def resolved_uri(self) -> str | None:
        """`uri`, with auto resolved."""
        if self.uri == "auto":
            return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        return self.uri


@dataclass
class Recipe:
    """All settings of a run."""

    run: RunSection
    model: ModelSection
    data: DataSection
    batch: BatchSection
    optim: OptimSection
    train: TrainSection
    parallel: ParallelSection
    tracking: TrackingSection
    push: PushSection
    eval: EvalSection

    def task(self) -> Task | LabelledTask | None:
        """The task that the corpus names, or None for text."""
        return build_task(self.data.corpus, self.data.task) if is_task(self.data.corpus) else None

    def synthetic_task(self) -> Task | None:
        """The synthetic task that the corpus names, if it is one."""
        task = self.task()
        return task if isinstance(task, Task) else None

    def given_model_fields(self) -> dict[str, Any]:
        """As `resolved_model_fields`, without the sizes that `model.num_parameters` chooses."""
        model = self.model
        if model.family != OURS:
            return merged_fields(model.family, model.user_fields(), model.family_config, {})
        free = ({"hidden_size", "intermediate_size"} - model.user_fields().keys()) | model.sizes.keys()
        return {name: value for name, value in self.resolved_model_fields().items() if name not in free}

    def resolved_model_fields(self) -> dict[str, Any]:
        """The fields of the model's configuration: for minrnn every field that a recipe can set (the user's
        value, else the preset's, else the default); for another family those that are set."""
        model = self.model
        if model.family != OURS:
            return merged_fields(model.family, model.user_fields(), model.family_config, model.sizes)
        values = model.model_dump(exclude=set(NO_CONFIG_FIELDS))
        return {**values, **PRESETS[model.preset], **model.user_fields(), **model.sizes}


SECTIONS: dict[str, type[Section]] = {
    "run": RunSection,
    "model": ModelSection,
    "data": DataSection,
    "batch": BatchSection,
    "optim": OptimSection,
    "train": TrainSection,
    "parallel": ParallelSection,
    "tracking": TrackingSection,
    "push": PushSection,
    "eval": EvalSection,
}
