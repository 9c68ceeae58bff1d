"""Repositories of ONNX graphs, read with Triton's own definition, and run where the runtime is here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from compile_sparse.compiler.errors import Refusal
from tests.triton.conftest import Lowered
from tests.triton.reading import SIZES, agrees, answers, digests, repository, requests, tensors, type_name


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_encoders_are_batched(name: str, lowered: Lowered) -> None:
    folder, written, config = repository(lowered(name), largest_batch=16)
    assert (config.name, config.backend, config.max_batch_size) == ("served", "onnxruntime", 16)
    assert config.default_model_filename == "model.onnx" and config.HasField("dynamic_batching")
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, 2)]  # KIND_CPU
    inputs = {
        "bert": dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ("TYPE_INT64", [-1])),
        "vit": {"pixel_values": ("TYPE_FP32", [3, 32, 32])},
    }
    assert tensors(config.input) == inputs[name]
    assert tensors(config.output) == {"logits": ("TYPE_FP32", [3 if name == "bert" else 5])}
    agrees(config, answers(folder, requests(config)))
    assert written.limits == ()


def test_a_decoder_runs_from_its_configuration(lowered: Lowered) -> None:
    folder, written, config = repository(lowered("llama"))
    found = tensors(config.input)
    assert found["past_key_values.1.value"] == ("TYPE_FP32", [2, -1, 16])
    assert not config.HasField("dynamic_batching")
    given = requests(config)
    batch = min(SIZES["batch"], config.max_batch_size)
    given["attention_mask"] = np.ones((batch, 2 * SIZES["tokens"]), np.int64)  # past and new tokens
    agrees(config, answers(folder, given))
    assert "as many outputs" in written.limits[-1]


def test_run_time_scales_of_tokens_are_batched(lowered: Lowered) -> None:
    folder, written, config = repository(lowered("bert", "w8a8"), largest_batch=16)
    assert config.max_batch_size == 16 and config.HasField("dynamic_batching")
    agrees(config, answers(folder, requests(config)))
    assert written.limits == ()


def test_requests_that_would_influence_each_other_are_not_batched(lowered: Lowered) -> None:
    graph = onnx.load(lowered("llama") / "model.onnx", load_external_data=False).graph
    assert "GroupQueryAttention" in {node.op_type for node in graph.node}
    _, written, config = repository(lowered("llama"), largest_batch=16)
    assert config.max_batch_size == 1 and not config.HasField("dynamic_batching")
    assert "one request at a time" in written.limits[0]


def test_a_gpu_is_asked_for(lowered: Lowered) -> None:
    *_, config = repository(lowered("bert"), device="cuda")
    assert [group.kind for group in config.instance_group] == [1]  # KIND_GPU


def test_every_file_is_told_with_its_digest(lowered: Lowered) -> None:
    folder, written, _ = repository(lowered("bert"))
    assert written.files == digests(folder)
    names = ("config.pbtxt", "1/model.onnx", "1/model.onnx.data", "1/config.json")
    assert set(written.files) == {f"served/{name}" for name in names}


def test_weights_have_one_name_each(lowered: Lowered) -> None:
    """onnx does not read external weights that have a second name, so these are copied; the rest is linked."""
    model = lowered("bert")
    folder, _, _ = repository(model)
    assert os.path.samefile(model / "model.onnx", folder / "1" / "model.onnx")
    for place in (model, folder / "1"):
        assert (place / "model.onnx.data").stat().st_nlink == 1
        onnx.load(place / "model.onnx")


def graph(inputs: Mapping[str, list[Any]], outputs: Mapping[str, list[Any]], kind: int, folder: Path) -> Path:
    """A file with identities alone."""
    nodes = [onnx.helper.make_node("Identity", [a], [b]) for a, b in zip(inputs, outputs, strict=True)]
    values = [
        [onnx.helper.make_tensor_value_info(name, kind, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    model = folder / "model"
    model.mkdir()
    opset = [onnx.helper.make_opsetid("", 20)]
    made = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", *values), ir_version=10, opset_imports=opset)
    onnx.save(made, model / "model.onnx")
    return model


@pytest.mark.parametrize(
    ("shapes", "batch", "dims"),
    [
        ({"a": ["batch", 4], "b": ["batch", "n"]}, 8, [[4], [-1]]),
        ({"a": ["batch", 4], "b": [2, "n"]}, 0, [[-1, 4], [2, -1]]),
        ({"a": ["batch", 4], "b": ["other", 4]}, 0, [[-1, 4], [-1, 4]]),
        ({"a": [1, 4], "b": [1, 4]}, 0, [[1, 4], [1, 4]]),
    ],
)
def test_a_batch_is_added_where_all_tensors_have_it(
    shapes: dict[str, list[Any]], batch: int, dims: list[list[int]], tmp_path: Path
) -> None:
    outputs = {f"{name}_out": shape for name, shape in shapes.items()}
    *_, config = repository(graph(shapes, outputs, onnx.TensorProto.FLOAT16, tmp_path))
    assert config.max_batch_size == batch
    assert [list(entry.dims) for entry in (*config.input, *config.output)] == dims * 2
    assert {type_name(entry) for entry in config.input} == {"TYPE_FP16"}


def test_one_number_per_request(tmp_path: Path) -> None:
    model = graph({"write_indices": ["batch"]}, {"score": ["batch"]}, onnx.TensorProto.INT64, tmp_path)
    folder, _, config = repository(model)
    assert list(config.input[0].dims) == [1] and list(config.input[0].reshape.shape) == []
    found = answers(folder, requests(config))
    assert found["score"].shape == (3,)


def test_types_that_triton_does_not_have(tmp_path: Path) -> None:
    model = graph({"a": ["batch", 4]}, {"b": ["batch", 4]}, onnx.TensorProto.FLOAT8E4M3FN, tmp_path)
    with pytest.raises(Refusal, match="CS4624"):
        repository(model)


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.onnx").write_bytes(b"no protocol buffer")
    with pytest.raises(Refusal, match="CS4625"):
        repository(model)


def test_weights_outside_the_folder_are_refused(lowered: Lowered, tmp_path: Path) -> None:
    found = onnx.load(lowered("bert") / "model.onnx", load_external_data=False)
    for tensor in found.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../secret" if entry.key == "location" else entry.value
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.onnx").write_bytes(found.SerializeToString())
    with pytest.raises(Refusal, match="CS4625"):
        repository(model)
