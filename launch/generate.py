"""`minrnn generate`: continue a prompt, printing tokens as they are generated. A prompt of any length is read
in pieces of bounded memory."""

import argparse
from collections.abc import Iterator
from typing import Any

from ..common.checks import option_minimum_errors
from ..common.errors import UserError
from ..common.files import user_path
from ..data.prompts import TextStream, begin_token, family_prompt_tokens, prompt_tokens, read_prompt
from ..data.sources import is_text
from ..pipeline.options import add_device, add_dtype, add_model, add_trust


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("minrnn generate", description="Continue a prompt with a trained model.")
    add_model(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    source.add_argument(
        "--prompt-file", type=user_path, help="file to continue, of any length; - is standard input"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=300, help="tokens to generate (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0 always takes the most likely token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the most likely tokens of this total probability",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    parser.add_argument(
        "--prefill",
        type=int,
        default=8192,
        help="tokens of the prompt to read at once, by a model with a state (default: %(default)s)",
    )
    add_device(parser)
    add_trust(parser)
    add_dtype(parser)
    return parser


def main(argv: list[str]) -> None:
    """Print the prompt and its continuation."""
    arguments = _parser().parse_args(argv)
    errors = []
    if arguments.temperature < 0:
        errors.append(("--temperature", f"must be 0 or more, not {arguments.temperature}"))
    if not 0 < arguments.top_p <= 1:
        errors.append(("--top-p", f"must be in (0, 1], not {arguments.top_p}"))
    errors += option_minimum_errors(arguments, max_new_tokens=1, prefill=1)
    prompt = arguments.prompt
    try:
        if arguments.prompt_file is not None:
            prompt = read_prompt(arguments.prompt_file, "--prompt-file")
        elif not is_text(prompt):
            errors.append(("--prompt", "is not UTF-8; convert it"))
    except UserError as error:
        errors += error.errors
    if errors:
        raise UserError.from_list(errors)

    import transformers

    from ..models import MinRNNForCausalLM
    from ..pipeline.loading import load

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load(arguments.model, arguments.dtype, arguments.device, arguments.trust_remote_code)
    if isinstance(model, MinRNNForCausalLM):
        ids = prompt_tokens(tokenizer, prompt)
    else:
        ids = family_prompt_tokens(tokenizer, prompt) or [begin_token(tokenizer)]
        _check_length(model, len(ids) + arguments.max_new_tokens)
    output = TextStream(tokenizer, ids)
    _print(prompt)
    transformers.set_seed(arguments.seed)
    for token in _continue(model, ids, arguments):
        if token == tokenizer.eos_token_id:
            break
        _print(output.write([token]))
    _print(output.end() + "\n")


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _check_length(model: Any, num_tokens: int) -> None:
    """Refuse more tokens than a model of transformers has positions."""
    from ..pipeline.families.registry import max_positions

    if (limit := max_positions(model.config)) is not None and num_tokens > limit:
        name = model.config.model_type
        message = f"with the prompt, the text has {num_tokens} tokens, but this {name} has {limit} positions"
        raise UserError("--max-new-tokens", f"{message}; lower it, or shorten the prompt")


def _continue(model: Any, ids: list[int], arguments: argparse.Namespace) -> Iterator[int]:
    """New tokens. `generate()` would return the same ones, but copies the whole prompt for each."""
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    from ..models import MinRNNForCausalLM
    from ..models.decoding import TokenStep, prefill
    from ..pipeline.families.decoding import FamilyDecoder, suppress

    warp: Any = LogitsProcessorList()
    if arguments.temperature > 0:
        warp += [TemperatureLogitsWarper(arguments.temperature)]
    if arguments.top_p < 1:
        warp += [TopPLogitsWarper(arguments.top_p)]
    text = torch.tensor([ids])
    if isinstance(model, MinRNNForCausalLM):
        logits, cache = prefill(model, text, piece=arguments.prefill)
        step = TokenStep(model, cache)
    else:
        step = FamilyDecoder(model, text)
        logits = step.logits
    for count in range(arguments.max_new_tokens):
        logits = suppress(model, logits)
        if arguments.temperature > 0:
            token = torch.multinomial(warp(None, logits.float()).softmax(-1), 1).squeeze(1)
        else:
            token = logits.argmax(-1)
        yield int(token)
        if count + 1 < arguments.max_new_tokens:
            logits = step(token)
