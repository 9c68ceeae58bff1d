"""Score a checkpoint inside vLLM; run by vllm_peers.py with another interpreter. Imports nothing of this project.

One checkpoint per process: deleting an in-process engine also ends the process groups of any other.

    PYTHON vllm_perplexity_worker.py REQUEST.json RESULT.json

A request is ``{"model", "windows": {slice: [[id]]}}``. The float32 engine is asked for the log-probability of every prompt token.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Set before vllm is imported: the engine in this process, no network, no other threads than OMP_NUM_THREADS says.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

KV_CACHE_BYTES = 256 << 20


def score(request: dict[str, Any]) -> dict[str, Any]:
    """Mean negative log-likelihood per window, in nats per token."""
    import vllm
    from vllm.platforms import current_platform

    longest = max(len(ids) for windows in request["windows"].values() for ids in windows)
    options: dict[str, Any] = {"max_model_len": longest + 1}
    if current_platform.is_cpu():
        options["kv_cache_memory_bytes"] = KV_CACHE_BYTES
    engine = vllm.LLM(
        request["model"],
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,  # a cached prompt is not scored
        skip_tokenizer_init=True,
        **options,
    )
    asked = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    found = {}
    for name, windows in request["windows"].items():
        prompts = [{"prompt_token_ids": ids} for ids in windows]
        outputs = engine.generate(prompts, asked, use_tqdm=False)
        found[name] = [_nll(ids, output.prompt_logprobs) for ids, output in zip(windows, outputs, strict=True)]
    return {"nll": found, "version": f"vLLM {vllm.__version__}"}


def _nll(ids: list[int], logprobs: list[Any]) -> float:
    """The first token has no log-probability; position ``i`` holds that of ``ids[i]``."""
    values = [found[token].logprob for token, found in zip(ids[1:], logprobs[1:], strict=True)]
    return -sum(values) / len(values)


if __name__ == "__main__":
    result = score(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # taking the engine down takes longer than scoring
