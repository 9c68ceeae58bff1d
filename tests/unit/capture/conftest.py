"""Model folders as save_pretrained writes them, and programs captured from them: each made once per session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.ir.program import Program
from compile_sparse.testing.models import build_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny model called ``name``. Do not write into it: take ``copy_of``."""

    @cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp("saved") / name
        build_model(name).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def copy_of(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder of one's own to damage."""
    return lambda name: Path(shutil.copytree(saved(name), tmp_path / name))


@pytest.fixture(scope="session")
def from_disk(saved: Callable[[str], Path]) -> Callable[[str], Program]:
    """Program of the tiny model called ``name``, captured from its folder."""
    return cache(lambda name: capture(open_folder(saved(name))))
