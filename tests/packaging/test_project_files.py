"""Files that a project is judged by: they exist, agree with each other, and leak nothing."""

from __future__ import annotations

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


def test_the_pass_in_contributing_works(tmp_path):
    """The example of 'write a pass' is extracted and run as written, with the test it comes with."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code, test = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[:2]
    assert len(code.splitlines()) <= 60
    (tmp_path / "clip_weights.py").write_text(code)
    (tmp_path / "test_clip_weights.py").write_text(test)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("target", ["venv", "lint", "test", "schema", "demo"])
def test_make_targets_exist(target):
    done = subprocess.run(["make", "-n", target], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
