"""Command-line options that several commands share."""

import argparse
import os
from typing import Any

import yaml

DTYPE_NAMES = ("fp32", "bf16", "fp64")  # the keys of models.dtypes.DTYPES, which needs torch


def new_parser(command: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of a command. The epilog keeps its line breaks, and options must be written out."""
    return argparse.ArgumentParser(
        command,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse_mapping(text: str) -> dict[str, Any]:
    """A mapping in YAML, as the type of an argument."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise argparse.ArgumentTypeError(f"must be a mapping such as {{folder: DIR}}, not {text!r}")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the argument `MODEL` (see `loading.load`)."""
    text = "a run's folder, an export, or a model of the hub"
    parser.add_argument("model", type=os.path.expanduser, metavar="MODEL", help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device` (see `machine.resolve_device`)."""
    text = (
        "auto, cpu, cuda, mps or xpu; cuda:1 is the second of several (default: %(default)s, "
        "the accelerator if there is one)"
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help=text)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add `--trust-remote-code` (see `loading.load`)."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that the model or the tokenizer brings along; read it first",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype` of a loaded model (see `loading.load`)."""
    text = (
        "dtype of the weights; auto: as stored, but fp32 for bf16 weights if the device multiplies fp32 "
        "faster (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPE_NAMES), help=text)
