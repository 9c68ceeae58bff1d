"""Fixtures every test folder may use. Captures are made once per session: they are the slow part."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

# Test helpers (tests.support, tests.toys) are imported by name from any folder, whatever pytest's import mode.
sys.path.insert(0, str(Path(__file__).parents[1]))

from compile_sparse.compiler.capture import capture_model, huggingface
from compile_sparse.compiler.ir.program import Program
from tests.support.distribution import TogetherScheduling, longest_first
from tests.support.exports import Exports
from tests.support.tiny_models import build_tiny

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    config.option.loadscopereorder = False  # keep our order
    return TogetherScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def exports(pytestconfig: pytest.Config) -> Iterator[Exports]:
    """``torch.export`` remembers what it made of a model, in this process, the other one and the next run."""
    assert pytestconfig.cache is not None
    found = Exports(Path(pytestconfig.cache.mkdir("exports")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "_export", found.export)
        yield found


@pytest.fixture(scope="session")
def captured() -> Callable[[str], Program]:
    """Program of the tiny model called ``name`` (see ``tests.support.tiny_models``), captured on first use."""

    @cache
    def program_of(name: str) -> Program:
        return capture_model(build_tiny(name))

    return program_of


@pytest.fixture(scope="session")
def tiny_llama_program(captured: Callable[[str], Program]) -> Program:
    """Two-layer Llama with grouped-query attention and a key-value cache."""
    return captured("llama")


@pytest.fixture(scope="session")
def tiny_gpt2_program(captured: Callable[[str], Program]) -> Program:
    """Two-layer GPT-2: fused query, key and value, ``[in, out]`` weights, learned positions."""
    return captured("gpt2")


@pytest.fixture(scope="session")
def tiny_bert_program(captured: Callable[[str], Program]) -> Program:
    """Two-layer BERT encoder."""
    return captured("bert")
