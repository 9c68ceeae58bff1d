"""Llama, Mistral, Qwen2 and Qwen3 for vLLM with layers of different size.

The sizes come from ``per_layer_config`` in ``config.json`` (a format of transformers): layer number -> ``intermediate_size``,
``num_attention_heads``, ``num_key_value_heads``, ``head_dim``, and ``skip``: the branches that a layer does not have, of
``self_attn`` and ``mlp``. Only the decoder layers are ours; weight loading, fused projections, quantization, tensor and pipeline
parallelism and the groups of the key-value cache are vLLM's.

Shapes: ``hidden_states: [tokens, hidden_size]``, all sequences of a batch one after the other.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import nn
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import extract_layer_index
from vllm.transformers_utils.config import set_default_rope_theta

__all__ = [
    "CompileSparseLlamaForCausalLM",
    "CompileSparseMistralForCausalLM",
    "CompileSparseQwen2ForCausalLM",
    "CompileSparseQwen3ForCausalLM",
]

_NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
"""Branches, and the norm that goes with each."""


def _layer_config(config: Any, prefix: str) -> Any:
    """A copy of the config with the sizes of the layer called ``prefix``.

    Raises:
        ValueError: unknown branch in ``skip``, or sizes that cannot be built or split over the tensor parallel ranks.
    """
    own = copy(config.per_layer_config[extract_layer_index(prefix)])
    own.skip = frozenset(getattr(own, "skip", None) or ())
    if unknown := own.skip - set(_NORMS):
        raise ValueError(f"{prefix}: per_layer_config skips {sorted(unknown)}, known are {sorted(_NORMS)}.")
    ranks = get_tensor_model_parallel_world_size()
    heads, pairs, width = own.num_attention_heads, own.num_key_value_heads, own.intermediate_size
    if "self_attn" not in own.skip:
        if not getattr(own, "head_dim", None) and own.hidden_size % heads:
            raise ValueError(
                f"{prefix}: hidden_size {own.hidden_size} is not a multiple of {heads} heads; head_dim must be in config.json."
            )
        if heads % pairs:
            raise ValueError(f"{prefix}: {heads} heads are not a multiple of {pairs} key-value heads.")
        if heads % ranks or (pairs % ranks and ranks % pairs):
            raise ValueError(
                f"{prefix}: {heads} heads and {pairs} key-value heads cannot be split over {ranks} tensor parallel ranks: "
                f"the heads must be a multiple of {ranks}, the key-value heads a multiple or a divisor."
            )
    if "mlp" not in own.skip and width % ranks:
        raise ValueError(f"{prefix}: intermediate_size {width} cannot be split over {ranks} tensor parallel ranks.")
    return own


class _Branches(nn.Module):
    """A decoder layer that may lack its attention, its MLP or both; put it before vLLM's layer class in the bases."""

    skip: frozenset[str] = frozenset()
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def drop(self, skip: frozenset[str], vllm_config: VllmConfig) -> None:
        """Remove the branches in ``skip`` and their norms; a removed attention has no key-value cache either.

        vLLM's constructor makes all branches and enters attentions in ``static_forward_context``, from which it later derives
        the cache to allocate.
        """
        self.skip = skip
        if "self_attn" in skip:
            vllm_config.compilation_config.static_forward_context.pop(self.self_attn.attn.layer_name)
        for branch in skip:
            setattr(self, branch, None)
            setattr(self, _NORMS[branch], None)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, **extra: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden_states + residual`` is the stream; no residual means that ``hidden_states`` is."""
        if not self.skip:
            return super().forward(positions, hidden_states, residual, **extra)
        if len(self.skip) == len(_NORMS):
            # A pipeline stage hands both tensors on, even if none of its layers computes anything.
            if residual is None:
                hidden_states, residual = torch.zeros_like(hidden_states), hidden_states
            return hidden_states, residual
        norm = self.post_attention_layernorm if "self_attn" in self.skip else self.input_layernorm
        if residual is None:
            residual = hidden_states
            hidden_states = norm(hidden_states)
        else:
            hidden_states, residual = norm(hidden_states, residual)
        if "self_attn" in self.skip:
            return self.mlp(hidden_states), residual
        return self.self_attn(positions=positions, hidden_states=hidden_states), residual


class _LlamaLayer(_Branches, LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = _layer_config(vllm_config.model_config.hf_config, prefix)
        super().__init__(vllm_config=vllm_config, prefix=prefix, config=config)
        self.drop(config.skip, vllm_config)


class _MistralLayer(_Branches, MistralDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = _layer_config(vllm_config.model_config.hf_config, prefix)
        super().__init__(vllm_config=vllm_config, prefix=prefix, config=config)
        self.drop(config.skip, vllm_config)


class _Qwen2Layer(_Branches, LlamaDecoderLayer):
    """Qwen2's layer, which is Llama's with a bias on q, k and v.

    vLLM's own computes the head size as ``hidden_size // heads`` and ignores ``head_dim``: wrong where heads were pruned.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = _layer_config(vllm_config.model_config.hf_config, prefix)
        for name in ("dual_chunk_attention_config", "qk_norm"):
            if getattr(config, name, None):
                raise ValueError(f"{prefix}: {name} is not supported in a Qwen2 with layers of different size.")
        set_default_rope_theta(config, default_theta=1_000_000)
        config.qkv_bias, config.attention_bias, config.mlp_bias = True, False, False
        super().__init__(vllm_config=vllm_config, prefix=prefix, config=config)
        self.drop(config.skip, vllm_config)


class _Qwen3Layer(_Branches, Qwen3DecoderLayer):
    """Qwen3's layer; the argument list is the one that vLLM's ``Qwen2Model`` calls."""

    def __init__(
        self,
        config: Any,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        own = _layer_config(config, prefix)
        super().__init__(config=own, cache_config=cache_config, quant_config=quant_config, prefix=prefix)
        self.drop(own.skip, get_current_vllm_config())


class CompileSparseLlamaForCausalLM(LlamaForCausalLM):
    """Llama with layers of different size."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_LlamaLayer)


class CompileSparseMistralForCausalLM(MistralForCausalLM):
    """Mistral with layers of different size, from a checkpoint in Hugging Face's form."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_MistralLayer)


class CompileSparseQwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 with layers of different size."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_Qwen2Layer)


class CompileSparseQwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3 with layers of different size.

    vLLM's own outer class names its decoder class and offers no way to choose the layers; Llama's does, and is otherwise the
    same: embedding, decoder, head.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_Qwen3Layer)

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = _Qwen3Layer
    ) -> nn.Module:
        return Qwen2Model(vllm_config=vllm_config, prefix=prefix, decoder_layer_type=layer_type)
