"""Tiny random models of every supported family; norms and biases are randomised because zeros and ones hide mistakes."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

__all__ = ["DECODERS", "ENCODERS", "build"]

_LLAMA_LIKE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT_LIKE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 88,
}

DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "opt")
ENCODERS = ("bert", "vit")


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The model called ``name`` in evaluation mode, float32."""
    torch.manual_seed(seed)
    model = _make(name)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.dim() == 1:
                value.add_(torch.randn_like(value) * 0.1)
            elif "embed" in key or "wte" in key or "wpe" in key:
                value.copy_(torch.randn_like(value) * 0.5)
            else:
                value.copy_(torch.randn_like(value) / value.shape[-1] ** 0.5)
    return model.eval()


def _make(name: str) -> PreTrainedModel:
    t = transformers
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**_LLAMA_LIKE))
    if name == "qwen2":
        return t.Qwen2ForCausalLM(t.Qwen2Config(**_LLAMA_LIKE, tie_word_embeddings=True))
    if name == "qwen3":
        return t.Qwen3ForCausalLM(t.Qwen3Config(**_LLAMA_LIKE, head_dim=32))
    if name == "mistral":  # every layer has a sliding window
        return t.MistralForCausalLM(t.MistralConfig(**_LLAMA_LIKE, sliding_window=6))
    if name == "gpt2":
        return t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2)
        )
    if name == "opt":
        return t.OPTForCausalLM(
            t.OPTConfig(
                vocab_size=96,
                hidden_size=64,
                ffn_dim=88,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                word_embed_proj_dim=64,
            )
        )
    if name == "bert":
        return t.BertForSequenceClassification(
            t.BertConfig(**_BERT_LIKE, vocab_size=96, max_position_embeddings=64, num_labels=3)
        )
    return t.ViTForImageClassification(t.ViTConfig(**_BERT_LIKE, image_size=32, patch_size=8, num_labels=5))
