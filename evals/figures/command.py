"""`minrnn figures NAME ...`: the measurements of this repository, and the pages made from them."""

import argparse
import importlib

FIGURES = {
    "docs": "write the generated parts of README.md and docs/, from the committed results and the settings",
    "quickstart": "record the result of the quickstart run, after `make train`",
    "kernels": "compile the Triton kernels and record registers, spills and instructions (no GPU needed)",
    "families": "train all kinds of models on one text, with equal parameters and tokens, and compare them",
    "lra": "train classifiers on the tasks of Long Range Arena, at sizes that a CPU takes",
    "carrying": "measure what carrying the state buys, from the runs of distance.yaml or long-books.yaml",
    "ablation": "keep the results of an ablation",
    "study": "fit the scaling laws of a study's sweep and record them",
    "gpu": "run every check and measurement that needs a GPU, within a time limit",
}


def main(argv: list[str]) -> None:
    """Run the figure of that name with the remaining arguments.

    Raises:
        UserError: from the figure's own arguments.
    """
    lines = [f"  {name:<12}{help}" for name, help in FIGURES.items()]
    parser = argparse.ArgumentParser(
        "minrnn figures",
        description="Make the figures of this repository.",
        epilog="\n".join(["figures:", *lines, "", "`minrnn figures NAME --help` prints a figure's options."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=FIGURES, metavar="NAME", help="one of the figures below")
    name = parser.parse_args(argv[:1]).name
    importlib.import_module(f".{name}", __package__).main(argv[1:])
