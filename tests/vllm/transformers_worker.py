"""Load checkpoint folders with transformers and compressed-tensors, and tell what they mean: runs in vLLM's interpreter.

    python transformers_worker.py JOB.json

JOB: ``{"folders": [...], "ids": [[...], ...]}``. Into each folder goes ``answer.safetensors``: ``weight.NAME`` of every linear
layer after decompression, ``plain`` (logits with floating-point activations) and ``quantized`` (logits of compressed-tensors' own
quantized forward); or ``answer.txt``, what went wrong. One process for all folders: importing takes longest.
"""

from __future__ import annotations

import json
import sys
import traceback
from functools import partial
from pathlib import Path

import compressed_tensors.compressors.nvfp4.base as nvfp4
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(job: str) -> None:
    # It unpacks to bfloat16 whatever the model's type is, and a float32 model then cannot run.
    nvfp4.unpack_fp4_from_uint8 = partial(nvfp4.unpack_fp4_from_uint8, dtype=torch.float32)
    torch.set_num_threads(1)
    given = json.loads(Path(job).read_text(encoding="utf-8"))
    ids = torch.tensor(given["ids"])
    for folder in map(Path, given["folders"]):
        try:
            save_file(answer(folder, ids), folder / "answer.safetensors")
        except (
            KeyError,
            OSError,
            RuntimeError,
            TypeError,
            ValueError,
        ):  # reported to the test, which knows whether this folder may fail
            (folder / "answer.txt").write_text(traceback.format_exc(), encoding="utf-8")


@torch.no_grad()
def answer(folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError(str(report))
    model.eval()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found = {"quantized": model(ids).logits}  # decompresses on its first call
    for module in linears.values():
        module.quantization_enabled = False
    found["plain"] = model(ids).logits
    found |= {f"weight.{name}": module.weight for name, module in linears.items()}
    return {name: value.clone().contiguous() for name, value in found.items()}


if __name__ == "__main__":
    main(sys.argv[1])
