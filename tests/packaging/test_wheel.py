"""The wheel: one top-level name, every module, the data files, the entry points."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "compiler": "compile_sparse/compiler",
    "passes": "compile_sparse/passes",
    "backends": "compile_sparse/backends",
}


def _expected():
    """Wheel path of every Python and YAML file of the package folders."""
    for folder, prefix in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in (".py", ".yaml") or "__pycache__" in path.parts:
                continue
            name = path.relative_to(ROOT / folder).as_posix()
            yield name.replace("_root/", "compile_sparse/") if name.startswith("_root/") else f"{prefix}/{name}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder appears in the working tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_only_top_level_name_is_compile_sparse(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"compile_sparse"}


def test_every_module_and_data_file_is_in_it(wheel):
    missing = set(_expected()) - set(wheel.namelist())
    assert not missing, "a folder without __init__.py, or a data file that [tool.setuptools.package-data] does not name"


def test_every_entry_point_names_a_module_in_it(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["scripts"], *project["entry-points"].values()]
    names = set(wheel.namelist())
    for value in (value for group in groups for value in group.values()):
        module = value.split(":")[0].replace(".", "/")
        assert names & {f"{module}.py", f"{module}/__init__.py"}, value


def test_it_runs_from_the_wheel_alone(wheel, tmp_path):
    wheel.extractall(tmp_path)
    script = "import sys; sys.path.insert(0, sys.argv.pop(1)); sys.argv[0] = 'compile-sparse'\n"
    script += "import compile_sparse; print(compile_sparse.__file__)\n"
    script += "from compile_sparse.compiler.cli.main import main; main()"
    command = [sys.executable, "-c", script, str(tmp_path), "targets"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))


def test_type_checkers_see_the_same_tree():
    """``.typing`` holds links only: what mypy checks is what the wheel ships."""
    links = ROOT / ".typing" / "compile_sparse"
    root = {path.name for path in (ROOT / "compiler" / "_root").iterdir() if path.name != "__pycache__"}
    assert {path.name for path in links.iterdir()} == {*root, *FOLDERS}
    for path in links.iterdir():
        assert path.is_symlink()
        assert path.exists()
