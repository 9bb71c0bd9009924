"""`minrnn generate`: continue a prompt, printed as it comes. A prompt of any length is read in pieces of bounded memory."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..data.errors import UserError
from ..data.tokenizer import with_bos
from ..pipeline.options import add_device, add_dtype, add_trust


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("minrnn generate", description="Continue a prompt with a trained model.")
    parser.add_argument("model", metavar="MODEL", help="a run's folder, an export, or a model of the hub")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    source.add_argument("--prompt-file", type=Path, help="file to continue, of any length; - for standard input")
    parser.add_argument("--max-new-tokens", type=int, default=300, help="tokens to write (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of the prompt that are read at once (default: %(default)s)")
    add_device(parser)
    add_trust(parser)
    add_dtype(parser)
    return parser


def main(argv: list[str]) -> None:
    """Print the prompt and its continuation."""
    arguments = _parser().parse_args(argv)
    problems = []
    if arguments.temperature < 0:
        problems.append(("--temperature", f"must be 0 or more, not {arguments.temperature}"))
    if not 0 < arguments.top_p <= 1:
        problems.append(("--top-p", f"must be in (0, 1], not {arguments.top_p}"))
    problems += [
        (f"--{name.replace('_', '-')}", "must be at least 1") for name in ("max_new_tokens", "prefill") if getattr(arguments, name) < 1
    ]
    prompt = arguments.prompt
    if arguments.prompt_file is not None:
        try:
            prompt = sys.stdin.read() if str(arguments.prompt_file) == "-" else arguments.prompt_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(("--prompt-file", f"cannot read {arguments.prompt_file}: {error}"))
    if problems:
        raise UserError(*problems)

    import transformers

    from ..pipeline.loading import load

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    loaded: Any = load(
        arguments.model, arguments.dtype, arguments.device, arguments.trust_remote_code
    )  # generate() is none of the class's for type checkers
    model, tokenizer = loaded
    transformers.set_seed(arguments.seed)
    sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
    model.generate(
        **tokenizer(with_bos(tokenizer, prompt), return_tensors="pt", return_token_type_ids=False).to(model.device),
        **(sampling if arguments.temperature > 0 else {"do_sample": False}),
        max_new_tokens=arguments.max_new_tokens,
        prefill_chunk_size=arguments.prefill,
        pad_token_id=tokenizer.pad_token_id,
        streamer=transformers.TextStreamer(tokenizer, skip_special_tokens=True),
    )
