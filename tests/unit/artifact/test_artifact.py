"""Artifacts: old, none or complete, whatever happens; and nothing is read that the manifest does not vouch for."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compile_sparse.compiler.artifact import staging as staging_module
from compile_sparse.compiler.artifact.manifest import Manifest, Source, Tool, is_contained
from compile_sparse.compiler.artifact.reader import Staging, read_artifact, replace_report
from compile_sparse.compiler.errors import EnvironmentFailure, UsageError

KEY = "ab" * 32


def _manifest(files):
    return Manifest(
        tool=Tool(version="0"), source=Source(name="m", digest="0" * 64), recipe={}, target="null", files=files
    )


def _build(out, content="new", *, key=KEY, force=False):
    with Staging(out, key=key, force=force) as staging:
        (staging.fresh("model") / "weights.bin").write_text(content)
        staging.write("report.json", json.dumps({"content": content}))
        staging.publish(_manifest)


def test_published_artifact_is_complete_and_nothing_else_is_left(tmp_path):
    _build(tmp_path / "out")
    artifact = read_artifact(tmp_path / "out")
    assert sorted(artifact.manifest.files) == ["model/weights.bin", "report.json"]
    assert artifact.manifest.files["model/weights.bin"].bytes == 3
    assert artifact.report == {"content": "new"}
    assert (artifact.model / "weights.bin").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_known_digests_are_taken_over(tmp_path, monkeypatch):
    with Staging(tmp_path / "out", key=KEY) as staging:
        (staging.fresh("model") / "w").write_text("x")
        staging.publish(_manifest, known={"model/w": "1" * 64})
    with pytest.raises(UsageError, match="sha256"):
        read_artifact(tmp_path / "out")
    read_artifact(tmp_path / "out", verify_digests=False)


def test_existing_artifact_needs_force(tmp_path):
    _build(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="CS1020"):
        _build(tmp_path / "out")
    assert read_artifact(tmp_path / "out").report == {"content": "old"}
    _build(tmp_path / "out", "new", force=True)
    assert read_artifact(tmp_path / "out").report == {"content": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_never_deletes_what_is_not_an_artifact(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="not replaced"):
        _build(tmp_path / "home", force=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years"
    (tmp_path / "empty").mkdir()
    _build(tmp_path / "empty")


def test_same_key_resumes_and_other_keys_do_not(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), Staging(out, key=KEY) as staging:
        (staging.fresh("model") / "w").write_text("x")
        staging.complete("lowered", {"form": "dense"})
        (staging.folder / "half-written").write_text("later stage")
        raise KeyboardInterrupt
    assert not out.exists()
    with Staging(out, key="cd" * 32) as other:
        assert other.completed("lowered") is None
    with Staging(out, key=KEY) as staging:
        assert staging.completed("lowered") == {"form": "dense"}
        assert staging.completed("measured") is None
        staging.publish(_manifest)
    assert sorted(read_artifact(out).manifest.files) == ["model/w"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the other key's leftovers too


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "link", "record"])
def test_a_damaged_stage_is_not_reused(tmp_path, damage):
    with Staging(tmp_path / "out", key=KEY) as staging:
        weights = staging.fresh("model") / "w"
        weights.write_text("x")
        staging.complete("lowered")
    if damage == "change":
        weights.write_text("y")
    elif damage == "truncate":
        weights.write_text("")
    elif damage == "remove":
        weights.unlink()
    elif damage == "link":
        weights.unlink()
        weights.symlink_to("/etc/hostname")
    else:
        (staging.root / "stages.json").write_text("{")
    with Staging(tmp_path / "out", key=KEY) as staging:
        assert staging.completed("lowered") is None


def test_two_builds_of_one_command_do_not_mix(tmp_path):
    with Staging(tmp_path / "out", key=KEY), pytest.raises(EnvironmentFailure, match="CS5004"):
        Staging(tmp_path / "out", key=KEY).__enter__()


def test_a_running_build_with_another_key_is_left_alone(tmp_path):
    with Staging(tmp_path / "out", key="cd" * 32) as running:
        (running.fresh("model") / "w").write_text("precious")
        _build(tmp_path / "out")
        assert (running.folder / "model" / "w").read_text() == "precious"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_disk_errors_are_environment_failures(tmp_path, monkeypatch, number):
    def fail(*args):
        raise OSError(number, os.strerror(number), "/somewhere")

    with pytest.raises(EnvironmentFailure, match="CS5003"), Staging(tmp_path / "out", key=KEY):
        fail()
    monkeypatch.setattr(staging_module.os, "rename", fail)
    with pytest.raises(EnvironmentFailure, match="CS5003"):
        _build(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_os_errors_stay_themselves(tmp_path):
    with pytest.raises(FileNotFoundError), Staging(tmp_path / "out", key=KEY):
        (tmp_path / "missing").read_text()


def test_report_can_be_replaced(tmp_path):
    _build(tmp_path / "out")
    replaced = replace_report(read_artifact(tmp_path / "out"), '{"content": "again"}')
    assert replaced.report == {"content": "again"}
    assert read_artifact(tmp_path / "out").report == {"content": "again"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["/a", "../a", "a/../b", "a\\b", "C:a", "", ".", "a//b", "./a", "a/", "a\0"])
def test_escaping_names(name):
    assert not is_contained(name)


def test_ordinary_names():
    assert is_contained("model/a-b.c/weights.bin")


_KILLED = """
import os, signal, sys, shutil
fault, out = int(sys.argv[1]), sys.argv[2]
count = 0
def counted(function):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == fault:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
import json
from compile_sparse.compiler.artifact.reader import Staging
from compile_sparse.compiler.artifact.manifest import Manifest, Source, Tool
from compile_sparse.compiler.files import durable
from compile_sparse.compiler.artifact import staging
for name in ("fsync", "rename", "replace"):
    setattr(os, name, counted(getattr(os, name)))
