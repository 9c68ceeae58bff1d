"""The GPU here, as the driver tells it; asks no framework, so that it takes no memory there."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

__all__ = ["Gpu", "find_gpu"]

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """The first GPU that CUDA would use.

    Attributes:
        name: such as 'NVIDIA A100-SXM4-80GB'.
        compute_capability: such as '8.0'.
    """

    name: str
    compute_capability: str


def find_gpu() -> Gpu | None:
    """The GPU here, or None without one or its driver. Never raises. On a machine with a GPU this was never run."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, _NAME_BYTES, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    if failed:
        return None
    return Gpu(name.value.decode("utf-8", "replace"), f"{major.value}.{minor.value}")
