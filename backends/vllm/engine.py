"""A folder in vLLM: how its engine is made and asked. Imports vLLM where it is used: OpenMP's threads are set before that."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compile_sparse.backends.vllm.machine import cpu_dtype, instruction_set
from compile_sparse.backends.worker.errors import RequestError

__all__ = ["WINDOWS_AT_ONCE", "Engine"]

WINDOWS_AT_ONCE = 16
_SPARE_CACHE_BYTES = 64 << 20
_BLOCK_TOKENS = 128
_FOUR_BIT_KERNEL = "cpu_gemm_wna16"


class Engine:
    """One loaded folder: an engine in this process, eager on a processor, with prefix caching off and token ids as prompts.

    Args:
        folder: of a checkpoint.
        device: ``cpu`` or ``cuda``.
        length: tokens of the longest sequence.
        sequences: at once.
    """

    def __init__(self, folder: str, device: str, length: int, sequences: int) -> None:
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise RequestError(f"there is no config.json in {folder}")
        config = json.loads(path.read_text(encoding="utf-8"))
        from vllm import LLM

        self._require_kernels(config, device)
        dtype = cpu_dtype() if device == "cpu" else "bfloat16"
        self.engine = LLM(
            folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=length + 1,
            max_num_seqs=max(sequences, WINDOWS_AT_ONCE),
            # All prompts of a batch in one step, so that prefill and decoding do not mix, up to what memory bears.
            max_num_batched_tokens=max(2048, min(sequences * length, 65536)),
            enforce_eager=device == "cpu",
            enable_prefix_caching=False,
            async_scheduling=False,
            kv_cache_memory_bytes=_cache_bytes(folder, length + 1, max(sequences, 2), 4 if dtype == "float32" else 2),
            disable_log_stats=False,
            trust_remote_code=False,
            logits_processors=[_forced_tokens()],
            seed=0,
        )

    @staticmethod
    def _require_kernels(config: Mapping[str, Any], device: str) -> None:
        """vLLM accepts 4-bit weights on any processor and fails at the first GEMM where the kernel is not built in."""
        if device != "cpu" or (config.get("quantization_config") or {}).get("format") != "pack-quantized":
            return
        import torch
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins

        current_platform.import_kernels()
        load_general_plugins()  # a plugin may bring a kernel
        if not hasattr(torch.ops._C, _FOUR_BIT_KERNEL):
            raise RequestError(
                f"this vLLM has no kernel for 4-bit weights ({_FOUR_BIT_KERNEL}) on this processor ({instruction_set()})"
            )

    def generate(self, prompts: Sequence[Sequence[int]], parameters: Any) -> list[Any]:
        """Requests in the order given."""
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs: list[Any] = self.engine.generate(asked, parameters, use_tqdm=False)
        return outputs


def _cache_bytes(folder: str, length: int, sequences: int, itemsize: int) -> int:
    """Room for ``sequences`` sequences of ``length`` tokens, in whole blocks, and some to spare."""
    from transformers import AutoConfig

    # transformers knows what each family calls its sizes.
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    own = getattr(config, "per_layer_config", None)
    kinds = [own[number] for number in range(layers)] if own else [config]
    widest = max(int(getattr(kind, "num_key_value_heads", None) or heads) for kind in kinds)
    size = int(getattr(config, "head_dim", None) or int(config.hidden_size) // heads)
    blocks = -(-length // _BLOCK_TOKENS) + 1
    return sequences * blocks * _BLOCK_TOKENS * layers * widest * size * 2 * itemsize + _SPARE_CACHE_BYTES


def _forced_tokens() -> type:
    """A logits processor that makes a request generate given tokens; reported log-probabilities are from before it."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class ForcedTokens(AdapterLogitsProcessor):  # type: ignore[misc]
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            tokens = (params.extra_args or {}).get("forced_tokens")
            if not tokens:
                return None

            def process(output_ids: list[int], logits: Any) -> Any:
                wanted = tokens[min(len(output_ids), len(tokens) - 1)]
                logits.fill_(float("-inf"))
                logits[wanted] = 0.0
                return logits

            return process

    return ForcedTokens
