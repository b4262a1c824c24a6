"""The package's names: all can be imported, each from where it is written, and none before it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rerankq


def test_every_public_name_can_be_imported_and_is_listed():
    for name in rerankq.__all__:
        assert getattr(rerankq, name) is not None
        assert name in dir(rerankq)
    assert rerankq.Client.__module__ == "rerankq.client.blocking"


def test_names_for_type_checkers_are_the_names_at_run_time():
    tree = ast.parse(Path(rerankq.__file__).read_text())
    imported = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    del imported["import_module"]
    assert sorted([*imported, "__version__"]) == sorted(rerankq.__all__)
    for name, module in imported.items():
        assert getattr(rerankq, name) is getattr(sys.modules[f"rerankq.{module}"], name)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'rerankq' has no attribute 'Klient'"):
        rerankq.Klient  # noqa: B018


def test_modules_can_be_named_after_importing_the_package_alone():
    script = "import rerankq; print(rerankq.errors.JobDead.__name__, rerankq.client.__name__, rerankq.catalogue.find)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("JobDead rerankq.client <function find")
