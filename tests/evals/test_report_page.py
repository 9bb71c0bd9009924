"""The HTML page of a report is one well-formed file."""

import base64
import re
from pathlib import Path

import pytest
from report_helpers import Page, make_results, make_run, report


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return make_results(tmp_path)


def test_the_html_is_a_single_well_formed_file(results: Path, tmp_path: Path):
    make_run(tmp_path / "a<b>_c|d", "quickstart", 0, losses=[2.0, 1.5], data__corpus="text/<i>`x`|*y*.jsonl")
    markdown = report(results, tmp_path / "a<b>_c|d", out=tmp_path / "out")
    content = (tmp_path / "out" / "report.html").read_text()
    html_page = Page(content)
    tables = markdown.count("\n| --- ") + markdown.count("\n|---")
    assert len(html_page.widths) == tables
    assert all(len(set(widths)) == 1 and len(widths) > 1 for widths in html_page.widths)
    pictures = re.findall(r"^!\[.*\]\((.*)\)$", markdown, flags=re.MULTILINE)
    assert len(html_page.images) == len(pictures) == 4
    for source, picture in zip(html_page.images, pictures, strict=True):
        kind, _, encoded = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(encoded) == (tmp_path / "out" / picture).read_bytes()
    inner = {link.removeprefix("#") for link in html_page.links if link.startswith("#")}
    assert {"published", "bucketjson"} <= inner <= set(html_page.ids)
    assert len(html_page.ids) == len(set(html_page.ids))
    assert "<i>" not in content
    assert "text/&lt;i&gt;`x`|*y*.jsonl" in content
