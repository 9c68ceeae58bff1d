"""The vLLM that 'compile-sparse runtime install vllm' registered, and small models for it.

vLLM lives in an interpreter of its own; ``make test`` installs it. Where none is registered these tests are skipped, and say so.
Models have heads of 64 elements, because vLLM's CPU attention takes no small ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from compile_sparse.compiler.runtimes.environments import RuntimeRecord, find_runtime, runtimes_folder
from tests.random_weights import randomised

_RUNTIMES = runtimes_folder()  # before any test moves the cache
NEEDED = "no vLLM is registered: run 'compile-sparse runtime install vllm'"


@pytest.fixture(scope="session", autouse=True)
def registered_runtimes() -> Iterator[None]:
    """Keep to the user's runtimes whatever cache a test uses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPILE_SPARSE_RUNTIMES", str(_RUNTIMES))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def runtime(registered_runtimes: None) -> RuntimeRecord:
    """The registered vLLM; the test is skipped where there is none, unless ``COMPILE_SPARSE_REQUIRE_VLLM`` is set."""
    found = find_runtime("vllm")
    if found is None or found.problem:
        if os.environ.get("COMPILE_SPARSE_REQUIRE_VLLM"):
            pytest.fail(NEEDED)
        pytest.skip(NEEDED)
    return found


def small_config(**changes: Any) -> hf.LlamaConfig:
    """Four layers, four heads of 64 in two groups; all sizes that must not be confused differ."""
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 320,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return hf.LlamaConfig(**{**sizes, **changes})


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama folder in bf16."""
    folder = tmp_path_factory.mktemp("llama")
    randomised(hf.LlamaForCausalLM(small_config())).to(torch.bfloat16).save_pretrained(folder)
    return folder
