"""Which weight files are read: those that transformers picks, whatever lies beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers.modeling_utils import _get_resolved_checkpoint_files

from compile_sparse.compiler.capture.weight_files import INDEX_NAME, SINGLE_NAME, weight_files
from compile_sparse.compiler.errors import ModelError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., Path]:
    def make(names: Sequence[str]) -> Path:
        for name in names:
            (tmp_path / name).write_bytes(b"weights")
        if INDEX_NAME in names:
            index = {"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
            (tmp_path / INDEX_NAME).write_text(json.dumps(index))
        if "other.safetensors.index.json" in names:
            index = {"metadata": {}, "weight_map": {"a": "x.safetensors"}}
            (tmp_path / "other.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("names", "explicit"),
    [
        ([SINGLE_NAME], ""),
        ([SINGLE_NAME, INDEX_NAME, *SHARDS], ""),
        ([INDEX_NAME, *SHARDS], ""),
        ([SINGLE_NAME, "model.fp16.safetensors"], ""),
        ([INDEX_NAME, *SHARDS, "model.fp16.safetensors", "consolidated.safetensors"], ""),
        ([SINGLE_NAME, "adapter_model.safetensors", "pytorch_model.bin"], ""),
        ([SINGLE_NAME, "x.safetensors"], "x.safetensors"),
        ([SINGLE_NAME, "x.safetensors", "other.safetensors.index.json"], "other.safetensors.index.json"),
    ],
)
def test_they_are_those_that_transformers_reads(
    folder_of: Callable[..., Path], names: list[str], explicit: str
) -> None:
    folder = folder_of(names)
    expected, _ = _get_resolved_checkpoint_files(
        str(folder), None, None, None, None, False, transformers_explicit_filename=explicit or None
    )
    assert [str(path) for path in weight_files(folder, explicit)] == expected


@pytest.mark.parametrize(
    "names", [["model.fp16.safetensors"], SHARDS, ["weights.safetensors"], ["a.gguf"], ["a.onnx"], []]
)
def test_a_folder_that_transformers_does_not_load_is_refused(folder_of: Callable[..., Path], names: list[str]) -> None:
    folder = folder_of(names)
    with pytest.raises(OSError, match="no file named"):
        _get_resolved_checkpoint_files(str(folder), None, None, None, None, False)
    with pytest.raises(ModelError) as caught:
        weight_files(folder)
    assert (caught.value.code, caught.value.exit_code) == ("CS2003", 4)
    assert all(name in caught.value.why for name in names)
    assert weight_files(folder, required=False) == []


@pytest.mark.parametrize("name", [SINGLE_NAME, INDEX_NAME, SHARDS[1]])
def test_a_link_out_of_the_folder_is_not_followed(
    folder_of: Callable[..., Path], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = folder_of([SINGLE_NAME] if name == SINGLE_NAME else [INDEX_NAME, *SHARDS])
    outside = tmp_path_factory.mktemp("outside") / name
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(ModelError, match="CS2010"):
        weight_files(folder)


@pytest.mark.parametrize(
    "explicit", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "x.bin", "gone.safetensors"]
)
def test_a_file_that_the_config_names_stays_in_the_folder(folder_of: Callable[..., Path], explicit: str) -> None:
    folder = folder_of([SINGLE_NAME, "x.bin"])
    with pytest.raises(ModelError) as caught:
        weight_files(folder, explicit)
    assert (caught.value.code, caught.value.where) == ("CS2004", "config.json")
