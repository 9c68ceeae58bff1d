"""The folder itself: shards, types, copied files, memory."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import safe_open

from compile_sparse.backends.checkpoint.architecture import architecture_of
from compile_sparse.backends.checkpoint.checkpoint import write_checkpoint
from compile_sparse.backends.checkpoint.disk_form import on_disk
from compile_sparse.backends.checkpoint.shards import write_shards
from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.files.digests import digest_file
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import AbsentTensor, DerivedTensor, ResidentTensor
from compile_sparse.compiler.progress import SilentProgress
from tests.huggingface.emitting import load, same


def test_shards_and_index(tiny_llama_program: Program, tmp_path: Path) -> None:
    written = write_checkpoint(tiny_llama_program, tmp_path, SilentProgress(), shard_bytes=50_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert all(path.stat().st_size < 50_000 + 5_000 for path in shards)
    for path in shards:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert all(index["weight_map"][name] == path.name for name in file.keys())  # noqa: SIM118  not a mapping
    assert index["metadata"]["total_size"] == 4 * tiny_llama_program.parameter_count()
    assert written.files == {path.name: digest_file(path)[0] for path in tmp_path.iterdir()}
    same(tiny_llama_program, tmp_path)


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    tensors = {name: ResidentTensor(torch.zeros(size)) for name, size in (("a", 2), ("b", 100), ("c", 2))}
    files = write_shards(tmp_path, tensors, shard_bytes=16)
    assert sorted(files)[:3] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_a_tied_tensor_is_stored_once(captured, tmp_path: Path) -> None:
    write_checkpoint(captured("llama_tied"), tmp_path, SilentProgress())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_one_tensor_in_memory_at_a_time(captured, tmp_path: Path) -> None:
    """Also where a fused tensor is taken apart: its source is read once, and dropped before the next is."""
    program = captured("mixtral")
    alive, most, loads = 0, 0, 0

    def counted(source):
        def compute() -> torch.Tensor:
            nonlocal alive, most, loads
            value = source.load().clone()
            alive, loads = alive + 1, loads + 1
            most = max(most, alive)

            def gone() -> None:
                nonlocal alive
                alive -= 1

            weakref.finalize(value, gone)
            return value

        return DerivedTensor(tuple(source.shape), source.dtype, compute)

    architecture = architecture_of(program.config)
    model = architecture.on_meta(architecture.parsed(architecture.config))
    sources = {name: counted(program.weights[name]) for name in model.state_dict() if name in program.weights}
    write_shards(tmp_path, on_disk(model, sources))
    assert loads == len(sources)
    assert most <= 2  # the next is loaded before the name of the last is rebound


def test_from_a_folder_and_back(tmp_path: Path) -> None:
    """bfloat16 on disk, float32 in the program: the folder says what it holds; tokenizer files come along, pickles do not."""
    source, out = tmp_path / "source", tmp_path / "out"
    config = hf.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        dtype="bfloat16",
    )
    hf.LlamaForCausalLM(config).bfloat16().save_pretrained(source)
    (source / "tokenizer_config.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("not a pickle")
    program = capture(open_folder(source))
    out.mkdir()
    write_checkpoint(program, out, SilentProgress())
    described = json.loads((out / "config.json").read_text())
    assert described["dtype"] == "float32"
    assert described["architectures"] == ["LlamaForCausalLM"]
    assert not any(key.startswith("_") for key in described)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    assert load(out).dtype == torch.float32
    same(program, out)


def test_without_weights(tiny_llama_program: Program, tmp_path: Path) -> None:
    absent = {n: AbsentTensor(tuple(s.shape), s.dtype, n) for n, s in tiny_llama_program.weights.items()}
    program = replace(tiny_llama_program, weights=tiny_llama_program.weights.updated(absent))
    with pytest.raises(ModelError, match="CS2001"):
        write_checkpoint(program, tmp_path, SilentProgress())
