"""Damaged and hostile weight files give a sentence that names the file, before anything is allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compile_sparse.compiler.capture import safetensors_reader
from compile_sparse.compiler.capture.safetensors_reader import read_checkpoint
from compile_sparse.compiler.capture.weight_files import INDEX_NAME, weight_files
from compile_sparse.compiler.errors import ModelError

FLOATS = bytes(8)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_bytes(header: Any, data: bytes = FLOATS) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


GOOD = file_bytes({"w": entry()})


def test_the_undamaged_file_is_read(tmp_path: Path) -> None:
    """The cases below differ from this one in one respect each."""
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    (found,) = read_checkpoint(weight_files(tmp_path), torch.float32).values()
    assert torch.equal(found.load(), torch.zeros(2))


DAMAGED = {
    "empty": (b"", "0 bytes"),
    "cut in the length": (GOOD[:5], "5 bytes"),
    "cut in the header": (GOOD[:20], "truncated"),
    "cut in the data": (GOOD[:-1], "truncated or extended"),
    "extended": (GOOD + b"\0", "truncated or extended"),
    "hostile length": ((2**63).to_bytes(8, "little") + GOOD[8:], str(2**63)),
    "length beyond the end": ((len(GOOD)).to_bytes(8, "little") + GOOD[8:], "truncated"),
    "not JSON": (file_bytes(b"{'w': 1}"), "not JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "not JSON"),
    "nested without end": (file_bytes(b"[" * 200_000), "not JSON"),
    "a list": (file_bytes([1]), "not a JSON object"),
    "entry is a number": (file_bytes({"w": 1}), "'w' is malformed"),
    "entry lacks a key": (file_bytes({"w": {"dtype": "F32", "shape": [2]}}), "'w' is malformed"),
    "three offsets": (file_bytes({"w": entry(offsets=(0, 4, 8))}), "'w' is malformed"),
    "negative size": (file_bytes({"w": entry(shape=(-2,))}), "'w' is malformed"),
    "size is a fraction": (file_bytes({"w": entry(shape=(2.0,))}), "'w' is malformed"),
    "nine dimensions": (file_bytes({"w": entry(shape=(1,) * 8 + (2,))}), "'w' is malformed"),
    "dtype is a list": (file_bytes({"w": entry(dtype=["F32"])}), "'w' is malformed"),
    "span too short": (file_bytes({"w": entry(offsets=(0, 4))}), "needs 8 bytes, its entry spans 4"),
    "shape beyond memory": (file_bytes({"w": entry(shape=(2**40, 2**40))}), "its entry spans 8"),
    "offsets reversed": (file_bytes({"w": entry(offsets=(8, 0))}), "spans -8"),
    "overlap": (file_bytes({"a": entry(), "b": entry()}), "'b'"),
    "hole": (file_bytes({"w": entry(offsets=(4, 12))}, bytes(12)), "'w'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_with_the_reason(tmp_path: Path, name: str) -> None:
    raw, reason = DAMAGED[name]
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(ModelError) as caught:
        read_checkpoint(weight_files(tmp_path), torch.float32)
    assert caught.value.code == "CS2004"
    assert caught.value.where == "model.safetensors"
    assert reason in caught.value.why


@pytest.mark.parametrize("dtype", ["F4", "C64", "a type of tomorrow"])
def test_a_type_that_is_not_read_is_no_damage(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(file_bytes({"w": entry(dtype=dtype, shape=(8,))}))
    with pytest.raises(ModelError) as caught:
        read_checkpoint(weight_files(tmp_path), torch.float32)
    assert caught.value.code == "CS2020"
    assert repr(dtype) in caught.value.what


def shards(folder: Path, weight_map: Any) -> None:
    save_file({"a": torch.arange(3.0)}, folder / "model-1.safetensors")
    save_file({"b": torch.arange(4.0)}, folder / "model-2.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def test_a_sharded_folder_reads_every_tensor(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    found = read_checkpoint(weight_files(tmp_path), torch.float32)
    assert {name: tensor.path.name for name, tensor in found.items()} == {
        "a": "model-1.safetensors",
        "b": "model-2.safetensors",
    }
    assert torch.equal(found["b"].load(), torch.arange(4.0))


def test_files_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "model-1.safetensors"})
    (tmp_path / "model-2.safetensors").write_bytes(b"garbage")
    assert set(read_checkpoint(weight_files(tmp_path), torch.float32)) == {"a"}


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "../model-1.safetensors"}, "outside the folder"),
        ({"a": "/etc/passwd"}, "outside the folder"),
        ({"a": "sub/model-1.safetensors"}, "outside the folder"),
        ({"a": "."}, "outside the folder"),
        ({"a": 7}, "outside the folder"),
        ({"a": "model-3.safetensors"}, "'model-3.safetensors', which is missing"),
        ({"a": ["model-1.safetensors"]}, "malformed"),
        (["model-1.safetensors"], "malformed"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, weight_map: Any, reason: str) -> None:
    shards(tmp_path, weight_map)
    with pytest.raises(ModelError) as caught:
        read_checkpoint(weight_files(tmp_path), torch.float32)
    assert (caught.value.code, caught.value.where) == ("CS2004", INDEX_NAME)
    assert reason in caught.value.why


@pytest.mark.parametrize("text", ["{", "[]", "{}", "[" * 200_000])
def test_an_unreadable_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(ModelError, match="CS2004"):
        read_checkpoint(weight_files(tmp_path), torch.float32)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    save_file({"a": torch.ones(2)}, tmp_path / "model-2.safetensors")
    with pytest.raises(ModelError, match=r"'a' is also in model-1\.safetensors"):
        read_checkpoint(weight_files(tmp_path), torch.float32)


def test_floating_point_is_converted_on_load_and_integers_are_not(tmp_path: Path) -> None:
    half = torch.tensor([1.0, 3.140625, -2e30], dtype=torch.bfloat16)
    save_file({"half": half, "ids": torch.tensor([1, 2])}, tmp_path / "model.safetensors")
    found = read_checkpoint(weight_files(tmp_path), torch.float32)
    assert found["half"].dtype == torch.float32
    assert found["half"].stored_dtype == torch.bfloat16
    assert torch.equal(found["half"].load(), half.float())  # every bfloat16 is a float32
    assert found["ids"].load().dtype == torch.int64


def test_a_file_that_changes_during_the_run_is_a_typed_error(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(GOOD)
    found = read_checkpoint(weight_files(tmp_path), torch.float32)["w"]
    file.write_bytes(b"garbage")
    with pytest.raises(ModelError) as caught:
        found.load()
    assert caught.value.code == "CS2006"
    assert "'w'" in caught.value.what


def test_without_any_weight_file_the_result_is_empty(tmp_path: Path) -> None:
    assert weight_files(tmp_path, required=False) == []
    assert read_checkpoint([], torch.float32) == {}
    with pytest.raises(ModelError, match="CS2003"):
        weight_files(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wrong", ["nan", "inf", "-inf"])
def test_a_value_that_is_not_finite_is_named_when_it_is_read(tmp_path: Path, dtype: torch.dtype, wrong: str) -> None:
    value = torch.randn(4, 6).to(dtype)
    value[2, 3] = value[3, 0] = float(wrong)
    save_file({"w": value, "good": torch.ones(3)}, tmp_path / "model.safetensors")
    found = read_checkpoint(weight_files(tmp_path), torch.float32)
    assert torch.equal(found["good"].load(), torch.ones(3))
    for _ in range(2):
        with pytest.raises(ModelError) as caught:
            found["w"].load()
        assert (caught.value.code, caught.value.exit_code) == ("CS2013", 4)
        assert "'w'" in caught.value.what
        assert "2 of 24 are" in caught.value.why
        assert f"[2, 3]: {wrong}" in caught.value.why


def test_a_tensor_is_searched_for_values_that_are_not_finite_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    looked: list[str] = []
    monkeypatch.setattr(safetensors_reader, "_require_finite", lambda path, name, value: looked.append(name))
    (found,) = read_checkpoint(weight_files(tmp_path), torch.float32).values()
    found.load(), found.load()
    assert looked == ["w"]
