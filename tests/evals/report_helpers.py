"""Synthetic runs and results files, and their report, for the tests of `minrnn report`."""

import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from minrnn.evals.report import runs
from minrnn.launch.cli import main
from minrnn.pipeline.recipe import build_recipe, resolved_config, shipped_recipes

LENGTHS = (40, 128)
Values = dict[str, dict[str, Any]]
Numbers = list[float] | None


def make_run(
    folder: Path, recipe: str, seed: int, accuracies: Numbers = None, losses: Numbers = None, **changes: Any
) -> Path:
    """Make the folder of a run of a shipped recipe, with a validation every 10 steps and a truncated last
    line.

    Args:
        accuracies: of each validation of a task; half of that at length 128.
        losses: of each validation of text.
        changes: section__field=value.
    """
    values: Values = yaml.safe_load(shipped_recipes()[recipe].read_text())
    for key, value in {"run__dir": str(folder), "run__seed": seed, "train__steps": 100, **changes}.items():
        section, field = key.split("__")
        values.setdefault(section, {})[field] = value
    lines = []
    for i in range(len(accuracies or losses or [])):
        step = 10 * (i + 1)
        progress = {"step": step, "tokens": 64 * step}
        lines.append({"kind": "train", **progress, "loss": 3.0 / (i + 1), "tokens_per_second": 320.0})
        validation: dict[str, Any] = {
            "kind": "validation",
            **progress,
            "loss": losses[i] if losses else 0.5,
            "seconds": 1.0,
        }
        if accuracies:
            by_length = {str(length): accuracies[i] * 40 / max(40, length / 1.6) for length in LENGTHS}
            validation |= {
                "accuracy": accuracies[i],
                "accuracy_scaled": (accuracies[i] - 0.1) / 0.9,
                "chance": 0.1,
                "by_length": by_length,
            }
        else:
            validation["bits_per_byte"] = validation["loss"] / math.log(2)
        lines.append(validation)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved_config(build_recipe(values))))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st'
    )
    return folder


def make_results(tmp_path: Path) -> Path:
    """A folder with three seeds of Bucket Sort and one run of Shakespeare."""
    folder = tmp_path / "results"
    accuracies = [[0.2, 0.9], [0.2, 0.95], [0.3, 0.98]]
    corpus: dict[str, Any] = {"data__corpus": "synthetic/bucket-sort-10", "train__steps": 20}
    buckets = [
        make_run(tmp_path / f"bucket-{i}", "synthetic-formal", i, accuracies[i], **corpus) for i in range(3)
    ]
    shakespeare = make_run(
        tmp_path / "shakespeare",
        "shakespeare-paper",
        0,
        losses=[2.0, 1.6, 1.7],
        data__corpus="/home/someone/input.txt",
    )
    runs.main([*map(str, buckets), "--as", "bucket-sort", "--out", str(folder / "bucket.json")])
    runs.main([str(shakespeare), "--as", "shakespeare", "--out", str(folder / "text.json")])
    return folder


def report(*paths: Path, out: Path) -> str:
    main(["report", *map(str, paths), "--out", str(out)])
    return (out / "report.md").read_text()


def rows(markdown: str, first: str) -> list[list[str]]:
    """The rows of tables whose first cell begins with `first`, with links replaced by their words."""
    bare = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in bare.splitlines()
        if line.startswith("|")
    ]
    return [row for row in cells if row[0].startswith(first)]


def section(markdown: str, title: str) -> str:
    """The text from a heading to the next heading of its level or above."""
    level = title.split(" ")[0]
    return re.split(rf"\n#{{1,{len(level)}}} ", markdown.split(f"\n{title}\n")[1])[0]


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order, and records ids, links, images and tables."""

    def __init__(self, content: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []
        self.widths: list[list[int]] = []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.images += [values["src"]] if tag == "img" else []
        if tag == "table":
            assert self.open[-1] == "div"
            self.widths.append([])
        elif tag == "tr":
            self.widths[-1].append(0)
        elif tag in ("td", "th"):
            self.widths[-1][-1] += 1
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
