"""The dense program against transformers: right for every kind of model, and any wrong tensor or graph is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from compile_sparse.compiler.artifact.report import SourceSection
from compile_sparse.compiler.capture import bind, capture, huggingface, open_folder
from compile_sparse.compiler.capture.loading import load_class
from compile_sparse.compiler.capture.stored import stored_tensors
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import DerivedTensor, TensorSource
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.verify.class_outputs import class_arguments, program_inputs
from compile_sparse.compiler.verify.source_model import check_source
from compile_sparse.testing.models import build_model

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def saved(name: str, folder: Path) -> Path:
    build_model(name).save_pretrained(folder)
    return folder


def change(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """Add tensors to the file and keys to the config."""
    weights = folder / "model.safetensors"
    save_file({**load_file(weights), **tensors}, weights, {"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def checked(folder: Path, program: Program | None = None) -> SourceSection:
    opened = open_folder(folder)
    program = capture(opened) if program is None else program
    stored = stored_tensors(opened, torch.float32)
    return check_source(program, load_class(opened.model_class, opened.config, stored, torch.float32), SilentProgress())


def error_to_transformers(program: Program, folder: Path) -> float:
    """Of the first output, relative; ``from_pretrained`` is what is right."""
    opened = open_folder(folder)
    model = opened.model_class.from_pretrained(folder, dtype=torch.float32)
    inputs = program_inputs(program)
    mine = Executor(program).run(inputs)
    with torch.no_grad():
        theirs = model(**class_arguments(program, inputs))
    name = next(iter(theirs))
    return float((mine[name] - theirs[name]).norm() / theirs[name].norm())


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "gpt2", "mixtral", "gemma2", "bert", "vit", "swin", "t5_encoder"]
)
def test_a_right_program_passes(name: str, tmp_path: Path) -> None:
    found = checked(saved(name, tmp_path))
    assert found.tensors > 10
    assert not found.unused
    assert not found.not_run
    assert found.difference is not None
    assert found.bound is not None
    assert found.difference <= found.bound < 1e-3


def test_a_head_with_values_of_its_own_is_kept_whatever_the_config_says(tmp_path: Path) -> None:
    folder = saved("llama_tied", tmp_path)
    head = torch.randn(load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape)
    program = capture(open_folder(change(folder, {"lm_head.weight": head})))
    assert program.aliases == {}
    assert program.config["tie_word_embeddings"] is False
    assert error_to_transformers(program, folder) < 1e-5
    assert checked(folder, program).difference is not None


def test_a_head_that_is_stored_twice_is_still_one(tmp_path: Path) -> None:
    folder = saved("llama_tied", tmp_path)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    program = capture(open_folder(change(folder, {"lm_head.weight": embedding.clone()})))
    assert len(program.aliases) == 1
    assert program.config["tie_word_embeddings"] is True


@pytest.mark.parametrize("other", ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"])
def test_every_tied_pair_is_looked_at(other: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.BertForMaskedLM(hf.BertConfig(**SIZES, vocab_size=50, max_position_embeddings=32)).eval()
    model.save_pretrained(tmp_path)
    shape = model.state_dict()[other].shape
    program = capture(open_folder(change(tmp_path, {other: torch.randn(shape)})))
    assert error_to_transformers(program, tmp_path) < 1e-5
    assert checked(tmp_path, program).difference is not None
    if other.endswith("weight"):  # the biases stay tied
        assert len(program.aliases) == 1


def test_a_tied_tensor_stored_under_its_other_name_only_is_found(tmp_path: Path) -> None:
    folder = saved("llama_tied", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    program = capture(open_folder(folder))
    assert error_to_transformers(program, folder) < 1e-5
    assert checked(folder, program).difference is not None


def test_a_tensor_bound_to_another_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama", tmp_path)
    one, two = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))

    def wrong(*arguments: Any) -> dict[str, TensorSource]:
        sources = bind.bind_weights(*arguments)
        return {**sources, one: sources[two], two: sources[one]}

    monkeypatch.setattr(huggingface, "bind_weights", wrong)
    program = capture(open_folder(folder))
    with pytest.raises(ModelError) as caught:
        checked(folder, program)
    assert (caught.value.code, caught.value.exit_code) == ("CS2011", 4)
    assert caught.value.where in (one, two)


def test_one_wrong_element_is_found(tmp_path: Path) -> None:
    folder = saved("bert", tmp_path)
    program = capture(open_folder(folder))
    name = "encoder.layer.1.output.dense.bias"
    right = program.weights[name]

    def compute() -> torch.Tensor:
        value = right.load().clone()
        value[3] = torch.nextafter(value[3], torch.tensor(9.0))
        return value

    wrong = program.weights.updated({name: DerivedTensor(right.shape, right.dtype, compute)})
    object.__setattr__(program, "weights", wrong)
    with pytest.raises(ModelError, match=r"'encoder\.layer\.1\.output\.dense\.bias'") as caught:
        checked(folder, program)
    assert "1 of 64 elements" in caught.value.why


@pytest.mark.parametrize("layer", [0, 1])
def test_a_graph_that_computes_something_else_is_named_by_its_block(layer: int, tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    program = capture(open_folder(folder)).clone()
    silu = [node for node in program.graph.nodes if node.target is torch.ops.aten.silu.default][layer]
    silu.target = torch.ops.aten.relu.default
    with pytest.raises(ModelError) as caught:
        checked(folder, program)
    assert (caught.value.code, caught.value.where) == ("CS2011", f"model.layers.{layer}")


@pytest.fixture
def with_biases(tmp_path: Path) -> Path:
    """Trained biases that the config switches off."""
    config = hf.LlamaConfig(**SIZES, num_key_value_heads=1, vocab_size=50, attention_bias=True, mlp_bias=True)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return change(tmp_path, {}, attention_bias=False, mlp_bias=False)


def test_tensors_that_the_model_does_not_use_are_named(with_biases: Path) -> None:
    _, info = hf.LlamaForCausalLM.from_pretrained(with_biases, output_loading_info=True)
    found = checked(with_biases)
    assert set(found.unused) == set(info["unexpected_keys"])
    assert len(found.unused) == 7
    (said,) = found.skips
    assert said.code == "CS2012"
    assert "7 tensors" in said.why


def test_tensors_that_transformers_ignores_are_not_held_against_the_folder(tmp_path: Path) -> None:
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in (0, 1)}
    folder = change(saved("llama", tmp_path), old)
    assert checked(folder).unused == ()


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_what_transformers_converts_on_load_is_compared_after_it(name: str, tmp_path: Path) -> None:
    """Fused experts, and a checkpoint without the prefix of the base model."""
    folder = saved(name, tmp_path)
    weights = load_file(folder / "model.safetensors")
    if name == "gpt2":
        weights = {key.removeprefix("transformer."): value for key, value in weights.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    program = capture(open_folder(folder))
    assert error_to_transformers(program, folder) < 1e-5
    assert checked(folder, program).tensors == len(program.bindings.keys() & program.bindings.keys()) - _buffers(
        program
    )


def _buffers(program: Program) -> int:
    return sum(binding.kind == "buffer" for binding in program.bindings.values())


def test_a_forward_that_cannot_be_run_is_said_and_tensors_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(hf.BertModel, "forward", fails)
    folder = saved("bert", tmp_path)
    monkeypatch.undo()
    program = capture(open_folder(folder))
    monkeypatch.setattr(hf.BertModel, "forward", fails)
    found = checked(folder, program)
    assert found.not_run == "NotImplementedError: no such kernel"
    assert found.tensors > 10
    assert found.difference is None
