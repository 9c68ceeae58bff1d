"""Runtimes that do not exist, registered for a test."""

from __future__ import annotations

import sys
from typing import Any

from compile_sparse.compiler.runtimes.environments import RuntimeRecord, write_record


def record(
    facts: dict[str, Any], *, version: str = "0.32.0", device: str = "cpu", python: str = sys.executable
) -> None:
    """Register a vLLM that does not exist."""
    write_record(
        RuntimeRecord.model_validate(
            {
                "name": "vllm",
                "python": python,
                "managed": False,
                "device": device,
                "versions": {"vllm": version},
                "facts": facts,
                "checked_at": "2026-01-01T00:00:00+00:00",
            }
        )
    )
