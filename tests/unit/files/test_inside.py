"""Files of a model folder: what lies in it, and what only looks so."""

from __future__ import annotations

from pathlib import Path

import pytest

from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.files.inside import is_inside, require_inside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "a.json").write_text("{}")
    (tmp_path / "secret.txt").write_text("canary")
    return made


def test_a_file_and_a_link_within_the_folder_are_inside(folder: Path) -> None:
    (folder / "b.json").symlink_to("a.json")
    assert require_inside(folder, folder / "b.json") == folder / "b.json"
    assert is_inside(folder, folder / "not-there.json")


@pytest.mark.parametrize("target", ["../secret.txt", "{absolute}", "../gone.txt", "loop"])
def test_a_link_that_leads_out_is_refused_by_name(folder: Path, target: str) -> None:
    (folder / "loop").symlink_to("loop")
    link = folder / "merges.txt"
    link.symlink_to(target.format(absolute=folder.parent / "secret.txt"))
    with pytest.raises(ModelError) as caught:
        require_inside(folder, link)
    assert caught.value.code == "CS2010"
    assert caught.value.where == "merges.txt"


def test_a_linked_folder_does_not_help(folder: Path) -> None:
    (folder / "sub").symlink_to(folder.parent)
    assert not is_inside(folder, folder / "sub" / "secret.txt")
    assert not is_inside(folder, folder / ".." / "secret.txt")


def test_the_model_folder_itself_may_be_a_link(folder: Path) -> None:
    (folder.parent / "alias").symlink_to(folder)
    assert is_inside(folder.parent / "alias", folder.parent / "alias" / "a.json")


def test_a_snapshot_of_the_hub_cache_may_use_its_own_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    other = tmp_path / "models--a--c" / "blobs"
    for made in (snapshot, blobs, other):
        made.mkdir(parents=True)
        (made / "0123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/0123")
    (snapshot / "vocab.json").symlink_to("../../../models--a--c/blobs/0123")
    assert is_inside(snapshot, snapshot / "config.json")
    assert not is_inside(snapshot, snapshot / "vocab.json")
