"""Random models of the families that runtimes serve: ``SMALL`` for runtimes that take any size, ``WIDE`` for sparse kernels.

Sparse kernels want large layers; in wide models all are, but keys and values. Norms and biases are randomised, because zeros
and ones hide mistakes. The same weights every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

from tests.random_weights import randomised

__all__ = ["SMALL", "WIDE", "Sizes", "build_served"]


@dataclass(frozen=True)
class Sizes:
    """What the models of one size have in common, and the families that exist in it."""

    width: int
    channels: int
    heads: int
    key_heads: int
    vocabulary: int
    context: int
    decoders: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def llama_like(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.channels,
            "num_hidden_layers": 2,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "max_position_embeddings": self.context,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    @property
    def bert_like(self) -> dict[str, Any]:
        return {
            "hidden_size": self.width,
            "num_hidden_layers": 2,
            "num_attention_heads": self.heads,
            "intermediate_size": self.channels,
        }


SMALL = Sizes(64, 88, 4, 2, 96, 128, ("llama", "qwen2", "qwen3", "mistral", "gpt2", "opt"), ("bert", "vit"))
WIDE = Sizes(384, 512, 6, 2, 256, 128, ("llama", "qwen2", "mistral", "gpt2"), ("bert", "vit", "resnet"))


def _gpt2(s: Sizes) -> hf.PreTrainedModel:
    inner = {} if s is SMALL else {"n_inner": s.channels}
    ids = {"vocab_size": s.vocabulary, "n_positions": s.context, "bos_token_id": 1, "eos_token_id": 2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=s.width, n_layer=2, n_head=s.heads, **inner, **ids))


def _opt(s: Sizes) -> hf.PreTrainedModel:
    sizes = {"hidden_size": s.width, "ffn_dim": s.channels, "num_hidden_layers": 2, "num_attention_heads": s.heads}
    table = {"vocab_size": s.vocabulary, "max_position_embeddings": s.context, "word_embed_proj_dim": s.width}
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, **table))


def _bert(s: Sizes) -> hf.PreTrainedModel:
    config = hf.BertConfig(**s.bert_like, vocab_size=s.vocabulary, max_position_embeddings=64, num_labels=3)
    return hf.BertForSequenceClassification(config)


def _resnet(s: Sizes) -> hf.PreTrainedModel:
    sizes = {"embedding_size": 32, "hidden_sizes": [64, 128], "depths": [1, 1], "layer_type": "basic"}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes, num_labels=5))


_FAMILIES: dict[str, Callable[[Sizes], hf.PreTrainedModel]] = {
    "llama": lambda s: hf.LlamaForCausalLM(hf.LlamaConfig(**s.llama_like)),
    "qwen2": lambda s: hf.Qwen2ForCausalLM(hf.Qwen2Config(**s.llama_like, tie_word_embeddings=True)),
    "qwen3": lambda s: hf.Qwen3ForCausalLM(hf.Qwen3Config(**s.llama_like, head_dim=32)),
    # Every layer has a sliding window.
    "mistral": lambda s: hf.MistralForCausalLM(hf.MistralConfig(**s.llama_like, sliding_window=6)),
    "gpt2": _gpt2,
    "opt": _opt,
    "bert": _bert,
    "vit": lambda s: hf.ViTForImageClassification(
        hf.ViTConfig(**s.bert_like, image_size=32, patch_size=8, num_labels=5)
    ),
    "resnet": _resnet,
}


def build_served(name: str, sizes: Sizes = SMALL) -> hf.PreTrainedModel:
    """The model called ``name`` in evaluation mode, float32."""
    torch.manual_seed(0)
    model = _FAMILIES[name](sizes)
    if sizes is SMALL:
        return _unit_gain(model)
    model = randomised(model) if name != "resnet" else model.eval()  # its own initial weights keep activations in range
    generator = torch.Generator().manual_seed(1)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
        elif key.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def _unit_gain(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """As ``randomised``, but that every embedding has the same size, whatever it is called."""
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.dim() == 1:
                value.add_(torch.randn_like(value) * 0.1)
            elif "embed" in key or "wte" in key or "wpe" in key:
                value.copy_(torch.randn_like(value) * 0.5)
            else:
                value.copy_(torch.randn_like(value) / value.shape[-1] ** 0.5)
    return model.eval()
