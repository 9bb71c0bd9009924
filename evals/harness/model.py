"""Recurrent models in lm-eval: contexts are read once, and every continuation starts from a saved state.

    contexts -> shared prefixes, read once -> the rest of each, in batches
      -> logits and states -> continuations

Nothing is truncated, since memory does not grow with the length: a text of any length is read in pieces of
`piece` tokens. A document begins with <bos>, as in training. Its perplexity (`loglikelihood_rolling`) is
measured with the state carried through the whole document, or, for comparison with published numbers, in
windows without a carried state. Models of transformers carry no state and read every request whole
(whole_rows.py); their texts begin as their tokenizer says, as in lm-eval's own class.

lm-eval (0.4.13) has a fixed table of models, so importing this module registers the name `minrnn`:

    minrnn eval MODEL --tasks a,b                                      command.py
    minrnn lm-eval --model minrnn --model_args pretrained=MODEL ...    every option of lm_eval
"""

import functools
import sys
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...data.prompts import begin_token, family_prompt_tokens, prompt_tokens
from ...models import MinRNNForCausalLM
from ...models.decoding import TokenStep
from ...models.modeling_minrnn import PREFILL
from ...pipeline.families.decoding import has_exact_cache, suppress
from ...pipeline.families.registry import max_positions
from ...pipeline.loading import family_limits, move_model, read_model, weights_dtype
from ...pipeline.processes import broadcast_from_main, connect, local_device, run_on_all_ranks, world_size
from .likelihood import Score, make_batches, read_contexts, read_rows, score_continuations, select_rows
from .whole_rows import decoder, same_lengths, score_rows

DEFAULT_BATCH = 32
# text (None if it is not a request by itself), context, continuation
Request = tuple[tuple[str, str] | None, list[int], list[int]]


def _sampling(kwargs: dict[str, Any]) -> LogitsProcessorList | None:
    """The logits processors for a task's generation_kwargs; None for greedy decoding.

    Raises:
        ValueError: unknown settings.
    """
    options = dict(kwargs)
    do_sample, temperature = options.pop("do_sample"), float(options.pop("temperature", 0.0) or 1.0)
    top_k, top_p = int(options.pop("top_k", 0) or 0), float(options.pop("top_p", 1.0) or 1.0)
    unknown = sorted(options.keys() - {"until", "max_gen_toks"})
    if unknown:
        known = "until, max_gen_toks, do_sample, temperature, top_k, top_p"
        raise ValueError(f"generation_kwargs: {', '.join(unknown)} not known here, only {known}.")
    if not do_sample:
        return None
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k > 0 else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList(warpers)


