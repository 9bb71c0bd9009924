"""Options that several commands share, so that each means the same everywhere."""

import argparse

DTYPES = ("auto", "fp32", "bf16", "fp64")


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`: what `machine.resolve_device` reads."""
    text = "auto, cpu, cuda, mps or xpu; cuda:1 is the second of several (default: %(default)s, the accelerator if there is one)"
    parser.add_argument("--device", default="auto", metavar="DEVICE", help=text)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """`--trust-remote-code`: what `loading.load` reads."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that the tokenizer brings along; read it before",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """`--dtype` of a loaded model: what `loading.load` reads."""
    text = "of the weights; auto: as stored, but fp32 for bf16 weights where the device multiplies fp32 faster (default: %(default)s)"
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help=text)
