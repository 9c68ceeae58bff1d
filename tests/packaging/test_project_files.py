"""Files that a project is judged by: they exist, agree with each other, and leak nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_constraints_pin_every_dependency_we_declare():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *project["optional-dependencies"]["ort"],
        *project["optional-dependencies"]["dev"],
    ]
    lines = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins), "names and versions only"
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    wanted = {re.split(r"[<>=~!\[]", name)[0].strip().lower().replace("_", "-") for name in declared}
    assert wanted <= pinned


def test_license_and_changelog():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    from compile_sparse import __version__

    assert f"## {__version__}" in changelog


def examples(section: str, language: str = "python") -> list[str]:
    """Code blocks of one section of CONTRIBUTING, as written."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {section}\n(.*?)(?=^## )", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(rf"```{language}\n(.*?)```", found, flags=re.DOTALL)


def run_tests(folder: Path) -> str:
    """What pytest says of the tests in ``folder``, whose modules and entry points are installed for it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_pass_in_contributing_works(tmp_path):
    """The example of 'write a pass' is extracted and run as written, with the test it comes with."""
    code, test = examples("Write a pass in 60 lines")
    assert len(code.splitlines()) <= 60
    (tmp_path / "clip_weights.py").write_text(code)
    (tmp_path / "test_clip_weights.py").write_text(test)
    more = "from clip_weights import ClipWeights\nfrom compile_sparse.testing import check_pass, tiny_program\n\n"
    more += "def test_it_keeps_the_contract():\n    check_pass(ClipWeights(), [tiny_program('bert')])\n"
    (tmp_path / "test_contract.py").write_text(more)
    _register(tmp_path, "clip-weights", {"passes": "clip-weights = clip_weights:ClipWeights"})
    assert "2 passed" in run_tests(tmp_path)


def test_the_backend_and_the_target_in_contributing_work(tmp_path):
    """A backend of two files and its target, installed as another package, keep the contracts, and compile from the shell."""
    backend, worker, test = examples("Write a backend of two files")
    (target,) = examples("Write a target", "yaml")
    (tmp_path / "onnx_reference_backend.py").write_text(backend)
    (tmp_path / "onnx_reference_worker.py").write_text(worker)
    (tmp_path / "onnx-reference-cpu.yaml").write_text(target)
    (tmp_path / "test_onnx_reference.py").write_text(test)
    registered = {
        "backends": "onnx-reference = onnx_reference_backend:OnnxReferenceBackend",
        "targets": "onnx-reference = onnx_reference_backend:targets",
    }
    _register(tmp_path, "onnx-reference", registered)
    assert "1 passed" in run_tests(tmp_path)


def _register(folder: Path, name: str, entries: dict[str, str]) -> None:
    """Entry points as ``pip install`` would leave them."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[compile_sparse.{group}]\n{entry}\n" for group, entry in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("target", ["venv", "lint", "test", "schema", "demo"])
def test_make_targets_exist(target):
    done = subprocess.run(["make", "-n", target], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
