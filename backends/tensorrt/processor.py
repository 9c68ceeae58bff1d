"""What is here of what a TensorRT target needs."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from compile_sparse.backends.tensorrt.engine.engines import Here
from compile_sparse.backends.tensorrt.engine.gpu import Gpu, find_gpu
from compile_sparse.compiler.extension.backend_contract import Probe
from compile_sparse.compiler.targets.target import Target
from compile_sparse.compiler.version_numbers import older

__all__ = ["here", "installed_builders", "other_gpu", "probe_runtime", "reference_version"]

_RUNTIME = "tensorrt"
# One wheel per CUDA version provides the same module.
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}


def installed_builders() -> dict[str, str]:
    """Version of each builder whose Python module is here; loads none of them."""
    found = {}
    for module, distributions in _DISTRIBUTIONS.items():
        if find_spec(module) is None:
            continue
        for name in distributions:
            try:
                found[module] = version(name)
            except PackageNotFoundError:
                continue
            break
        else:
            found[module] = "unknown"
    return found


def here() -> Here:
    """The builders and the GPU of this machine."""
    gpu = find_gpu() or Gpu("", "")
    return Here(installed_builders(), gpu.name, gpu.compute_capability)


def probe_runtime(target: Target) -> Probe:
    """Whether TensorRT and the target's GPU are here, or why not. Never raises.

    TensorRT-RTX does not count: it is a builder that needs no GPU, and another runtime.
    """
    hint = "pip install 'compile-sparse[tensorrt]'"
    found = installed_builders().get(_RUNTIME)
    if found is None:
        return Probe(False, _RUNTIME, why_not="The package tensorrt is not installed.", hint=hint)
    wanted = target.minimum_versions.get(_RUNTIME, "0")
    if older(found, wanted):
        why = f"TensorRT {found} is older than {wanted}, which this target needs."
        return Probe(False, _RUNTIME, found, why_not=why, hint=f"{hint} --upgrade")
    gpu = find_gpu()
    if why := other_gpu(gpu, target):
        return Probe(False, _RUNTIME, found, why_not=why, hint=f"Run this on a machine with an NVIDIA {target.gpu}.")
    if not _torch_has_cuda():
        why = "torch was installed without CUDA, and engines run on its buffers."
        return Probe(False, _RUNTIME, found, why_not=why, hint="Install the CUDA build of torch.")
    identity = f"{gpu.name} {gpu.compute_capability}" if gpu else ""
    return Probe(True, _RUNTIME, found, target.device, processor=identity)


def other_gpu(gpu: Gpu | None, target: Target) -> str:
    """Why ``gpu`` is not the target's, as a sentence, or an empty string."""
    if gpu is None:
        return f"There is no GPU here; the target is an NVIDIA {target.gpu} (compute capability {target.compute_capability})."
    if gpu.compute_capability != target.compute_capability:
        return (
            f"{gpu.name} has compute capability {gpu.compute_capability}, the target {target.compute_capability}; nothing "
            "was measured there."
        )
    if target.gpu and not re.search(rf"\b{re.escape(target.gpu)}\b", gpu.name):
        return f"The target is an {target.gpu}, the GPU here is called {gpu.name!r}; nothing was measured there."
    return ""


def reference_version() -> str:
    """Version of ONNX Runtime, which can run the emitted graph on a processor; empty when a package for that is missing."""
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        return ""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def _torch_has_cuda() -> bool:
    try:
        import torch

        return bool(torch.cuda.is_available())
    except (ImportError, OSError, RuntimeError):
        return False
