"""An artifact from somewhere else: every change is noticed before anything is loaded."""

from __future__ import annotations

import json
import os

import pytest

from compile_sparse.compiler.artifact.manifest import Manifest, Source, Tool
from compile_sparse.compiler.artifact.reader import Staging, read_artifact
from compile_sparse.compiler.errors import UsageError


@pytest.fixture
def folder(tmp_path):
    with Staging(tmp_path / "artifact", key="0" * 64) as staging:
        (staging.fresh("model") / "weights.bin").write_bytes(b"weights")
        (staging.folder / "model" / "config.json").write_text("{}")
        staging.publish(
            lambda files: Manifest(
                tool=Tool(version="0"), source=Source(name="m", digest="0" * 64), recipe={}, target="null", files=files
            )
        )
    read_artifact(tmp_path / "artifact")
    return tmp_path / "artifact"


def _edit(folder, change):
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))


def _refused(folder, code, **options):
    with pytest.raises(UsageError) as caught:
        read_artifact(folder, **options)
    assert caught.value.code == code
    return caught.value


def test_one_flipped_byte(folder):
    (folder / "model" / "weights.bin").write_bytes(b"weightz")
    assert "sha256" in _refused(folder, "CS1023").why


def test_another_size_is_noticed_without_digests(folder):
    (folder / "model" / "weights.bin").write_bytes(b"weights and more")
    _refused(folder, "CS1023", verify_digests=False)


def test_missing_and_additional_files(folder):
    (folder / "model" / "modeling_evil.py").write_text("evil")
    assert "not listed" in _refused(folder, "CS1023", verify_digests=False).why
    (folder / "model" / "modeling_evil.py").unlink()
    (folder / "model" / "config.json").unlink()
    assert "missing" in _refused(folder, "CS1023", verify_digests=False).why


@pytest.mark.parametrize("kind", ["file", "folder", "fifo", "manifest"])
def test_links_and_special_files(folder, tmp_path, kind):
    weights = folder / "model" / "weights.bin"
    code = "CS1023"
    if kind == "file":  # same bytes, so only the link itself can be noticed
        weights.rename(tmp_path / "elsewhere")
        weights.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        (folder / "model").rename(tmp_path / "elsewhere")
        (folder / "model").symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        weights.unlink()
        os.mkfifo(weights)
    else:
        (folder / "manifest.json").rename(tmp_path / "elsewhere")
        (folder / "manifest.json").symlink_to(tmp_path / "elsewhere")
        code = "CS1022"
    _refused(folder, code)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "model/../../secret", "a\\b", "./manifest.json", ""])
def test_names_that_escape(folder, name):
    (folder.parent / "secret").write_text("s")
    _edit(folder, lambda data: data["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    assert "relative path" in _refused(folder, "CS1022").why


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(schema_version=2),
        lambda data: data.update(unknown=1),
        lambda data: data.pop("source"),
        lambda data: data["files"]["model/config.json"].update(sha256="0"),
        lambda data: data["files"]["model/config.json"].update(sha256="0" * 64 + "\n"),
        lambda data: data["files"]["model/config.json"].update(bytes=-1),
        lambda data: data.update(files=[]),
    ],
)
def test_malformed_manifests(folder, change):
    _edit(folder, change)
    _refused(folder, "CS1022")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_manifests_that_are_not_json(folder, text):
    (folder / "manifest.json").write_bytes(text)
    _refused(folder, "CS1022")


def test_a_huge_manifest_is_not_read(folder):
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(2**40)  # sparse
    assert "larger" in _refused(folder, "CS1022").why


def test_no_manifest_no_artifact(folder):
    (folder / "manifest.json").unlink()
    assert "complete" in _refused(folder, "CS1021").what
    _refused(folder / "nowhere", "CS1021")
