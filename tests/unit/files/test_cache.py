"""The cache: keyed by content, verified on read, rebuilt when corrupt, private."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.files.cache import Cache, cache_key


def _builder(calls, text="content"):
    def build(folder):
        calls.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "data").write_text(text)

    return build


def test_built_once_then_reused(tmp_path):
    cache, calls = Cache(tmp_path / "c"), []
    key = cache_key({"model": "digest", "target": "null"})
    first = cache.get_or_build(key, _builder(calls))
    second = Cache(tmp_path / "c").get_or_build(key, _builder(calls))
    assert first == second
    assert (first / "sub" / "data").read_text() == "content"
    assert len(calls) == 1


def test_key_is_content_not_order_and_not_name():
    assert cache_key({"a": 1, "b": [1, 2]}) == cache_key({"b": [1, 2], "a": 1})
    # Two models with the same name and recipe must not share an entry.
    assert cache_key({"name": "m", "digest": "1"}) != cache_key({"name": "m", "digest": "2"})
    with pytest.raises(ValueError, match="Out of range"):
        cache_key({"a": float("nan")})


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "add", "link", "record", "no-record"])
def test_corrupt_entries_are_rebuilt(tmp_path, damage):
    cache, calls = Cache(tmp_path / "c"), []
    entry = cache.get_or_build("k", _builder(calls))
    data = entry / "sub" / "data"
    if damage == "change":
        data.write_text("CONTENT")
    elif damage == "truncate":
        data.write_text("")
    elif damage == "remove":
        data.unlink()
    elif damage == "add":
        (entry / "modeling.py").write_text("evil")
    elif damage == "link":
        data.unlink()
        data.symlink_to("/etc/hostname")
    elif damage == "record":
        (entry / ".entry.json").write_text("[]")
    else:
        (entry / ".entry.json").unlink()
    again = cache.get_or_build("k", _builder(calls))
    assert len(calls) == 2
    assert (again / "sub" / "data").read_text() == "content"
    assert not (again / "modeling.py").exists()


def test_a_failed_build_leaves_no_entry(tmp_path):
    cache = Cache(tmp_path / "c")

    def fail(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        cache.get_or_build("k", fail)
    assert not (tmp_path / "c" / "k").exists()
    assert not list((tmp_path / "c").glob("*building*"))
    assert (cache.get_or_build("k", _builder([])) / "sub" / "data").exists()


def test_leftovers_of_a_killed_build_are_removed(tmp_path):
    cache = Cache(tmp_path / "c")
    (tmp_path / "c" / "k.building-dead").mkdir()
    cache.get_or_build("k", _builder([]))
    assert not (tmp_path / "c" / "k.building-dead").exists()


def test_default_place_and_permissions(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPILE_SPARSE_CACHE", str(tmp_path / "mine"))
    cache = Cache()
    assert cache.root == tmp_path / "mine"
    assert stat.S_IMODE(cache.root.stat().st_mode) == 0o700
    cache.root.chmod(0o755)
    assert stat.S_IMODE(Cache().root.stat().st_mode) == 0o700


def test_foreign_and_impossible_folders(tmp_path, monkeypatch):
    (tmp_path / "c").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(EnvironmentFailure, match="CS5005"):
        Cache(tmp_path / "c")


def test_many_processes_build_once(tmp_path):
    script = """
import sys, time
from pathlib import Path
from compile_sparse.compiler.files.cache import Cache
root = Path(sys.argv[1])
def build(folder):
    with open(root.parent / "calls", "a") as file:
        file.write("x")
    time.sleep(0.2)
    (folder / "data").write_text("content")
print((Cache(root).get_or_build("k", build) / "data").read_text())
"""
    workers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [worker.communicate(timeout=60)[0].strip() for worker in workers] == ["content"] * 4
    assert (tmp_path / "calls").read_text() == "x"


def test_changed_source_is_another_identity(tmp_path, monkeypatch):
    """Whoever edits a pass and compiles again must not get what the old pass made."""
    from types import SimpleNamespace

    from compile_sparse.compiler import version

    real = version.code_identity.__wrapped__()
    assert real == version.code_identity.__wrapped__()
    (tmp_path / "a.py").write_text("x = 1")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(version, "find_spec", lambda name: spec)
    first = version.code_identity.__wrapped__()
    (tmp_path / "a.py").write_text("x = 2")
    assert version.code_identity.__wrapped__()["source"] != first["source"]
    assert real["source"] != first["source"]
