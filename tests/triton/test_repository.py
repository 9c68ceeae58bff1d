"""Repositories for the three backends, read with Triton's own definition, and run where the backend's runtime is here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.backends.tensorrt.processor import probe_runtime
from compile_sparse.backends.triton.deployment import TritonDeployment
from compile_sparse.backends.triton.repository import Repository, write_repository
from compile_sparse.backends.vllm.plugin_files import PLUGIN_FOLDER
from compile_sparse.compiler.capture import capture_model
from compile_sparse.compiler.errors import Refusal, UsageError
from compile_sparse.compiler.extension.deployments import find_deployment
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target, load_targets
from compile_sparse.passes.quantize import Quantize
from tests.onnxruntime.models import build
from tests.triton.protobuf import definition, parsed

NUMPY = {
    "TYPE_BOOL": np.bool_,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
}
SIZES = {"batch": 3, "tokens": 5}
Lowered = Callable[..., Path]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """The lowered folder of a tiny model of ONNX Runtime's tests."""
    target = find_target("ort-cpu")

    captured = cache(lambda name: capture_model(build(name)))

    @cache
    def make(name: str, scheme: str) -> Path:
        program = captured(name)
        if scheme:
            context = PassContext(target=target, progress=SilentProgress())
            program = Quantize(scheme=scheme).run(program, context).program  # type: ignore[arg-type]
        out = tmp_path_factory.mktemp("lowered") / "model"
        out.mkdir()
        OnnxRuntimeBackend().lower(program, target, out, SilentProgress())
        return out

    return lambda name, scheme="": make(name, scheme)


def repository(model: Path, backend: str = "onnxruntime", **options: Any) -> tuple[Path, Repository, Any]:
    """The folder of the served model, what was returned, and the configuration as Triton reads it."""
    out = model.parent / f"triton-{len(list(model.parent.iterdir()))}"
    options = {"name": "served", "device": "cpu", **options}
    written = write_repository(model, out, backend=backend, **options)  # type: ignore[arg-type]
    return out / "served", written, parsed((out / "served" / "config.pbtxt").read_text(encoding="utf-8"))


def type_name(entry: Any) -> str:
    return str(definition().DataType.Name(entry.data_type))


def tensors(entries: Any) -> dict[str, tuple[str, list[int]]]:
    return {entry.name: (type_name(entry), list(entry.dims)) for entry in entries}


def requests(config: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors made from the configuration alone, as a client would: the batch in front, and a length where sizes are open."""
    found = {}
    for entry in config.input:
        sizes = [SIZES["tokens"] if size == -1 else size for size in entry.dims]
        if entry.HasField("reshape"):
            sizes = list(entry.reshape.shape)
        shape = [*([min(SIZES["batch"], config.max_batch_size)] if config.max_batch_size else []), *sizes]
        found[entry.name] = np.ones(shape, NUMPY[type_name(entry)])
    return found


def answers(folder: Path, given: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(str(folder / "1" / "model.onnx"), options)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(given)), strict=True))


def agrees(config: Any, found: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Every output has the configuration's name, type and sizes."""
    assert list(found) == [entry.name for entry in config.output]
    for entry in config.output:
        value = found[entry.name]
        sizes = list(value.shape[1 if config.max_batch_size else 0 :])
        assert value.dtype == NUMPY[type_name(entry)], entry.name
        assert len(sizes) == len(entry.dims) and all(d in (-1, s) for d, s in zip(entry.dims, sizes, strict=True))


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


@pytest.mark.parametrize(("name", "scheme"), [("bert", "w8a8"), ("llama", "")])
def test_requests_that_would_influence_each_other_are_not_batched(name: str, scheme: str, lowered: Lowered) -> None:
    operators = {
        node.op_type for node in onnx.load(lowered(name, scheme) / "model.onnx", load_external_data=False).graph.node
    }
    assert operators & {"DynamicQuantizeLinear", "GroupQueryAttention"}
    _, written, config = repository(lowered(name, scheme), largest_batch=16)
    assert config.max_batch_size == 1 and not config.HasField("dynamic_batching")
    assert "one request at a time" in written.limits[0]


def test_a_gpu_is_asked_for(lowered: Lowered) -> None:
    *_, config = repository(lowered("bert"), device="cuda")
    assert [group.kind for group in config.instance_group] == [1]  # KIND_GPU


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder.parent).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_every_file_is_told_with_its_digest(lowered: Lowered) -> None:
    folder, written, _ = repository(lowered("bert"))
    assert written.files == digests(folder)
    assert set(written.files) == {f"served/{name}" for name in ("config.pbtxt", "1/model.onnx", "1/model.onnx.data")}


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


