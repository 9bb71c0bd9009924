"""A wheel works in an environment that cannot see the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from local_hub import LocalHub

REPOSITORY = Path(__file__).parents[2]
NOT_COPIED = (".venv", ".git", "runs", "build", "__pycache__", "*.egg-info", "mlflow.db*")
DATA = {
    f"minrnn/{folder}/{path.name}"
    for folder, pattern in (
        ("launch/recipes", "*.yaml"),
        ("launch/sweeps", "*.yaml"),
        ("launch/ablations", "*.yaml"),
        ("launch/accelerate", "*.yaml"),
        ("launch/slurm", "*.sbatch"),
        ("evals/report", "published.yaml"),
    )
    for path in (REPOSITORY / folder).glob(pattern)
} | {"minrnn/py.typed"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the checkout, since a build writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(*NOT_COPIED)
    shutil.copytree(REPOSITORY, folder / "copy", symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--wheel-dir", str(folder), str(folder / "copy")]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture
def environment(wheel: Path, tmp_path: Path) -> Path:
    """An environment with the wheel. The dependencies are those of this one: its .pth names their folder, and
    so does not read the .pth of the editable installation there."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    (Path(packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    subprocess.run([*command, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return folder


@pytest.mark.slow
def test_a_wheel_holds_the_files_that_commands_read_and_no_results(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {name for name in names if ".dist-info/" not in name}
    assert files >= DATA
    assert {name for name in files if not name.endswith(".py")} == DATA
    assert not [name for name in names if "results" in Path(name).parts or "figures" in Path(name).parts]
    assert all(name.startswith("minrnn/") for name in files)
    assert not [name for name in names if Path(name).name.startswith("test_")]


@pytest.mark.slow
def test_a_wheel_trains_generates_and_pushes_outside_the_checkout(environment: Path, tmp_path: Path):
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")}

    def run(program: str, *words: str) -> str:
        command = [str(environment / "bin" / program), *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    where, version = run("python", "-c", "import minrnn; print(minrnn.__file__, minrnn.__version__)").split()
    assert Path(where).is_relative_to(environment)
    assert version == "0.1.0"
    short = ("--train.steps", "20", "--data.validation_tokens", "2000", "--train.sample_tokens", "5")
    run("minrnn", "train", "--config", "quickstart", *short)
    prompt = ("--prompt", "def ", "--max-new-tokens", "5", "--temperature", "0")
    text = run("minrnn", "generate", "runs/quickstart", *prompt)
    assert text.startswith("def ")
    with LocalHub() as hub:
        variables |= hub.environment()
        assert "pushed to me/model, step 20" in run("minrnn", "push", "runs/quickstart", "--repo", "me/model")
        files = hub.files("me/model")
        assert {"model.safetensors", "modeling_minrnn.py", "README.md"} <= files.keys()
        assert json.loads(files["training/run.json"])["step"] == 20
        assert run("minrnn", "generate", "me/model", *prompt) == text
    assert "minrnn sweep" in run("minrnn", "--help")
    assert "parameters" in run("minrnn", "sweep", "demo", "--plan", "--tflops", "1")
