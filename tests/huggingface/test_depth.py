"""Whole blocks removed: names are counted anew, lists in the config lose their entries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from compile_sparse.backends.checkpoint.checkpoint import write_checkpoint
from compile_sparse.backends.checkpoint.tensors import Stack, read_tensors
from compile_sparse.compiler.capture import capture_model
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.residual.branches import find_blocks
from compile_sparse.compiler.residual.remove import drop_branches
from tests.huggingface.emitting import pruned, same

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def randomised(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * (0.3 if parameter.ndim == 1 else 0.15) + ("norm" in name)
    return model.eval()


def without(program: Program, *blocks: int) -> Program:
    found = find_blocks(program)
    return drop_branches(program, [branch for number in blocks for branch in found[number].branches]).program


@pytest.fixture(scope="module")
def mixed_windows() -> Program:
    """Four layers, a window of 4 tokens on the first and the last."""
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    config = hf.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, layer_types=kinds)
    return capture_model(randomised(hf.Qwen2ForCausalLM(config)))


@pytest.mark.parametrize(
    ("gone", "kinds"),
    [
        ((0,), ["full_attention", "full_attention", "sliding_attention"]),
        ((1, 3), ["sliding_attention", "full_attention"]),
    ],
)
def test_blocks_and_their_entries_go(
    gone: tuple[int, ...], kinds: list[str], mixed_windows: Program, tmp_path: Path
) -> None:
    program = without(mixed_windows, *gone)
    written = write_checkpoint(program, tmp_path, SilentProgress())
    assert written.changes["num_hidden_layers"] == 4 - len(gone)
    assert written.changes["layer_types"] == kinds
    same(program, tmp_path)


def test_depth_and_channels_together(mixed_windows: Program, tmp_path: Path) -> None:
    # 88 to 66 and 4 to 3 layers have the same ratio.
    program = pruned(without(mixed_windows, 2), ("channels", 88, 66))
    written = write_checkpoint(program, tmp_path, SilentProgress())
    assert set(written.changes) == {"num_hidden_layers", "layer_types", "intermediate_size"}
    same(program, tmp_path)


def test_gpt2(captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = without(captured("gpt2"), 0)
    assert write_checkpoint(program, tmp_path, SilentProgress()).changes == {"n_layer": 1}
    same(program, tmp_path)


def test_half_a_block_is_not_a_layer(tiny_llama_program: Program, tmp_path: Path) -> None:
    mlp = find_blocks(tiny_llama_program)[0].branches[1]
    with pytest.raises(Refusal, match="CS4206") as caught:
        write_checkpoint(drop_branches(tiny_llama_program, [mlp]).program, tmp_path, SilentProgress())
    assert "model.layers.#.mlp" in caught.value.where


def test_gaps_are_closed_where_the_architecture_counts_without_gaps(tiny_llama_program: Program) -> None:
    program = without(tiny_llama_program, 0)
    before = {name: tuple(source.shape) for name, source in tiny_llama_program.weights.items()}
    tensors = read_tensors(program, before)
    assert tensors.stacks == (Stack("model.layers", 2, (1,)),)
    assert set(tensors.sources) == {n for n in before if "layers.1" not in n}
    moved = tensors.sources["model.layers.0.mlp.up_proj.weight"].load()
    assert torch.equal(moved, tiny_llama_program.weights.load("model.layers.1.mlp.up_proj.weight"))