# -- tensorrt


def engine_folder(folder: Path, **changes: Any) -> Path:
    """A lowered encoder with an engine, as far as a repository reads it."""
    model = folder / "model"
    model.mkdir()
    (model / "model.engine").write_bytes(b"plan")
    engine = {
        "file": "model.engine",
        "sha256": hashlib.sha256(b"plan").hexdigest(),
        "bytes": 4,
        "builder": "tensorrt",
        "version": "11.4.0",
        "compute_capability": "8.0",
        "profiles": ["samples"],
    }
    shapes = {"input_ids": [[1, 1], [8, 128], [32, 512]], "attention_mask": [[1, 1], [8, 128], [16, 512]]}
    description = {
        "kind": "text",
        "precision": "fp16",
        "inputs": [{"name": name, "dtype": "int64", "shape": ["batch_size", "sequence_length"]} for name in shapes],
        "outputs": [{"name": "logits", "dtype": "float16", "shape": ["batch_size", 3]}],
        "aliases": {},
        "profiles": [{"name": "samples", "shapes": shapes}],
        "engines": [{**engine, **changes.pop("engine", {})}],
    }
    (model / "compile_sparse.json").write_text(json.dumps({**description, **changes}), encoding="utf-8")
    return model


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


# -- vllm


def checkpoint(folder: Path) -> Path:
    model = folder / "model"
    (model / PLUGIN_FOLDER).mkdir(parents=True)
    (model / "config.json").write_text("{}", encoding="utf-8")
    (model / "model.safetensors").write_bytes(b"weights")
    (model / PLUGIN_FOLDER / "entry.py").write_text("", encoding="utf-8")
    return model


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


def test_a_repository_elsewhere(tmp_path: Path) -> None:
    folder, *_ = repository(checkpoint(tmp_path), "vllm", mounted_at="/srv/triton")
    assert json.loads((folder / "1" / "model.json").read_text())["model"] == "/srv/triton/served/1/checkpoint"


def test_copies_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    model = checkpoint(tmp_path)
    folder, written, _ = repository(model, "vllm")
    assert (folder / "1" / "checkpoint" / "model.safetensors").stat().st_nlink == 1
    assert written.files == digests(folder)


def test_known_digests_are_not_computed_again(tmp_path: Path) -> None:
    _, written, _ = repository(checkpoint(tmp_path), "vllm", known={"model.safetensors": "f" * 64})
    assert written.files["served/1/checkpoint/model.safetensors"] == "f" * 64


# -- the deployment


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b", "x" * 129])
def test_names_that_are_no_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="CS1062"):
        repository(checkpoint(tmp_path), "vllm", name=name)


def test_the_deployment_is_installed() -> None:
    assert isinstance(find_deployment("triton"), TritonDeployment)
    with pytest.raises(UsageError) as caught:
        find_deployment("tritn")
    assert caught.value.code == "CS1061" and "'triton'" in caught.value.hint


def test_every_target_is_served_or_refused() -> None:
    deployment = TritonDeployment()
    for target in load_targets().values():
        for kind in ("decoder", "text"):
            codes = [skip.code for skip in deployment.refusals(kind, target)]
            if target.backend == "tensorrt" and kind == "decoder":
                expected = ["CS4621"]
            elif target.backend == "tensorrt":  # its backend loads engines, and those are built on the GPU
                expected = [] if probe_runtime(target).available else ["CS4622"]
            else:
                expected = [] if target.backend in ("onnxruntime", "vllm") else ["CS4620"]
            assert codes == expected, target.name


def test_the_deployment_writes_for_its_target(lowered: Lowered, tmp_path: Path) -> None:
    model = lowered("bert")
    out = model.parent / "triton"
    target = find_target("ort-cpu")
    done = TritonDeployment().write(model, out, name="bert", target=target, largest_batch=4, known={})
    config = parsed((out / "bert" / "config.pbtxt").read_text(encoding="utf-8"))
    assert (config.name, config.max_batch_size) == ("bert", 4)
    assert set(done.files) == {"bert/config.pbtxt", "bert/1/model.onnx", "bert/1/model.onnx.data"}
    with pytest.raises(Refusal, match="CS4620"):
        TritonDeployment().write(model, tmp_path / "t", name="x", target=find_target("null"), largest_batch=4, known={})
