"""Tiny random models of every supported family.

Norms and biases are random: with their default initial values (ones and zeros) a wrong coupling can go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from compile_sparse.compiler.program import Program

__all__ = ["MODELS", "build_model", "example_inputs"]

_HIDDEN, _MLP, _LAYERS, _HEADS, _KV_HEADS, _VOCAB = 64, 88, 2, 8, 4, 96
_BASE: dict[str, Any] = {
    "hidden_size": _HIDDEN,
    "intermediate_size": _MLP,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "vocab_size": _VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_BASE, "num_key_value_heads": _KV_HEADS}


def _gpt2() -> hf.GPT2Config:
    return hf.GPT2Config(
        n_embd=_HIDDEN,
        n_layer=_LAYERS,
        n_head=_HEADS,
        n_positions=64,
        vocab_size=_VOCAB,
        n_inner=_MLP,
        bos_token_id=1,
        eos_token_id=2,
    )


def _opt() -> hf.OPTConfig:
    return hf.OPTConfig(
        hidden_size=_HIDDEN,
        ffn_dim=_MLP,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        vocab_size=_VOCAB,
        max_position_embeddings=64,
        word_embed_proj_dim=_HIDDEN,
    )


def _vit() -> hf.ViTConfig:
    return hf.ViTConfig(
        hidden_size=_HIDDEN,
        intermediate_size=_MLP,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        image_size=16,
        patch_size=4,
    )


MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "llama_tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED, head_dim=16)),
    "gpt2": lambda: hf.GPT2LMHeadModel(_gpt2()),
    "opt": lambda: hf.OPTForCausalLM(_opt()),
    "bert": lambda: hf.BertModel(hf.BertConfig(**_BASE)),
    "vit": lambda: hf.ViTModel(_vit()),
}


def build_model(name: str) -> hf.PreTrainedModel:
    """The model called ``name`` in evaluation mode, the same weights every time."""
    torch.manual_seed(0)
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        centre = 1.0 if parameter.ndim == 1 and "norm" in key.lower().replace("ln_", "norm") else 0.0
        parameter.data = noise * (0.3 if parameter.ndim == 1 else 0.15) + centre
    return model.eval()


def example_inputs(program: Program, batch: int, length: int, past: int = 5) -> dict[str, torch.Tensor]:
    """Random inputs by public name; a decoder's cache holds ``past`` random positions."""
    generator = torch.Generator().manual_seed(100 * batch + length)
    out: dict[str, torch.Tensor] = {}
    seen = length + (past if program.kind == "decoder" else 0)
    for entry in program.inputs:
        shape = program.node(entry.placeholder).meta["val"].shape
        if entry.role == "input_ids":
            value = torch.randint(3, _VOCAB, (batch, length), generator=generator)
        elif entry.role == "attention_mask":
            value = torch.ones(batch, seen, dtype=torch.long)
        elif entry.role == "position_ids":
            value = torch.arange(past, seen).repeat(batch, 1)
        elif entry.role == "token_type_ids":
            value = torch.zeros(batch, length, dtype=torch.long)
        elif entry.role == "pixel_values":
            value = torch.randn(batch, *shape[1:], generator=generator)
        else:
            value = torch.randn(batch, shape[1], past, shape[3], generator=generator)
        out[entry.name] = value
    return out
