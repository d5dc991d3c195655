"""The package: a wheel that runs train.py as the command `fullft`, with all files that it needs, each once."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from fork_server import ROOT


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_file)


def test_wheel_ships_train_py_once(wheel: zipfile.ZipFile) -> None:
    shipped = [name for name in wheel.namelist() if Path(name).name == "train.py"]
    assert shipped == ["fullft/train.py"]
    assert wheel.read("fullft/train.py") == (ROOT / "train.py").read_bytes()


def test_wheel_ships_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    tracked = subprocess.run(["git", "ls-files", "fullft"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert set(tracked.stdout.split()) <= set(wheel.namelist())
    assert {"fullft/py.typed", "fullft/demo/demo.yaml", "fullft/demo/model/tokenizer.json"} <= set(wheel.namelist())


def test_wheel_declares_the_command(wheel: zipfile.ZipFile) -> None:
    (entries,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "fullft = fullft.__main__:main" in wheel.read(entries).decode()


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [(["--help"], 0, "usage: fullft [--config run.yaml]"), (["--modell", "x"], 2, "--model")],
)
def test_wheel_runs_outside_the_checkout(
    wheel: zipfile.ZipFile, tmp_path: Path, words: list[str], code: int, shown: str
) -> None:
    wheel.extractall(tmp_path / "installed")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    where = "import fullft; print(fullft.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(tmp_path))  # the wheel's package, not the checkout's
    done = subprocess.run(
        [sys.executable, "-m", "fullft", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code
    assert shown in done.stdout + done.stderr


@pytest.mark.slow
def test_installed_command_plans_and_trains(wheel_file: Path, tmp_path: Path) -> None:
    """The wheel lies alone in an environment of its own; all that it needs is taken from this one."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    folder, bin_folder = tmp_path / "empty", tmp_path / "venv" / "bin"
    folder.mkdir()

    def run(*words: str | Path) -> str:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(bin_folder / "pip", "install", "--quiet", "--no-index", "--no-deps", wheel_file)
    site = Path(run(bin_folder / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "needs.pth").write_text(sysconfig.get_path("purelib"))
    imported = run(bin_folder / "python", "-c", "import fullft; print(fullft.__file__)")
    assert imported.strip() == str(site / "fullft" / "__init__.py")  # not the checkout's
    planned = json.loads(run(bin_folder / "fullft", "--plan", "--json"))
    assert planned["peak_bytes"] > 0 and list(folder.iterdir()) == []
    run(bin_folder / "fullft", "--max_steps", "1")
    assert (folder / "full-ft-demo" / "model.safetensors").is_file()
