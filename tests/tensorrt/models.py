"""Small random models whose layers are large enough for sparse kernels (but for keys and values): width 384, heads of 64."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tests.random_weights import randomised

__all__ = ["CONTEXT", "DECODERS", "OTHERS", "VOCABULARY", "build"]

VOCABULARY, CONTEXT = 256, 128
_WIDTH, _INNER, _HEADS = 384, 512, 6
_GROUPED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": _WIDTH,
    "intermediate_size": _INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": _WIDTH,
    "intermediate_size": _INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": _HEADS,
}

DECODERS = ("llama", "qwen2", "mistral", "gpt2")
OTHERS = ("bert", "vit", "resnet")


def build(name: str) -> hf.PreTrainedModel:
    """The model called ``name`` in evaluation mode, float32, the same weights every time."""
    torch.manual_seed(0)
    model = _make(name)
    model = randomised(model) if name != "resnet" else model.eval()  # its own initial weights keep activations in range
    generator = torch.Generator().manual_seed(1)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
        elif key.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def _make(name: str) -> hf.PreTrainedModel:
    if name == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED))
    if name == "qwen2":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED, tie_word_embeddings=True))
    if name == "mistral":  # every layer has a sliding window
        return hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED, sliding_window=6))
    if name == "gpt2":
        sizes: dict[str, Any] = {"n_embd": _WIDTH, "n_inner": _INNER, "n_layer": 2, "n_head": _HEADS}
        ids = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "bos_token_id": 1, "eos_token_id": 2}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **ids))
    if name == "bert":
        config = hf.BertConfig(**_ENCODER, vocab_size=VOCABULARY, max_position_embeddings=64, num_labels=3)
        return hf.BertForSequenceClassification(config)
    if name == "vit":
        return hf.ViTForImageClassification(hf.ViTConfig(**_ENCODER, image_size=32, patch_size=8, num_labels=5))
    sizes = {"embedding_size": 32, "hidden_sizes": [64, 128], "depths": [1, 1], "layer_type": "basic"}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes, num_labels=5))
