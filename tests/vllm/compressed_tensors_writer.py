"""Quantize a model with compressed-tensors and save it, once per case: runs in vLLM's interpreter.

    python compressed_tensors_writer.py JOB.json

JOB: ``{"model": folder, "out": folder, "cases": {name: quantization_config}}``. Scales are those of the extremes of each group of
weights; fixed ranges of inputs are random; with activation order groups are of random inputs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from transformers import AutoModelForCausalLM


def main(job: str) -> None:
    given = json.loads(Path(job).read_text(encoding="utf-8"))
    for name, config in given["cases"].items():
        dtype = torch.bfloat16 if name.endswith("-bf16") else torch.float32
        model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=dtype)
        apply_quantization_config(model, QuantizationConfig(**config))
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and getattr(module, "quantization_scheme", None):
                fill(module)
                module.quantization_status = QuantizationStatus.FROZEN
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        out = Path(given["out"]) / name
        model.save_pretrained(out)
        compressor.update_config(str(out))


@torch.no_grad()
def fill(module: torch.nn.Linear) -> None:
    args, weight = module.quantization_scheme.weights, module.weight.data.float()
    columns = weight.shape[1]
    if hasattr(module, "weight_g_idx"):
        order = torch.randperm(columns)
        module.weight_g_idx.data[order] = (torch.arange(columns) // args.group_size).to(torch.int32)
        weight = weight[:, torch.argsort(module.weight_g_idx)]
    if args.strategy == "block":
        tall, wide = args.block_structure
        runs = weight.unflatten(0, (-1, tall)).unflatten(2, (-1, wide)).transpose(1, 2).flatten(2)
    elif args.strategy == "tensor":
        runs = weight.flatten()[None]
    else:
        runs = weight.unflatten(1, (-1, args.group_size or columns))
    whole = None
    if args.strategy == "tensor_group":
        whole = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data = whole
    scale, zero = calculate_qparams(runs.amin(-1), runs.amax(-1), args, whole)
    module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
    if not args.symmetric:
        kept = module.weight_zero_point
        kept.data = zero.round().reshape(kept.shape).to(kept.dtype)
    for part, value in (("input_scale", 0.03), ("input_global_scale", 600.0)):
        if hasattr(module, part):
            kept = getattr(module, part)
            kept.data = (value * (1 + torch.rand(kept.shape))).to(kept.dtype)
    if hasattr(module, "input_zero_point") and not module.quantization_scheme.input_activations.symmetric:
        module.input_zero_point.data.fill_(5)


if __name__ == "__main__":
    main(sys.argv[1])
