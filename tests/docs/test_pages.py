"""The pages of the documentation: links, the index, and commands that parse."""

import ast
import contextlib
import io
import re
from functools import cache
from pathlib import Path

import pytest
from pages import PAGES, REPOSITORY, Command, command_of, commands, text_of

from minrnn.common.errors import UserError
from minrnn.launch.cli import MODULES, main
from minrnn.pipeline.recipe import parse_arguments, read_recipe, shipped_recipes

LINKED = [*PAGES, "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md"]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_to_files_and_headings(page: str):
    broken = []
    for target in re.findall(r"\]\(([^()\s]+)\)", without_code(text_of(page))):
        name, _, anchor = target.partition("#")
        if "://" in name or name.startswith("mailto:"):
            continue
        path = (REPOSITORY / page).parent / name if name else REPOSITORY / page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def test_the_index_lists_every_page():
    index = text_of("docs/README.md")
    pages = {Path(page).name for page in PAGES if page.startswith("docs/")} - {"README.md"}
    assert not {page for page in pages if f"({page})" not in index}


def test_the_readme_fits_two_screens_before_its_first_long_table():
    lines = text_of("README.md").splitlines()
    rows = [line.startswith("|") for line in lines]
    first = next(i for i in range(len(lines)) if all(rows[i : i + 10]))
    assert first <= 120


def test_the_answers_name_tests_that_exist():
    page = text_of("docs/asks.md")
    answers = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    assert len(answers) == 12
    for answer in answers:
        assert "https://github.com/" in answer
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", answer)
        assert tests
        for path, name in tests:
            tree = ast.parse((REPOSITORY / path).read_text())
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_files_named_as_tests_exist():
    for page in PAGES:
        for path in re.findall(r"`(tests/[\w/]+\.py)", text_of(page)):
            assert (REPOSITORY / path).exists(), f"{page}: {path}"


@cache
def help_of(*words: str) -> str:
    """What `minrnn WORDS --help` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return output.getvalue()


def subcommand(words: list[str]) -> tuple[str, ...]:
    """The words that name the command whose help lists the options."""
    if words[0] in ("bench", "figures") or words[:2] in (["data", "show"], ["tokenizer", "train"]):
        return tuple(words[:2])
    return (words[0],)


def errors_of(command: Command) -> str | None:
    """Why a command does not parse, or None."""
    words, recipe = command.words, command.recipe_words
    if recipe is not None:
        name, _ = parse_arguments(recipe) if "--help" not in recipe else ("quickstart", {})
        if name in shipped_recipes() and "--help" not in recipe:
            read_recipe(recipe)
        return None if name else "names no recipe"
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+)(?:[ :])", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
        setups = re.findall(r"setup-\w+", (REPOSITORY / "Makefile").read_text())
        unknown = {word for word in words[1:] if "=" not in word} - {*targets, *setups}
        return f"no target {unknown}" if unknown else None
    if words[0] != "minrnn":
        known = ("accelerate", "git", "hf", "lm_eval", "pip", "sbatch", "source", "tensorboard", "torchrun")
        return None if words[0] in known else f"unknown command {words[0]}"
    if words[1] not in ("train", "export", *MODULES):
        return f"unknown command {words[1]}"
    text = help_of(*subcommand(words[1:]))
    options = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
    settings = {option for option in options if "." in option}
    unknown = {o for o in options - settings if not re.search(rf"(?<![\w-]){o}(?![\w-])", text)}
    return f"unknown options {unknown}" if unknown and words[1] != "lm-eval" else None


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_parse(page: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    assert [(c.words, error) for c in commands(page) if (error := errors_of(c)) is not None] == []


def test_a_wrong_command_does_not_parse():
    for line in ("minrnn plan --procesess 4", "minrnn trian", "make settup", "rm x"):
        command = command_of("README.md", line)
        assert command is not None
        assert errors_of(command)
    command = command_of("README.md", "minrnn train --config quickstart --batch.lane 3")
    assert command is not None
    with pytest.raises(UserError, match=r"did you mean batch\.lanes"):
        errors_of(command)