staging.shutil.rmtree = counted(shutil.rmtree)
def manifest(files):
    return Manifest(tool=Tool(version="0"), source=Source(name="m", digest="0" * 64), recipe={}, target="null", files=files)
with Staging(out, key="ab" * 32, force=True) as s:
    resumed = s.completed("lowered")
    if resumed is None:
        folder = s.fresh("model")
        for name in "abc":
            (folder / name).write_text("new" + name)
        s.complete("lowered", {})
    s.write("report.json", json.dumps({"content": "new"}))
    s.publish(manifest)
print("points", count)
"""


def _run_killed(fault, out):
    command = [sys.executable, "-c", _KILLED, str(fault), str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def _state(out):
    """'none', 'old' or 'new'; anything half-done raises."""
    try:
        return read_artifact(out).report["content"]
    except UsageError as error:
        assert error.code == "CS1021"
        assert not out.exists()
        return "none"


@pytest.mark.parametrize("existing", [False, True])
def test_killed_at_any_point(tmp_path, existing):
    """SIGKILL before an fsync, rename, replace or removal, sampled over a run and all of its end.

    Afterwards ``out`` is old, absent or the complete new one, and running the command again gives the new one and leaves
    nothing beside it.
    """

    def prepared(name):
        out = tmp_path / name / "out"
        out.parent.mkdir()
        if existing:
            _build(out, "old")
        return out

    whole = _run_killed(0, prepared("whole"))
    points = int(whole.stdout.split()[-1])
    assert points >= 20
    chosen = sorted({1, *range(2, points, max(1, points // 6)), *range(points - 5, points + 1)})
    seen = set()
    for fault in chosen:
        out = prepared(f"fault-{fault}")
        killed = _run_killed(fault, out)
        assert killed.returncode == -9, killed.stderr
        seen.add(_state(out))
        again = _run_killed(0, out)
        assert again.returncode == 0, again.stderr
        assert _state(out) == "new"
        assert [path.name for path in out.parent.iterdir()] == ["out"], fault
    assert seen == ({"old", "new"} if existing else {"none", "new"})


def test_artifact_that_was_moved_aside_comes_back(tmp_path):
    """Killed between the two renames, and then a different command is run that fails: the old artifact is there again."""
    out = tmp_path / "out"
    _build(out, "old")
    out.rename(tmp_path / ".out.old-0123456789abcdef")
    with pytest.raises(UsageError, match="CS1020"):
        _build(out, "new")
    assert read_artifact(out).report == {"content": "old"}


def test_paths_are_not_patterns(tmp_path):
    out = Path(tmp_path / "we[i]rd*")
    _build(out, "old")
    _build(out, "new", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["we[i]rd*"]


def test_a_manifest_of_something_else_or_an_added_file_protects_a_folder(tmp_path):
    foreign = tmp_path / "project"
    (foreign / "src").mkdir(parents=True)
    (foreign / "manifest.json").write_text('{"name": "a browser extension", "manifest_version": 3}')
    (foreign / "src" / "code.txt").write_text("precious")
    with pytest.raises(UsageError, match="CS1020"):
        _build(foreign, "new", force=True)
    ours = tmp_path / "out"
    _build(ours, "old")
    (ours / "notes.txt").write_text("added by a person")
    with pytest.raises(UsageError, match="CS1020"):
        _build(ours, "new", force=True)
    assert (foreign / "src" / "code.txt").read_text() == "precious"
    assert (ours / "notes.txt").exists()
