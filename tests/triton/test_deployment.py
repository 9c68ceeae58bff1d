"""Where a repository is written, what it is called, and which targets are served."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from compile_sparse.backends.tensorrt.processor import probe_runtime
from compile_sparse.backends.triton.deployment import TritonDeployment
from compile_sparse.compiler.errors import Refusal, UsageError
from compile_sparse.compiler.extension.deployments import find_deployment
from compile_sparse.compiler.targets.target import find_target, load_targets
from tests.triton.conftest import Lowered
from tests.triton.model_folders import checkpoint
from tests.triton.protobuf import parsed
from tests.triton.reading import digests, repository


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
    names = ("config.pbtxt", "1/model.onnx", "1/model.onnx.data", "1/config.json")
    assert set(done.files) == {f"bert/{name}" for name in names}
    with pytest.raises(Refusal, match="CS4620"):
        TritonDeployment().write(model, tmp_path / "t", name="x", target=find_target("null"), largest_batch=4, known={})
