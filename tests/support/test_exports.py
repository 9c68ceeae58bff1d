"""A remembered export is the export: every one is compared when it is written, and here what capture makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from compile_sparse.compiler.capture import capture_model, huggingface
from compile_sparse.compiler.capture.samples import Sample
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.ir.edit import fake_mode_of
from compile_sparse.compiler.ir.fake_propagation import propagate_fake_tensors
from compile_sparse.compiler.ir.program import Program
from compile_sparse.testing.models import build_model, example_inputs
from tests.support.exports import Export, Exports, differences

KINDS = ("llama", "bert_classifier", "swin", "whisper_encoder")
"""Each kind of program; Swin computes sizes and keeps many constants."""


def shapes(program: Program) -> dict[str, str]:
    return {node.name: str(node.meta.get("val")) for node in program.graph.nodes}


@pytest.mark.parametrize("name", KINDS)
def test_a_remembered_program_is_the_captured_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, memory = build_model(name), Exports(tmp_path)
    monkeypatch.setattr(huggingface, "_export", memory.export)
    fresh, restored = capture_model(model), capture_model(model)
    assert memory.fresh == 1
    assert str(restored.graph) == str(fresh.graph)
    assert shapes(restored) == shapes(fresh)
    for part in ("bindings", "inputs", "outputs", "kind", "config", "aliases", "masks"):
        assert getattr(restored, part) == getattr(fresh, part), part
    assert list(restored.weights) == list(fresh.weights)
    for tensor in fresh.weights:
        assert torch.equal(restored.weights.load(tensor), fresh.weights.load(tensor)), tensor
    feeds = example_inputs(fresh, batch=3, length=7)
    wanted, found = Executor(fresh).run(feeds), Executor(restored).run(feeds)
    for output, value in wanted.items():
        assert torch.equal(found[output], value), output
    # Its symbols live on: shapes are propagated from the inputs and compared with what export said.
    before = shapes(restored)
    assert fake_mode_of(restored) is not fake_mode_of(fresh)
    assert shapes(propagate_fake_tensors(restored)) == before


def test_a_model_with_a_method_of_a_test_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class and config are the original's."""
    memory = Exports(tmp_path)
    monkeypatch.setattr(huggingface, "_export", memory.export)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    capture_model(build_model("llama"))
    assert memory.fresh == 0
    assert not list(tmp_path.iterdir())


@pytest.fixture
def bert_exports(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> tuple[Export, Export]:
    """The same export, restored twice."""
    made: list[Export] = []

    def kept(model: PreTrainedModel, sample: Sample) -> Export:
        found = exports.export(model, sample)
        made.append(found)  # type: ignore[arg-type]
        return found  # type: ignore[return-value]

    monkeypatch.setattr(huggingface, "_export", kept)
    for _ in range(2):
        capture_model(build_model("bert"))
    one, other = made
    assert differences(one, other) == []
    return one, other


def test_another_size_is_noticed(bert_exports: tuple[Export, Export]) -> None:
    one, other = bert_exports
    node = next(node for node in other.graph.nodes if node.op == "call_function" and "linear" in node.name)
    node.meta["val"] = node.meta["val"][:, :, 1:]
    assert differences(one, other) == [f"val of {node.name}"]


def test_another_operator_is_noticed(bert_exports: tuple[Export, Export]) -> None:
    one, other = bert_exports
    node = next(node for node in other.graph.nodes if node.target is torch.ops.aten.gelu.default)
    node.target = torch.ops.aten.relu.default
    assert differences(one, other) == ["graphs"]


def test_a_size_that_lost_its_symbol_is_noticed(bert_exports: tuple[Export, Export]) -> None:
    one, other = bert_exports
    node = next(node for node in other.graph.nodes if node.name == "input_ids")
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(2, 5, dtype=torch.long)
    assert differences(one, other) == ["val of input_ids"]


def test_another_config_is_another_export(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: set[str] = set()

    def noted(model: PreTrainedModel, sample: Sample) -> Export:
        keys.add(exports.key(model, sample))
        return exports.export(model, sample)  # type: ignore[return-value]

    monkeypatch.setattr(huggingface, "_export", noted)
    for name in ("llama", "llama_tied", "qwen2", "llama"):
        capture_model(build_model(name))
    assert len(keys) == 3
