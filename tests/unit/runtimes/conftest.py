"""A folder of runtimes and a folder of wheels of one's own."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from compile_sparse.compiler.runtimes import environments as runtimes
from tests.unit.runtimes.toy_runtime import CHECK, REQUIRES, ToyRuntime, wheel


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPILE_SPARSE_RUNTIMES", str(tmp_path / "runtimes"))
    return tmp_path / "runtimes"


@pytest.fixture
def wheels(tmp_path, monkeypatch, folder):
    """Where pip looks; ``toy`` is there, what it requires is not."""
    (tmp_path / "check.py").write_text(CHECK)
    monkeypatch.setattr(ToyRuntime, "check_script", tmp_path / "check.py")
    entry = SimpleNamespace(name="toy", load=lambda: ToyRuntime)
    monkeypatch.setattr(runtimes, "entry_points", lambda group: [entry])
    (tmp_path / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {tmp_path / 'wheels'}\n")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    (tmp_path / "none.txt").write_text("")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "none.txt"))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))  # must not divert
    wheel(tmp_path / "wheels", "toy", requires=REQUIRES)
    return tmp_path / "wheels"
