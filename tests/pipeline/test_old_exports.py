"""Exports of earlier versions load, and exports say their format.

`exports/NAME.tar.xz` holds a tiny export as the named commit wrote it, code included, and the logits that
this commit computed in fp64 (expected.json: commit, format, ids, logits of the last position).
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minrnn.common.errors import UserError
from minrnn.data import byte_tokenizer
from minrnn.models import MinRNNConfig, MinRNNForCausalLM, TorchRNNConfig
from minrnn.models.export_format import EXPORT_FORMAT, check_export_format
from minrnn.pipeline.export import export_model
from minrnn.pipeline.loading import read_model
from minrnn.pipeline.recipe import build_recipe, resolved_config

ARCHIVES = sorted((Path(__file__).parent / "exports").glob("*.tar.xz"))


def extract(archive: Path, folder: Path) -> dict:
    """Extract an archive; returns expected.json."""
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return json.loads((folder / "expected.json").read_text())


def test_every_format_has_an_export(tmp_path: Path):
    formats = set()
    for archive in ARCHIVES:
        folder = tmp_path / archive.name
        expected = extract(archive, folder)
        config = json.loads((folder / "model" / "config.json").read_text())
        assert config.get("export_format", 1) == expected["format"]
        assert archive.stat().st_size < 200_000
        formats.add(expected["format"])
    assert formats == set(range(1, EXPORT_FORMAT + 1))


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def test_exports_of_earlier_versions_give_the_same_logits(archive: Path, tmp_path: Path):
    expected = extract(archive, tmp_path)
    model, tokenizer = read_model(str(tmp_path / "model"))
    assert tokenizer("the state of a lane")["input_ids"] == expected["ids"]
    with torch.no_grad():
        logits = model.double()(torch.tensor([expected["ids"]])).logits[0, -1]
    np.testing.assert_allclose(logits.tolist(), expected["logits"], rtol=1e-9, atol=1e-12)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    config = MinRNNConfig(hidden_size=8, num_hidden_layers=1, intermediate_size=0, bos_token_id=0)
    recipe = resolved_config(build_recipe({}))
    export_model(MinRNNForCausalLM(config), byte_tokenizer(), tmp_path / "model", recipe, tokens=0)
    return tmp_path / "model"


def test_an_export_says_its_format(export: Path):
    assert json.loads((export / "config.json").read_text())["export_format"] == EXPORT_FORMAT
    model, _ = read_model(str(export))
    model.save_pretrained(export.parent / "again")  # as a trainer of another library does
    assert json.loads((export.parent / "again" / "config.json").read_text())["export_format"] == EXPORT_FORMAT


@pytest.mark.parametrize("value", [EXPORT_FORMAT + 1, 99, 0, "2", True])
def test_later_and_invalid_formats_are_refused(export: Path, value: object):
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "export_format": value}))
    with pytest.raises(UserError, match=r"MODEL: cannot load .*: export_format: "):
        read_model(str(export))
    with pytest.raises(ValueError, match=r"export_format: "):
        AutoModelForCausalLM.from_pretrained(export)
    AutoTokenizer.from_pretrained(export)


@pytest.mark.parametrize("config", [MinRNNConfig, TorchRNNConfig])
def test_both_configurations_check_the_format(config: type):
    assert config(export_format=1).export_format == 1
    with pytest.raises(ValueError, match="this version of minrnn reads up to"):
        config(export_format=EXPORT_FORMAT + 1)


def test_no_format_is_the_first():
    check_export_format(None)
