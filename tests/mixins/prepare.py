"""Make transformers' own model tests importable: `python tests/mixins/prepare.py FOLDER`.

Downloads the source distribution of the installed version. It holds `tests/test_*.py`, but not the folders
that these import from (generation/, exporters/, utils/). Empty classes stand in for those, so their tests are
not run.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

STAND_INS = {
    "__init__.py": "",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def main() -> None:
    """Download once for each version, and unpack."""
    version, folder = transformers.__version__, Path(sys.argv[1])
    archive = folder / f"transformers-{version}.tar.gz"
    if not archive.exists():
        download = [
            "download",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
            "--dest",
            str(folder),
        ]
        subprocess.run([sys.executable, "-m", "pip", *download, f"transformers=={version}"], check=True)
    tests = folder / "tests"
    tests.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as source:
        prefix = f"transformers-{version}/tests/"
        for member in source.getmembers():
            if member.isfile() and member.name.startswith(prefix):
                content = source.extractfile(member)
                assert content is not None
                (tests / member.name.removeprefix(prefix)).write_bytes(content.read())
    for name, text in STAND_INS.items():
        (tests / name).parent.mkdir(exist_ok=True)
        (tests / name).write_text(text)


if __name__ == "__main__":
    main()
