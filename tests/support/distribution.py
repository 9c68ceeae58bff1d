"""Which process runs what: whole files, whole folders where tests share one costly artifact, and the longest first.

xdist hands files to whichever process is free. Handed out by number of tests, as it does by itself, the few tests that start vLLM
come last, and one process waits for the other.
"""

from __future__ import annotations

from collections import Counter

import pytest
from xdist.scheduler import LoadFileScheduling

__all__ = ["TogetherScheduling", "longest_first"]

LONGEST = (
    "tests/real/test_real_models.py",
    "tests/vllm/test_fidelity.py",
    "tests/onnxruntime/end_to_end",
    "tests/vllm/test_end_to_end.py",
    "tests/vllm/test_layouts.py",
    "tests/tensorrt/test_end_to_end.py",
    "tests/tensorrt/test_lowering.py",
    "tests/tensorrt/test_unified_in_vllm.py",
    "tests/unit/axes/test_scale.py",
    "tests/unit/passes/test_verified_pipeline.py",
    "tests/unit/axes/test_models.py",
)
"""What takes longest, in this order: minutes to half a minute each."""


def unit_of(nodeid: str) -> str:
    """The file of a test, or the folder that stays together."""
    file = nodeid.split("::", 1)[0]
    folder = file.rpartition("/")[0]
    return folder if folder.endswith("/end_to_end") else file


class TogetherScheduling(LoadFileScheduling):
    """Hands out ``unit_of`` in the order of collection."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


def longest_first(items: list[pytest.Item]) -> None:
    """Sort tests: ``LONGEST``, then files with many tests, and within a unit as they were."""
    tests = Counter(unit_of(item.nodeid) for item in items)
    place = {unit: number for number, unit in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(unit := unit_of(item.nodeid), len(LONGEST)), -tests[unit], unit))
