"""Engines are loaded when they are ours, whole, and for this machine; each other case has its own sentence."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compile_sparse.backends.tensorrt.description import (
    DESCRIPTION_FILE,
    Description,
    EngineRecord,
    Value,
    read_description,
)
from compile_sparse.backends.tensorrt.engine.engines import Here, check_engine, choose_engine
from compile_sparse.compiler.errors import EnvironmentFailure, Refusal

CONTENT = b"an engine" * 100
A100 = Here({"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}, "NVIDIA A100-SXM4-80GB", "8.0")
RTX = EngineRecord(
    file="rtx-sm80.engine",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    bytes=len(CONTENT),
    builder="tensorrt_rtx",
    version="1.7.1.116",
    compute_capability="8.0",
    profiles=("prefill", "decode"),
)
TENSORRT = RTX.model_copy(
    update={"file": "model.engine", "builder": "tensorrt", "version": "11.4.1.2", "gpu": A100.gpu}
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for record in (RTX, TENSORRT):
        (tmp_path / record.file).write_bytes(CONTENT)
    return tmp_path


def described(*engines: EngineRecord) -> Description:
    value = Value(name="x", dtype="float16", shape=("batch", 8))
    return Description(kind="text", precision="fp16", inputs=(value,), outputs=(value,), engines=engines)


def changed(record: EngineRecord, **fields: Any) -> EngineRecord:
    return record.model_copy(update=fields)


@pytest.mark.parametrize("record", [RTX, TENSORRT])
def test_ours_on_its_gpu(record: EngineRecord, folder: Path) -> None:
    assert check_engine(folder, record, A100) == ""


@pytest.mark.parametrize(
    ("content", "code", "what"),
    [
        (CONTENT[:-1], "CS4420", "cut short"),
        (b"", "CS4420", "cut short"),
        (CONTENT[:-1] + b"!", "CS4420", "not the one that was built"),
        (CONTENT + b"more", "CS4420", "not the one that was built"),
        (None, "CS4425", "no such engine"),
    ],
)
def test_changed_files(content: bytes | None, code: str, what: str, folder: Path) -> None:
    path = folder / RTX.file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(Refusal, match=code) as caught:
        check_engine(folder, RTX, A100)
    assert what in caught.value.what
    assert RTX.file in caught.value.where


def test_a_link_is_not_followed(folder: Path) -> None:
    (folder / RTX.file).unlink()
    (folder / RTX.file).symlink_to(folder / TENSORRT.file)
    with pytest.raises(Refusal, match="CS4425"):
        check_engine(folder, RTX, A100, allow_foreign=True)


def test_the_user_may_vouch_for_a_changed_engine_but_not_for_a_part(folder: Path) -> None:
    (folder / RTX.file).write_bytes(CONTENT + b"more")
    note = check_engine(folder, RTX, A100, allow_foreign=True)
    assert "vouches" in note
    (folder / RTX.file).write_bytes(CONTENT[:50])
    assert "vouches" in check_engine(folder, RTX, A100, allow_foreign=True), "an engine built anew may be smaller"
    with pytest.raises(Refusal, match="CS4422"):
        check_engine(folder, RTX, replace(A100, compute_capability="8.6"), allow_foreign=True)


@pytest.mark.parametrize(
    ("record", "here", "why"),
    [
        (
            RTX,
            replace(A100, gpu="NVIDIA A10", compute_capability="8.6"),
            "capability 8.0; the GPU here (NVIDIA A10) has 8.6",
        ),
        (RTX, replace(A100, gpu="", compute_capability=""), "there is no GPU"),
        (changed(RTX, compute_capability="8.9"), A100, "capability 8.9"),
        (TENSORRT, replace(A100, gpu="NVIDIA A30"), "on 'NVIDIA A100-SXM4-80GB'; the GPU here is 'NVIDIA A30'"),
        (TENSORRT, replace(A100, compute_capability="9.0"), "has 9.0"),
    ],
)
def test_another_gpu(record: EngineRecord, here: Here, why: str, folder: Path) -> None:
    with pytest.raises(Refusal, match="CS4422") as caught:
        check_engine(folder, record, here)
    assert why in caught.value.why


@pytest.mark.parametrize(
    ("record", "installed", "loads"),
    [
        (RTX, "1.7.1.116", True),
        (RTX, "1.7.2.1", False),
        (RTX, "1.8.1.116", False),
        (TENSORRT, "11.4.0.106", True),
        (TENSORRT, "11.4.9", True),
        (TENSORRT, "11.3.1.2", False),
        (TENSORRT, "11.40.1", False),
        (TENSORRT, "12.4.1.2", False),
    ],
)
def test_versions(record: EngineRecord, installed: str, loads: bool, folder: Path) -> None:
    here = replace(A100, versions={record.builder: installed})
    if loads:
        assert check_engine(folder, record, here) == ""
        return
    with pytest.raises(Refusal, match="CS4423") as caught:
        check_engine(folder, record, here)
    assert record.version in caught.value.why
    assert installed in caught.value.why


def test_the_other_runtime_does_not_load_it(folder: Path) -> None:
    with pytest.raises(EnvironmentFailure, match="CS5210") as caught:
        check_engine(folder, RTX, replace(A100, versions={"tensorrt": "11.4.0"}))
    assert "tensorrt 11.4.0" in caught.value.why
    assert caught.value.hint == "pip install 'compile-sparse[tensorrt-rtx]'"


def test_the_engine_that_fits_is_chosen() -> None:
    other = changed(RTX, file="rtx-sm89.engine", compute_capability="8.9")
    assert choose_engine(described(other, RTX, TENSORRT), A100) == TENSORRT
    only_rtx = replace(A100, versions={"tensorrt_rtx": "1.7.1.116"})
    assert choose_engine(described(other, TENSORRT, RTX), only_rtx) == RTX
    with pytest.raises(Refusal, match="CS4422"):
        choose_engine(described(other), A100)
    with pytest.raises(Refusal, match="CS4422") as caught:
        choose_engine(described(other, RTX), replace(A100, compute_capability="9.0"))
    assert "rtx-sm89.engine" in caught.value.why
    assert "rtx-sm80.engine" in caught.value.why
    with pytest.raises(Refusal, match="CS4424"):
        choose_engine(described(), A100)


def test_descriptions_are_read_back_as_written(tmp_path: Path) -> None:
    description = described(RTX, TENSORRT)
    (tmp_path / DESCRIPTION_FILE).write_text(description.model_dump_json())
    assert read_description(tmp_path) == description


@pytest.mark.parametrize(
    "change", [{"schema_version": 2}, {"surprise": 1}, {"inputs": None}, {"engines": [{"file": "../x"}]}]
)
def test_descriptions_that_are_none(change: dict[str, Any], tmp_path: Path) -> None:
    fields = json.loads(described(RTX).model_dump_json()) | change
    (tmp_path / DESCRIPTION_FILE).write_text(json.dumps(fields))
    with pytest.raises(Refusal, match="CS4419"):
        read_description(tmp_path)
    with pytest.raises(Refusal, match="CS4419"):
        read_description(tmp_path / "absent")


@pytest.mark.parametrize("file", ["../model.engine", "/model.engine", "a/../../b", ""])
def test_engines_lie_in_the_folder(file: str) -> None:
    fields = RTX.model_dump() | {"file": file}
    with pytest.raises(ValidationError, match="relative path"):
        EngineRecord.model_validate(fields)
