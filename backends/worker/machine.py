"""What the machine gives and the process takes: bandwidth of memory, resident bytes."""

from __future__ import annotations

import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

__all__ = ["read_bandwidth", "resident_bytes"]

_PROBE_BYTES = 256 << 20


def resident_bytes(kind: Literal["VmRSS", "VmHWM"]) -> int:
    """Memory now or at its peak, from /proc, whose peak starts anew with this program (getrusage inherits the parent's)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(kind + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_bandwidth(threads: int) -> float:
    """Bytes per second: the best of several reads of an array much larger than any cache."""
    values = np.ones(_PROBE_BYTES // 8, np.int64)
    parts = np.array_split(values, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - began)
    return values.nbytes / best
