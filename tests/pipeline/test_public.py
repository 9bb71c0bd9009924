"""Published recipes contain no credentials and no paths of this machine."""

import pytest

from minrnn.pipeline.public import public_config, public_value, text_without_credentials, without_credentials
from minrnn.pipeline.tracking_store import error_line

SECRET = "s3cret"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://user:s3cret@mlflow.org/path", "https://mlflow.org/path"),
        ("https://s3cret@mlflow.org:8080", "https://mlflow.org:8080"),
        ("https://mlflow.org/path?token=s3cret", "https://mlflow.org/path"),
        ("https://mlflow.org/path?token=a@s3cret", "https://mlflow.org/path"),
        ("https://mlflow.org/path#s3cret", "https://mlflow.org/path"),
        (
            "postgresql+psycopg2://user:s3cret@host:5432/db?password=s3cret",
            "postgresql+psycopg2://host:5432/db",
        ),
        ("postgresql://user:s3cret/x@host/db", "postgresql://host/db"),
        ("postgresql://user:a@s3cret/x@host/db", "postgresql://host/db"),
        ("mysql://:s3cret@host/db", "mysql://host/db"),
        ("hf://datasets/org/name@main/data.parquet", "hf://datasets/org/name@main/data.parquet"),
        ("sqlite:////home/me/mlflow.db?timeout=3", "sqlite:////home/me/mlflow.db?timeout=3"),
        ("HuggingFaceFW/fineweb-edu", "HuggingFaceFW/fineweb-edu"),
    ],
)
def test_a_uri_loses_its_credentials_only(uri: str, shown: str):
    assert without_credentials(uri) == shown
    assert (
        text_without_credentials(f"cannot reach {uri} (and '{uri}')", uri)
        == f"cannot reach {shown} (and '{shown}')"
    )


@pytest.mark.parametrize(
    "uri", ["postgresql://user:s3cret?x@host/db", "https://host:80/p?token=s3cret@b", "x://u:a#s3cret@h"]
)
def test_ambiguous_passwords_hide_the_whole_uri(uri: str):
    assert SECRET not in without_credentials(uri)
    assert SECRET not in text_without_credentials(f"failed: {uri}", uri)


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("/home/me/corpus/words.jsonl", "words.jsonl"),
        ("/home/me/corpus/", "corpus"),
        ("/home/me/*/part-*.parquet", "part-*.parquet"),
        ("../../me/words.jsonl", "words.jsonl"),
        ("~/words.jsonl", "words.jsonl"),
        ("C:\\Users\\me\\words.jsonl", "words.jsonl"),
        ("sqlite:////home/me/mlflow.db?timeout=3", "sqlite:///mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("file:///home/me/mlruns", "file:///mlruns"),
        ("file:/home/me/mlruns", "mlruns"),
        ("runs/quickstart", "runs/quickstart"),
        ("org/name", "org/name"),
        ("python-stdlib", "python-stdlib"),
        ("s3://bucket/words.jsonl", "s3://bucket/words.jsonl"),
    ],
)
def test_local_paths_are_reduced_to_their_last_part(value: str, published: str):
    assert public_value(value) == published


def test_every_text_of_a_config_except_prompts_is_made_public():
    config = {
        "data": {
            "corpus": "/home/me/a.txt",
            "task": {"file": "/home/me/b.txt", "length": 3},
            "split": "train",
        },
        "run": {"change": ["/home/me/c.txt"], "seed": 0},
        "train": {"prompts": ["/* a comment */", "https://x.org?y"]},
    }
    assert public_config(config) == {
        "data": {"corpus": "a.txt", "task": {"file": "b.txt", "length": 3}, "split": "train"},
        "run": {"change": ["c.txt"], "seed": 0},
        "train": {"prompts": ["/* a comment */", "https://x.org?y"]},
    }


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:s3cret@host:5000/path",
        "https://host/path?token=s3cret",
        "https://me:a%40s3cret@host/?token=s3cret#s3cret",
    ],
)
@pytest.mark.parametrize("num_spaces", [0, 270, 280, 290])
def test_an_error_names_no_part_of_a_secret(uri: str, num_spaces: int):
    """However the client writes the URI, and wherever the message is cut."""
    rest = uri.split("://")[1]
    message = f"{' ' * num_spaces}x retries of {uri}, {rest}, url: {rest.partition('/')[2]} a@s3cret"
    line = error_line(OSError(message), uri)
    assert not any(part in line for part in ("s3cret", "s3cre", "s3c"))
    assert line.startswith("OSError: ")
    assert len(line) < 320
