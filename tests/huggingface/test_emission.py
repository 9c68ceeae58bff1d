"""What is written loads with from_pretrained and computes what the program computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compile_sparse.backends.checkpoint.checkpoint import plan_checkpoint, write_checkpoint
from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from tests.huggingface.emitting import pruned, same

KV, Q, MLP, WIDTH = ("heads", 4, 2), ("heads", 2, 1), ("channels", 88, 66), ("width", 64, 48)
CASES = {
    "llama-dense": ("llama", (), {}),
    "llama-channels": ("llama", (MLP,), {"intermediate_size": 66}),
    "llama-heads": ("llama", (KV,), {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "llama-query-heads": ("llama", (Q,), {"num_attention_heads": 4}),
    "llama-all": (
        "llama",
        (MLP, ("heads", 4, 3), WIDTH),
        {"hidden_size": 48, "intermediate_size": 66, "num_attention_heads": 6, "num_key_value_heads": 3},
    ),
    "llama_tied-width": ("llama_tied", (WIDTH, MLP), {"hidden_size": 48, "intermediate_size": 66}),
    "qwen2-heads": ("qwen2", (KV,), {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}),
    "qwen3-all": (
        "qwen3",
        (MLP, KV, WIDTH),
        {"hidden_size": 48, "intermediate_size": 66, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "gpt2-channels": ("gpt2", (MLP,), {"n_inner": 66}),
    # The same shapes fit n_head=8, which computes something else.
    "gpt2-heads-width": ("gpt2", (("heads", 8, 6), WIDTH), {"n_embd": 48, "n_head": 6}),
    "opt-channels": ("opt", (MLP,), {"ffn_dim": 66}),
    "opt-heads-width": (
        "opt",
        (("heads", 8, 6), WIDTH),
        {"hidden_size": 48, "word_embed_proj_dim": 48, "num_attention_heads": 6},
    ),
    "phi3-channels": ("phi3", (MLP,), {"intermediate_size": 66}),
    "gemma2-channels": ("gemma2", (MLP,), {"intermediate_size": 66}),
    "mixtral-experts": (
        "mixtral",
        # transformers' own kernel for experts wants rows of whole 16 bytes.
        (("experts", 7, 5), ("channels", 88, 64)),
        {"num_local_experts": 5, "intermediate_size": 64},
    ),
    "qwen3_moe-experts": ("qwen3_moe", (("experts", 7, 5),), {"num_local_experts": 5}),
    "bert-channels": ("bert", (MLP,), {"intermediate_size": 66}),
    "vit-channels": ("vit", (MLP,), {"intermediate_size": 66}),
    "bert-dense": ("bert", (), {}),
    # Queries and keys share a tensor and keep different numbers of heads.
    "phi3-heads": (
        "phi3",
        (("heads", 3, 2),),
        {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_folder_loads_and_matches(case: str, captured: Callable[[str], Program], tmp_path: Path) -> None:
    name, wanted, changes = CASES[case]
    program = pruned(captured(name), *wanted) if wanted else captured(name)
    written = write_checkpoint(program, tmp_path, SilentProgress())
    assert written.changes == changes
    assert {path.name for path in tmp_path.iterdir()} == set(written.files)
    same(program, tmp_path)


def test_widths_of_stages(captured: Callable[[str], Program], tmp_path: Path) -> None:
    """Fields that are lists; and counters of batches, which no output depends on, stay behind."""
    program = captured("resnet")
    sizes = {group.size for group in analyse(program).prunable("conv")}
    smaller = pruned(program, *(("conv", size, size * 3 // 4) for size in sorted(sizes)))
    written = write_checkpoint(smaller, tmp_path, SilentProgress())
    assert {name.split(".")[0] for name in written.changes} == {"embedding_size", "hidden_sizes"}
    assert written.unused and all(name.endswith("num_batches_tracked") for name in written.unused)
    same(smaller, tmp_path, written.unused)


def test_experts_are_stored_one_by_one(captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = pruned(captured("mixtral"), ("experts", 7, 5))
    write_checkpoint(program, tmp_path, SilentProgress())
    size = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    names = json.loads((tmp_path / "model.safetensors").read_bytes()[8 : 8 + size])
    assert "model.layers.0.block_sparse_moe.experts.4.w1.weight" in names
    assert not any("gate_up_proj" in name or "experts.5" in name for name in names)


def test_a_plan_finds_the_same_config_without_weights(captured: Callable[[str], Program]) -> None:
    program = pruned(captured("llama"), MLP, KV)
    found = plan_checkpoint(program)
    assert {".".join(path): value for path, value in found.changes.items()} == {
        "intermediate_size": 66,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    assert found.verdict is None
