"""Tiny random models of every supported family.

Norms, biases and batch-norm statistics are random: with their default initial values (ones and zeros) a wrong coupling can go
unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from compile_sparse.compiler.ir.program import Program
from compile_sparse.testing.encoders import ENCODERS

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

# Sizes that must not couple differ: hidden 48, 3 key heads of 2 query heads each, head size 10 (5 rotary pairs).
_DISTINCT: dict[str, Any] = {
    **_BASE,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
}
_WINDOW = 4  # shorter than any sequence in the tests

# Hidden 60, 5 heads of 12, of which 6 are rotated (3 pairs) and 6 are not.
_PARTIAL: dict[str, Any] = {**_BASE, "hidden_size": 60, "num_attention_heads": 5}


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


def _phi3() -> hf.Phi3Config:
    sizes = {key: value for key, value in _DISTINCT.items() if key != "head_dim"}  # always hidden / heads here: 8
    return hf.Phi3Config(**sizes)


def _gptj() -> hf.GPTJConfig:
    return hf.GPTJConfig(
        n_embd=60,
        n_layer=_LAYERS,
        n_head=5,
        n_inner=_MLP,
        rotary_dim=6,
        n_positions=64,
        vocab_size=_VOCAB,
        bos_token_id=1,
        eos_token_id=2,
    )


def _gemma(config: type[hf.PretrainedConfig]) -> hf.PretrainedConfig:
    kinds = ["sliding_attention", "full_attention"]
    return config(**_DISTINCT, query_pre_attn_scalar=10, sliding_window=_WINDOW, layer_types=kinds)


def _qwen3_moe() -> hf.Qwen3MoeConfig:
    return hf.Qwen3MoeConfig(**_DISTINCT, num_experts=7, num_experts_per_tok=2, moe_intermediate_size=40)


MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "llama_tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED, head_dim=16)),
    "gpt2": lambda: hf.GPT2LMHeadModel(_gpt2()),
    "opt": lambda: hf.OPTForCausalLM(_opt()),
    "phi3": lambda: hf.Phi3ForCausalLM(_phi3()),
    "gemma2": lambda: hf.Gemma2ForCausalLM(_gemma(hf.Gemma2Config)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(_gemma(hf.Gemma3TextConfig)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_DISTINCT, sliding_window=_WINDOW)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_PARTIAL, rotary_pct=0.5)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_PARTIAL, partial_rotary_factor=0.5)),
    "gptj": lambda: hf.GPTJForCausalLM(_gptj()),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_DISTINCT, num_local_experts=7)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(_qwen3_moe()),
    **ENCODERS,
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
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
        elif key.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
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
        elif entry.role in ("pixel_values", "input_features"):
            value = torch.randn(batch, *shape[1:], generator=generator)
        else:
            value = torch.randn(batch, shape[1], past, shape[3], generator=generator)
        out[entry.name] = value
    return out
