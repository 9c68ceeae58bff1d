"""Tensors stored in pieces: the lazy result is what transformers' own operations compute, piece by piece."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from compile_sparse.compiler.capture.assemble import CannotAssemble, assembled
from compile_sparse.compiler.capture.bind import bind_weights, renamed
from compile_sparse.compiler.capture.safetensors_reader import read_checkpoint
from compile_sparse.compiler.capture.skeleton import build_skeleton, new_fake_mode
from compile_sparse.compiler.capture.weight_files import weight_files
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import DerivedTensor, ResidentTensor, TensorSource

UP, GATE = "experts.*.up.weight", "experts.*.gate.weight"


def tensors(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


CONVERSIONS: dict[str, tuple[Callable[[], WeightConverter], dict[str, list[Tensor]], str]] = {
    "stack": (
        lambda: WeightConverter(UP, "experts.up", [MergeModulelist(dim=0)]),
        {UP: tensors(11, 3, 5)},
        "l.0.experts.up",
    ),
    "stack on the last dimension": (
        lambda: WeightConverter(UP, "experts.up", [MergeModulelist(dim=2)]),
        {UP: tensors(4, 3, 5)},
        "l.0.experts.up",
    ),
    "stack and join": (
        lambda: WeightConverter([GATE, UP], "experts.both", [MergeModulelist(dim=0), Concatenate(dim=1)]),
        {UP: tensors(4, 3, 5), GATE: tensors(4, 2, 5, seed=1)},  # found in another order than the patterns
        "l.0.experts.both",
    ),
    "join": (
        lambda: WeightConverter(["q.weight", "k.weight"], "qk.weight", [Concatenate(dim=0)]),
        {"q.weight": tensors(1, 6, 5), "k.weight": tensors(1, 2, 5, seed=1)},
        "l.0.qk.weight",
    ),
    "transpose": (
        lambda: WeightConverter("w.kernel", "w.weight", [Transpose(0, 1)]),
        {"w.kernel": tensors(1, 3, 5)},
        "l.0.w.weight",
    ),
    "chunk": (
        lambda: WeightConverter("qkv.weight", ["q.weight", "k.weight", "v.weight"], [Chunk(dim=0)]),
        {"qkv.weight": tensors(1, 12, 5)},
        "l.0.q.weight",
    ),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_assembly_equals_the_operations_of_transformers(name: str) -> None:
    make, pieces, target = CONVERSIONS[name]
    own = make()
    for pattern, found in pieces.items():
        for value in found:
            own.add_tensor(target, target, pattern, lambda value=value: value)  # type: ignore[misc]
    expected = own.convert(target)
    sources = {pattern: [ResidentTensor(value) for value in found] for pattern, found in pieces.items()}
    found = assembled(make(), target, sources, {})
    assert found.keys() == expected.keys()
    for key, source in found.items():
        assert source.shape == tuple(expected[key].shape)
        assert torch.equal(source.load(), expected[key])


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 3)])
def test_a_checked_transposition_follows_the_stored_shape(shape: tuple[int, ...]) -> None:
    converter = WeightConverter("e.up", "e.up", [Transpose(1, 2, check_dims=True)])
    (value,) = tensors(1, *shape)
    found = assembled(converter, "l.e.up", {"e.up": [ResidentTensor(value)]}, {"l.e.up": (2, 3, 5)})
    assert torch.equal(found["l.e.up"].load(), value if shape == (2, 3, 5) else value.transpose(1, 2))


class Halves(Chunk):
    """Means something else than its base class."""


@pytest.mark.parametrize(
    ("converter", "pieces", "why"),
    [
        (WeightConverter("a.w", "b.w", [Interleave(dim=0)]), {"a.w": tensors(1, 4, 5)}, "Interleave"),
        (WeightConverter("a.w", ["b.w", "c.w"], [Halves(dim=0)]), {"a.w": tensors(1, 4, 5)}, "Halves"),
        (WeightConverter("a.w", ["b.w", "c.w"], [Chunk(dim=0)]), {"a.w": tensors(1, 5, 5)}, "equal parts"),
        (
            WeightConverter(UP, "b.w", [MergeModulelist(dim=0)]),
            {UP: [*tensors(1, 4, 5), *tensors(1, 3, 5)]},
            "different shapes",
        ),
        (
            WeightConverter(["a.w", "c.w"], "b.w", [Concatenate(dim=0)]),
            {"a.w": tensors(1, 4, 5), "c.w": tensors(1, 4, 6)},
            "do not fit",
        ),
        (
            WeightConverter(["a.w", "c.w"], "b.w", [Concatenate(dim=0)]),
            {"a.w": tensors(1, 4, 5), "c.w": [torch.zeros(4, 5, dtype=torch.int8)]},
            "different dtypes",
        ),
    ],
)
def test_what_is_unknown_or_does_not_fit_is_refused(
    converter: WeightConverter, pieces: dict[str, list[Tensor]], why: str
) -> None:
    sources = {pattern: [ResidentTensor(value) for value in found] for pattern, found in pieces.items()}
    with pytest.raises(CannotAssemble, match=why):
        assembled(converter, "l.b.w", sources, {})


def test_one_piece_is_in_memory_at_a_time() -> None:
    alive: list[int] = []

    class Watched:
        shape, dtype = (3, 5), torch.float32

        def load(self) -> Tensor:
            assert not alive, "another piece is still in memory"
            value = torch.ones(3, 5)
            alive.append(1)
            weakref.finalize(value, alive.clear)
            return value

    converter = WeightConverter([GATE, UP], "experts.both", [MergeModulelist(dim=0), Concatenate(dim=1)])
    pieces: dict[str, list[TensorSource]] = {GATE: [Watched() for _ in range(4)], UP: [Watched() for _ in range(4)]}
    source = assembled(converter, "l.experts.both", pieces, {})["l.experts.both"]
    assert source.shape == (4, 6, 5)
    assert torch.equal(source.load(), torch.ones(4, 6, 5))


SMALL = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "moe_intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "num_experts": 11,  # the tenth comes after the second
    "num_local_experts": 11,
}
FUSED = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SMALL)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**SMALL, shared_expert_intermediate_size=6)),
}


def stored_and_bound(model: hf.PreTrainedModel, folder: Path) -> tuple[set[str], dict[str, TensorSource]]:
    stored = read_checkpoint(weight_files(folder), torch.float32)
    skeleton = build_skeleton(type(model), model.config, torch.float32, new_fake_mode())
    return set(stored), bind_weights(skeleton, renamed(skeleton, stored))


@pytest.mark.parametrize("name", FUSED)
def test_every_tensor_of_a_checkpoint_with_experts_is_read(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FUSED[name]()
    model.save_pretrained(tmp_path)
    stored, bound = stored_and_bound(model, tmp_path)
    wanted = model.state_dict()
    assert bound.keys() == wanted.keys()
    fused = [key for key, source in bound.items() if isinstance(source, DerivedTensor)]
    assert fused
    assert not stored & set(fused)
    for key, source in bound.items():
        assert source.shape == tuple(wanted[key].shape)
        assert torch.equal(source.load(), wanted[key]), key


def test_a_missing_expert_is_named_with_both_shapes(tmp_path: Path) -> None:
    model = FUSED["mixtral"]()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".experts.10.w2" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        stored_and_bound(model, tmp_path)
    assert caught.value.code == "CS2005"
    assert "experts.down_proj is [10, 8, 12], the config implies [11, 8, 12]" in caught.value.why


def test_a_conversion_that_is_not_known_names_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FUSED["mixtral"]()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("compile_sparse.compiler.capture.assemble.MergeModulelist", Halves)
    with pytest.raises(ModelError) as caught:
        stored_and_bound(model, tmp_path)
    assert caught.value.code == "CS2009"
    assert "MergeModulelist" in caught.value.why
    assert ".experts.0." in caught.value.where


def test_logits_from_disk_are_those_of_transformers(
    from_disk: Callable[[str], Program], saved: Callable[[str], Path]
) -> None:
    """Bit for bit: the same GEMMs in the same order, once the experts are computed in the same way."""
    ids = torch.tensor([[5, 17, 40, 8, 33, 2, 71], [9, 3, 3, 60, 1, 1, 88]])
    program = from_disk("qwen3_moe")
    model = hf.Qwen3MoeForCausalLM.from_pretrained(saved("qwen3_moe"), experts_implementation="batched_mm").eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    found = Executor(program).run(decoder_inputs(program, ids))["logits"]
    assert torch.equal(found, expected)
