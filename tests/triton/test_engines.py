"""Engines and checkpoints as models that Triton serves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from compile_sparse.backends.vllm.plugin_files import PLUGIN_FOLDER
from compile_sparse.compiler.errors import Refusal
from tests.triton.model_folders import checkpoint, engine_folder
from tests.triton.reading import digests, repository, tensors


def test_an_engine_is_served(tmp_path: Path) -> None:
    model = engine_folder(tmp_path)
    folder, written, config = repository(model, "tensorrt", device="cuda")
    assert (config.backend, config.max_batch_size) == ("tensorrt", 16)  # what every input of the profile holds
    assert config.default_model_filename == "model.plan" and config.HasField("dynamic_batching")
    assert tensors(config.input) == dict.fromkeys(("input_ids", "attention_mask"), ("TYPE_INT64", [-1]))
    assert tensors(config.output) == {"logits": ("TYPE_FP16", [3])}
    assert [(group.kind, list(group.profile)) for group in config.instance_group] == [(1, [])]
    assert os.path.samefile(folder / "1" / "model.plan", model / "model.engine")
    assert written.files == digests(folder)
    assert "11.4.0" in written.limits[0] and "8.0" in written.limits[0]


def test_all_profiles_are_given_to_triton(tmp_path: Path) -> None:
    shapes = {"input_ids": [[1, 1], [1, 8], [4, 8]], "attention_mask": [[1, 1], [1, 8], [4, 8]]}
    profiles = [{"name": "samples", "shapes": shapes}, {"name": "long", "shapes": shapes}]
    model = engine_folder(tmp_path, profiles=profiles, engine={"profiles": ["samples", "long"]})
    *_, config = repository(model, "tensorrt")
    assert list(config.instance_group[0].profile) == ["0", "1"] and config.max_batch_size == 4


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"aliases": {"present.0.key": "past_key_values.0.key"}}, "CS4621"),
        ({"engines": []}, "CS4622"),
        ({"engine": {"builder": "tensorrt_rtx"}}, "CS4622"),
        ({"engine": {"sha256": "0" * 64}}, "CS4623"),
    ],
)
def test_engines_that_are_not_served(changes: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=code):
        repository(engine_folder(tmp_path, **changes), "tensorrt")


def test_an_engine_without_description_is_refused(tmp_path: Path) -> None:
    model = engine_folder(tmp_path)
    (model / "compile_sparse.json").write_text("{}", encoding="utf-8")
    with pytest.raises(Refusal, match="CS4419"):
        repository(model, "tensorrt")


def test_a_checkpoint_is_served_by_vllm(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    folder, written, config = repository(model, "vllm", device="cuda", gpus=2)
    assert (config.backend, config.max_batch_size) == ("vllm", 0)
    assert config.model_transaction_policy.decoupled and not config.HasField("dynamic_batching")
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, 3)]  # KIND_MODEL
    assert tensors(config.input) == {
        "text_input": ("TYPE_STRING", [1]),
        "stream": ("TYPE_BOOL", [1]),
        "sampling_parameters": ("TYPE_STRING", [1]),
        "exclude_input_in_output": ("TYPE_BOOL", [1]),
    }
    assert [entry.name for entry in config.input if not entry.optional] == ["text_input"]
    assert tensors(config.output) == {"text_output": ("TYPE_STRING", [-1])}
    arguments = json.loads((folder / "1" / "model.json").read_text(encoding="utf-8"))
    assert arguments == {"model": "/models/served/1/checkpoint", "tensor_parallel_size": 2}
    # What the path means once the repository is mounted there.
    inside = folder.parent / Path(arguments["model"]).relative_to("/models")
    assert os.path.samefile(inside / "model.safetensors", model / "model.safetensors")
    assert written.files == digests(folder)
    assert "/models" in written.limits[0] and PLUGIN_FOLDER in written.limits[1]
