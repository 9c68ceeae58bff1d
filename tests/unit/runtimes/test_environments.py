"""Runtimes in their own interpreters: private records, and checks before anything is recorded."""

from __future__ import annotations

import json
import os
import stat
import sys

import pytest

from compile_sparse.compiler.errors import EnvironmentFailure, UsageError
from compile_sparse.compiler.runtimes import install as runtime_install
from compile_sparse.compiler.runtimes.environments import (
    find_kind,
    find_runtime,
    list_runtimes,
    runtimes_folder,
    write_record,
)
from compile_sparse.compiler.runtimes.install import add_runtime
from tests.unit.runtimes.toy_runtime import RECORD, ToyRuntime


def test_record_round_trip_and_privacy(folder):
    assert find_runtime("toy") is None
    assert not folder.exists(), "looking makes no folder"
    write_record(RECORD)
    assert find_runtime("toy") == RECORD
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_where_records_are(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPILE_SPARSE_RUNTIMES", str(tmp_path / "a"))
    monkeypatch.setenv("COMPILE_SPARSE_CACHE", str(tmp_path / "b"))
    assert runtimes_folder() == tmp_path / "a"
    monkeypatch.delenv("COMPILE_SPARSE_RUNTIMES")
    assert runtimes_folder() == tmp_path / "b" / "runtimes"
    monkeypatch.delenv("COMPILE_SPARSE_CACHE")
    assert runtimes_folder().parts[-2:] == ("compile-sparse", "runtimes")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ({"python": "bin/python"}, "not absolute"),
        ({"device": "tpu"}, "device"),
        ({"schema_version": 2}, "schema_version"),
        ({"command": "rm"}, "command"),
        ({"name": "other"}, "other"),
        (None, "JSON"),
    ],
)
def test_a_damaged_record_is_said_to_be(folder, damage, why):
    write_record(RECORD)
    record = json.loads((folder / "toy.json").read_text())
    (folder / "toy.json").write_text("{" if damage is None else json.dumps(record | damage))
    with pytest.raises(EnvironmentFailure, match="CS5207") as caught:
        find_runtime("toy")
    assert why in caught.value.why


def test_what_others_could_have_written_is_not_believed(folder, monkeypatch):
    write_record(RECORD)
    folder.chmod(0o770)
    for attempt in (lambda: find_runtime("toy"), lambda: write_record(RECORD)):
        with pytest.raises(EnvironmentFailure, match="CS5005"):
            attempt()
    folder.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    for attempt in (lambda: find_runtime("toy"), lambda: write_record(RECORD)):
        with pytest.raises(EnvironmentFailure, match="CS5005"):
            attempt()


def test_an_empty_folder_is_made_private(folder):
    folder.mkdir()
    folder.chmod(0o777)
    write_record(RECORD)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_unknown_kinds_list_the_nearest(wheels):
    with pytest.raises(UsageError, match="CS1051") as caught:
        find_kind("toi")
    assert "toy" in caught.value.hint


def test_list_says_what_is_missing(wheels, folder):
    (status,) = list_runtimes()
    assert (status.why_not, status.hint) == ("Not installed.", "compile-sparse runtime install toy")
    write_record(RECORD)
    assert list_runtimes()[0].as_dict()["installed"] is True
    write_record(RECORD.model_copy(update={"python": folder / "gone"}))
    (status,) = list_runtimes()
    assert "gone" in status.why_not
    assert status.as_dict()["installed"] is False
    (folder / "toy.json").write_text("[]")
    assert "damaged" in list_runtimes()[0].why_not


def test_add_refuses_what_is_no_interpreter(wheels, tmp_path):
    (tmp_path / "text").write_text("")
    for path in (tmp_path / "absent", tmp_path / "text", tmp_path):
        with pytest.raises(UsageError, match="CS1052"):
            add_runtime("toy", path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("")
    with pytest.raises(UsageError) as caught:
        add_runtime("toy", tmp_path)
    assert str(tmp_path / "bin" / "python") in caught.value.hint


def test_add_of_an_interpreter_without_the_runtime_says_what_is_missing(wheels):
    with pytest.raises(EnvironmentFailure, match="CS5206") as caught:
        add_runtime("toy", sys.executable)
    assert "No module named 'toy'" in caught.value.why
    assert "runtime install toy" in caught.value.hint
    assert find_runtime("toy") is None


@pytest.mark.parametrize(
    ("check", "why"),
    [
        ("import sys; sys.exit('segmentation')", "segmentation"),
        ("print('[]')", "none"),
        ('print(\'{"versions": {}, "device": "tpu"}\')', "device"),
        ("import time; time.sleep(60)", "within 1 s"),
    ],
)
def test_a_check_that_fails_is_reported(wheels, monkeypatch, check, why):
    ToyRuntime.check_script.write_text(check)
    monkeypatch.setattr(runtime_install, "CHECK_SECONDS", 1)
    with pytest.raises(EnvironmentFailure, match="CS5206") as caught:
        add_runtime("toy", sys.executable)
    assert why in caught.value.why


def test_the_check_sees_no_secrets_and_no_modules_of_ours(wheels, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = "{'versions': {}, 'device': 'cpu', 'env': sorted(os.environ), 'path': sys.path}"
    ToyRuntime.check_script.write_text(f"import json, os, sys; print(json.dumps({facts}))")
    facts = add_runtime("toy", sys.executable).facts
    assert "HF_TOKEN" not in facts["env"]
    assert str(tmp_path) not in facts["path"], "neither the script's folder nor PYTHONPATH"


def test_links_to_interpreters_are_kept(wheels, tmp_path):
    """The Python of an environment is a link; resolved, it would be another environment's."""
    link = tmp_path / "link" / "python"
    link.parent.mkdir()
    link.symlink_to(sys.executable)
    ToyRuntime.check_script.write_text('print(\'{"versions": {}, "device": "cpu"}\')')
    assert add_runtime("toy", link).python == link
    assert find_runtime("toy").managed is False
