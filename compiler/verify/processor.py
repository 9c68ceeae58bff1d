"""Which processor this is: kernels, and so what was found of them, follow from it."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

__all__ = ["processor_identity"]

_DECISIVE = ("model name", "flags", "Features")


def processor_identity() -> str:
    """Digest of the processor's name and instruction sets, as the kernel tells them; the architecture's name elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    facts = {key.strip(): value for key, _, value in (line.partition(":") for line in lines)}
    told = [facts[key] for key in _DECISIVE if key in facts]
    return hashlib.sha256("\n".join([platform.machine(), *told]).encode()).hexdigest()[:16]
