"""The pages of the documentation, and the shell commands on them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]
MARKS = ("GPU", "network", "cluster", "minutes", "hours")
# What a command needs that names these.
IMPLIED = {
    "network": r"\b(train|prepare)\b.*(fineweb|HuggingFaceFW)|plan .*fineweb(?!.*--vocab-size)|\w+://"
    r"|lambada|hellaswag|wikitext|^pip install|^hf |\bme/|--push\.|wandb"
    r"|eval .*--tasks (?!my_task|lra/)|--eval\.tasks",
    "GPU": r"--multi_gpu|accelerate/(ddp|zero)",
    "cluster": r"\bsbatch\b|^torchrun|multi-node",
    "hours": r"^minrnn (sweep (laptop|rules|gpu)(?!.*--plan)|fit runs/(laptop|rules))",
}


@dataclass(frozen=True)
class Command:
    """A command of a page, without its comment."""

    page: str
    environment: dict[str, str]
    words: list[str]
    needs: frozenset[str]
    """Of `MARKS`: what it needs besides a CPU and a minute."""

    @property
    def recipe_words(self) -> list[str] | None:
        """The words that name a recipe and its settings, if the command trains."""
        if self.words[:2] == ["minrnn", "train"]:
            return [word for word in self.words[2:] if word not in ("--quiet", "--verbose")]
        if "minrnn.pipeline.train" in self.words:
            return self.words[self.words.index("minrnn.pipeline.train") + 1 :]
        scripts = [i for i, word in enumerate(self.words) if word.endswith("train.sbatch")]
        return ["--config", *self.words[scripts[0] + 1 :]] if scripts else None


def text_of(page: str) -> str:
    """The Markdown of a page."""
    return (REPOSITORY / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE)


def command_of(page: str, line: str) -> Command | None:
    """The command of a line, or None for an empty one, a comment and `export`."""
    code, _, comment = f"{line} ".partition("# ")
    words = shlex.split(code)
    if not words or words[0] == "export":
        return None
    environment = {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    marked = re.findall(r"\(([\w, ]+)\)\s*$", comment)
    named = {mark.strip() for mark in marked[0].split(",")} if marked else set()
    implied = {mark for mark, pattern in IMPLIED.items() if re.search(pattern, code.strip())}
    return Command(page, environment, words, frozenset((named & {*MARKS}) | implied))


def commands(page: str) -> list[Command]:
    """The commands of a page's shell blocks, in their order. Loops are written out."""
    found = []
    for block in blocks(page, "bash"):
        text = block.replace("\\\n", " ")
        text = re.sub(
            r"^for (\w+) in ([^;\n]+); do\n(.*?)^done$", _unrolled, text, flags=re.DOTALL | re.MULTILINE
        )
        found += [command for line in text.splitlines() if (command := command_of(page, line)) is not None]
    return found


def _unrolled(loop: re.Match[str]) -> str:
    name, values, body = loop.groups()
    return "\n".join(body.replace(f"${name}", value) for value in values.split())
