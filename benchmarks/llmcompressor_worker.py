"""Compress or score a checkpoint with llm-compressor's packages; run by vllm_peers.py with another interpreter.

One request per process, so that peak memory is the request's own. Imports nothing of this project.

    PYTHON llmcompressor_worker.py REQUEST.json RESULT.json

A request is ``{"do": "compress", "model", "out", "recipe", "dtype", "batch", "windows": {"calibration": [[id]]}}`` or
``{"do": "score", "model", "batch", "windows": {slice: [[id]]}}``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPES = {
    "W8A8 RTN": ("W8A8", ("rtn",)),
    "W8A8 GPTQ": ("W8A8", ("gptq",)),
    "W8A8 SmoothQuant, RTN": ("W8A8", ("smoothquant", "rtn")),
    "W8A8 SmoothQuant, GPTQ": ("W8A8", ("smoothquant", "gptq")),
    "W4A16 g128 RTN": ("W4A16", ("rtn",)),
    "W4A16 g128 GPTQ": ("W4A16", ("gptq",)),
}
"""Scheme and steps; W8A8 has one scale per output channel and one per token, chosen at run time."""
SMOOTHING = 0.8
"""The strength of llm-compressor's own W8A8 example; everything else unsaid is at its defaults."""


def modifiers(recipe: str) -> list[Any]:
    """llm-compressor's objects for a recipe."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    scheme, steps = RECIPES[recipe]
    makers = {
        "smoothquant": lambda: SmoothQuantModifier(smoothing_strength=SMOOTHING),
        "rtn": lambda: QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]),
        "gptq": lambda: GPTQModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]),
    }
    return [makers[step]() for step in steps]


def compress(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize and save. Time is from reading the model to the saved folder, without imports."""
    import llmcompressor

    recipe = modifiers(request["recipe"])
    imported = _status_bytes("VmHWM")
    wall, cpu = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=request["dtype"])
    ids = torch.tensor(request["windows"]["calibration"])
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    llmcompressor.oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(request["model"]),
        recipe=recipe,
        dataset=DataLoader(rows, batch_size=request["batch"]),
        num_calibration_samples=len(rows),
        max_seq_length=ids.shape[1],
        output_dir=request["out"],
    )
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_rss_bytes": _status_bytes("VmHWM"),
        "import_rss_bytes": imported,
        "version": f"llm-compressor {llmcompressor.__version__}",
    }


@torch.no_grad()
def score(request: dict[str, Any]) -> dict[str, Any]:
    """Mean negative log-likelihood per window, in nats per token; quantized weights are decompressed to float32.

    Raises:
        ValueError: activations are quantized too: decompressing drops that, and the score would be of another model.
    """
    options: dict[str, Any] = {"dtype": torch.float32}
    config = json.loads((Path(request["model"]) / "config.json").read_text(encoding="utf-8"))
    if quantization := config.get("quantization_config"):
        if any(group.get("input_activations") for group in quantization["config_groups"].values()):
            raise ValueError("transformers decompresses the weights and leaves out the quantization of activations")
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(request["model"], **options).eval()
    found = {}
    for name, windows in request["windows"].items():
        nll: list[float] = []
        for ids in torch.tensor(windows).split(request["batch"]):
            log = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            nll += (-log.gather(-1, ids[:, 1:, None])).squeeze(-1).double().mean(1).tolist()
        found[name] = nll
    return {"nll": found, "version": f"transformers {transformers.__version__}"}


def _status_bytes(name: str) -> int:
    """A memory figure of this process; unlike ru_maxrss it does not count the parent's memory before the exec."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    result = {"compress": compress, "score": score}[request["do"]](request)
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
