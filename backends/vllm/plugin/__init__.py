"""vLLM plugin: models whose layers differ in size, and two experimental weight formats.

vLLM calls ``register`` in each of its processes (entry-point group ``vllm.general_plugins``), so it must be cheap: models are
registered by name and imported when one is loaded; the weight formats import vLLM's linear layers only when one is built.

The folder works under any package name: artifacts carry a copy of it as ``compile_sparse_vllm``. Therefore its files import
vLLM and torch only, neither each other nor the rest of compile-sparse.
"""

from __future__ import annotations

from importlib import import_module
from logging import getLogger

__all__ = ["register"]

_ARCHITECTURES = (
    "CompileSparseLlamaForCausalLM",
    "CompileSparseMistralForCausalLM",
    "CompileSparseQwen2ForCausalLM",
    "CompileSparseQwen3ForCausalLM",
)
_QUANTIZATION = {
    "compile_sparse_24": ("sparse24", "Sparse24Config"),
    "compile_sparse_low_rank": ("low_rank", "LowRankConfig"),
}


def register() -> None:
    """Make the architectures and quantization methods known to vLLM; what is known already stays.

    An installed compile-sparse and an artifact's copy may both be on the path. The first one found wins as a whole: parts of two
    versions must not be mixed.
    """
    from vllm import ModelRegistry

    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
    except ImportError as error:
        # Every process of every vLLM in the environment runs this: a vLLM of another shape must go on serving other models.
        getLogger(__name__).warning("The compile-sparse plugin does not fit this vLLM and stays off: %s", error)
        return
    known = ModelRegistry.get_supported_archs()
    for name in _ARCHITECTURES:
        if name not in known:
            ModelRegistry.register_model(name, f"{__name__}.models:{name}")
    for name, (module, config) in _QUANTIZATION.items():
        if name not in QUANTIZATION_METHODS:
            register_quantization_config(name)(getattr(import_module(f"{__name__}.{module}"), config))