class MinRNNLM(TemplateLM):
    """lm-eval's interface to a model.

    Args:
        pretrained: a model in eval mode, or the export, hub id or run to load.
        tokenizer: required if `pretrained` is a model.
        batch_size: rows at once; "auto" is 32, since memory does not depend on the length.
        max_batch_size: passed by lm_eval; not used.
        device: auto (the accelerator, if there is one), cpu, cuda, mps, xpu; None is auto.
        dtype: of the weights: auto (as stored, see `loading.weights_dtype`), fp32, bf16, fp64.
        piece: tokens read at once, over all rows.
        rolling_window: `loglikelihood_rolling` reads windows of this many tokens with the state reset; None:
            the state is carried through the document.
        max_gen_toks: maximum of new tokens for tasks that set none.
        trust_remote_code: run code that the tokenizer brings along.
        show_progress: with a bar for each kind of request.

    Raises:
        UserError: the model cannot be loaded.
        ValueError: a size is not an integer of at least 1.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: Any = None,
        batch_size: int | str = DEFAULT_BATCH,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        piece: int = PREFILL,
        rolling_window: int | None = None,
        max_gen_toks: int = 256,
        trust_remote_code: bool = False,
        show_progress: bool = True,
    ):
        super().__init__()
        batch_size = DEFAULT_BATCH if str(batch_size).startswith("auto") else batch_size
        for name, size in {
            "batch_size": batch_size,
            "piece": piece,
            "rolling_window": rolling_window,
            "max_gen_toks": max_gen_toks,
        }.items():
            if size is not None and (not str(size).isdecimal() or int(size) < 1):
                raise ValueError(f"{name} must be a number of at least 1, not {size!r}.")
        self.accelerator = None
        if isinstance(pretrained, str):
            target = local_device(device or "auto", "--device")
            pretrained, tokenizer = read_model(pretrained, trust_remote_code)
            if world_size() > 1:
                # the timeout is long, since fast processes wait for slow ones
                self.accelerator = connect(timedelta(weeks=1), target)
                self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            move_model(pretrained, self._decide_dtype(pretrained.dtype, dtype, target), target)
        self.model: Any = pretrained
        self.tokenizer, self._device = tokenizer, pretrained.device
        self.config, self._has_template = self.model.config, False
        self.has_state, self.limits = isinstance(self.model, MinRNNForCausalLM), family_limits(self.model)
        self.batch_size, self.piece = int(batch_size), piece
        self.rolling_window, self.max_gen_toks = rolling_window, max_gen_toks
        self._show_progress = show_progress

    def _decide_dtype(self, stored: torch.dtype, requested: str, device: torch.device) -> torch.dtype:
        """The dtype of the weights: the main process decides for all."""
        if self.accelerator is None:
            return weights_dtype(stored, requested, device)
        dtype = run_on_all_ranks(self.accelerator, lambda: weights_dtype(stored, requested, device))
        return broadcast_from_main(self.accelerator, dtype)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a document; an empty context is replaced by it."""
        return begin_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name in caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def rolling(self) -> str:
        """How `loglikelihood_rolling` reads a document, as a text for the results."""
        if (window := self._window()) is not None:
            return f"windows of {window} tokens, state reset"
        if not self.has_state:
            return "the whole document at once"
        return "state carried through the document"

    def _hides_progress(self, disable_tqdm: bool) -> bool:
        return disable_tqdm or self.rank != 0 or not self._show_progress

    @functools.cached_property
    def _has_cache(self) -> bool:
        return has_exact_cache(self.model)

    def _window(self) -> int | None:
        """Tokens of a window of `loglikelihood_rolling`: as requested, at most the model's positions.

        Raises:
            ValueError: more are requested.
        """
        limit = None if self.has_state else max_positions(self.model.config)
        if limit is not None and self.rolling_window is not None and self.rolling_window > limit:
            raise ValueError(f"a window of {self.rolling_window} tokens, but the model has {limit} positions")
        return self.rolling_window or limit

    def get_model_info(self) -> dict[str, Any]:
        """Information for the results file."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "rolling": self.rolling,
            **({"limits": self.limits} if self.limits else {}),
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode as training does, with <bos> unless `add_special_tokens` is False; for a model of
        transformers as its tokenizer does."""
        if not self.has_state:
            return family_prompt_tokens(self.tokenizer, string, add_special_tokens is not False)
        if self._has_template:  # special tokens in the text are tokens, including <bos>
            ids = self.tokenizer.encode(string, add_special_tokens=False, split_special_tokens=False)
            has_bos = add_special_tokens is False or ids[:1] == [self.prefix_token_id]
            return ids if has_bos else [self.prefix_token_id, *ids]
        return prompt_tokens(self.tokenizer, string)[0 if add_special_tokens is not False else 1 :]

    def tok_decode(self, tokens: list[int]) -> str:
        """Decode without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Apply the tokenizer's template. From then on names of special tokens are encoded as tokens."""
        self._has_template = True
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor if self.accelerator is None else self.accelerator.gather(tensor)  # pyright: ignore[reportReturnType]

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any]:
        if self.accelerator is None:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst)
        return gathered  # pyright: ignore[reportReturnType]

    def barrier(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Score]:
        """Read each context once, and a prefix that several share once for all of them."""
        if not self.has_state:
            return self._score_whole_rows(requests, disable_tqdm)
        lengths = [len(continuation) for _, _, continuation in requests]
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, context, _) in enumerate(requests):
            if lengths[number]:
                by_context[tuple(context)].append(number)
        contexts, members = [list(context) for context in by_context], list(by_context.values())
        scores: list[Score] = [(0.0, True)] * len(requests)
        progress = tqdm(total=len(requests), disable=self._hides_progress(disable_tqdm), desc="loglikelihood")
        for batch, logits, cache in read_contexts(self.model, contexts, self.batch_size, self.piece):
            row_of = {number: row for row, context in enumerate(batch) for number in members[context]}
            for part in make_batches(list(row_of), lengths, self.batch_size):
                rows = [row_of[number] for number in part]
                part_scores = score_continuations(
                    self.model,
                    logits[rows],
                    select_rows(cache, rows),
                    [requests[number][2] for number in part],
                    self.piece,
                )
                for number, value in zip(part, part_scores, strict=True):
                    scores[number] = value
                    if (text := requests[number][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", text, value)
                progress.update(len(part))
        progress.close()
        return scores

    def _score_whole_rows(self, requests: Sequence[Request], disable_tqdm: bool) -> list[Score]:
        """As `_loglikelihood_tokens`, for a model without a state."""
        scores: list[Score] = [(0.0, True)] * len(requests)
        numbers = [number for number, (_, _, continuation) in enumerate(requests) if continuation]
        begin = [self.prefix_token_id]
        rows = [(list(requests[number][1]) or begin, list(requests[number][2])) for number in numbers]
        with tqdm(
            total=len(rows), disable=self._hides_progress(disable_tqdm), desc="loglikelihood"
        ) as progress:
            values = score_rows(self.model, rows, self.batch_size, progress.update)
        for number, value in zip(numbers, values, strict=True):
            scores[number] = value
            if (text := requests[number][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", text, value)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole documents after <bos>, in nats; `rolling` says how they are read."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            parts = [([self.prefix_token_id], tokens)]
            if (window := self._window()) is not None:
                parts = map(
                    make_disjoint_window,
                    get_rolling_token_windows(tokens, self.prefix_token_id, window, 1),
                )
            for context, continuation in parts:
                windows.append((None, context, continuation))
                owners.append(number)
        values = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            values[number] += value
        for request, value in zip(requests, values, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return values

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate up to the first stop string, <eos> or `max_gen_toks` tokens; requests with equal settings
        share batches.
        """
        arguments: list[Any] = [request.args for request in requests]
        by_settings: dict[str, list[int]] = defaultdict(list)
        for number, (_, settings) in enumerate(arguments):
            by_settings[repr(settings)].append(number)
        contexts = [self.tok_encode(context) or [self.prefix_token_id] for context, _ in arguments]
        texts = [""] * len(requests)
        progress = tqdm(
            total=len(requests), disable=self._hides_progress(disable_tqdm), desc="generate_until"
        )
        for members in by_settings.values():
            kwargs: dict[str, Any] = {**normalize_gen_kwargs(arguments[members[0]][1], self.max_gen_toks)}
            for batch in self._generation_batches(members, contexts):
                rows = self._generate([contexts[number] for number in batch], kwargs)
                for number, tokens in zip(batch, rows, strict=True):
                    texts[number] = postprocess_generated_text(self.tok_decode(tokens), kwargs["until"], None)
                    self.cache_hook.add_partial("generate_until", arguments[number], texts[number])
                progress.update(len(batch))
        progress.close()
        return texts

    def _generation_batches(self, members: list[int], contexts: list[list[int]]) -> list[list[int]]:
        """Contexts to continue together: of similar length; of equal length for a model without a state."""
        lengths = [len(context) for context in contexts]
        if self.has_state:
            return make_batches(members, lengths, self.batch_size)
        groups = same_lengths([contexts[number] for number in members])
        return [
            [members[index] for index in batch]
            for group in groups
            for batch in make_batches(group, [lengths[number] for number in members], self.batch_size)
        ]

    @torch.no_grad()
    def _generate(self, contexts: list[list[int]], kwargs: dict[str, Any]) -> list[list[int]]:
        """New tokens of each row without <eos>.

        A row ends where the last byte of a stop string is written.
        """
        warp: Any = _sampling(kwargs)
        stops = [stop for stop in kwargs["until"] if stop]
        # in tokens: each decodes to at least one byte; some decoders drop a leading space
        tail = max((len(stop.encode()) for stop in stops), default=0) + 4
        if self.has_state:
            logits, cache = read_rows(self.model, contexts, None, self.piece)
            step = TokenStep(self.model, cache)
        else:
            logits, step = decoder(self.model, contexts, kwargs["max_gen_toks"], self._has_cache)
        rows: list[list[int]] = [[] for _ in contexts]
        unfinished = set(range(len(rows)))
        for count in range(kwargs["max_gen_toks"]):
            logits = suppress(self.model, logits)
            if warp is None:
                tokens = logits.argmax(-1)
            else:
                warped = warp(
                    torch.empty(len(rows), 0, dtype=torch.long, device=logits.device), logits.float()
                )
                tokens = torch.multinomial(warped.softmax(-1), 1).squeeze(1)
            for row, token in enumerate(tokens.tolist()):
                if row not in unfinished:
                    continue
                if token != self.eot_token_id:
                    rows[row].append(token)
                end = self.tok_decode(rows[row][-tail:]) if stops else ""
                if token == self.eot_token_id or any(stop in end for stop in stops):
                    unfinished.remove(row)
            if not unfinished or count + 1 == kwargs["max_gen_toks"]:
                break
            logits = step(tokens)
        return rows


register_model("minrnn")(MinRNNLM)  # not used as a decorator, which would hide the class from type checkers


def main(argv: list[str]) -> None:
    """Run `minrnn lm-eval`: lm-eval's own command, with the model name `minrnn` registered.

    Raises:
        UserError: the model cannot be loaded.
    """
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["minrnn lm-eval", *argv]  # lm-eval (0.4.13) reads arguments only there
    cli_evaluate()
