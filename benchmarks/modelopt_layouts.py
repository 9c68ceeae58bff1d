"""Record how NVIDIA ModelOpt stores quantized checkpoints: names, types, shapes and configs, no weights.

    pip install torch 'nvidia-modelopt==0.47.*' 'transformers==5.19.*' requests safetensors   # in an environment of its own
    python benchmarks/modelopt_layouts.py tests/tensorrt/recorded/modelopt_0.47.json

ModelOpt quantizes a small random Llama in every format that works on a CPU and exports it with ``export_hf_checkpoint``. Of
every format goes into the file: both configs, type and shape of every tensor, and ``error``: how far what
``tests/tensorrt/modelopt_decoding`` reads is from the weights that were quantized, relative to their largest value. That decoder
then reads our folders in tests.

NVFP4 is not among them: ModelOpt's own kernel for it needs a GPU.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import transformers as hf
from modelopt.torch.export import export_hf_checkpoint
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.tensorrt.modelopt_decoding import decode

SIZES: Mapping[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def without_search(config: Mapping[str, Any]) -> dict[str, Any]:
    """The format alone: no search for per-channel factors, which a plain program has not."""
    return {**copy.deepcopy(dict(config)), "algorithm": "max"}


FORMATS: Mapping[str, dict[str, Any] | None] = {
    "plain": None,
    "FP8": without_search(mtq.FP8_DEFAULT_CFG),
    "FP8_PER_CHANNEL_PER_TOKEN": without_search(mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG),
    "W4A16_AWQ": without_search(mtq.INT4_AWQ_CFG),
    "W8A8_SQ_PER_CHANNEL": without_search(mtq.INT8_DEFAULT_CFG),
}


def model() -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"])
    return hf.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def recorded(config: dict[str, Any] | None) -> dict[str, Any]:
    dense = model()
    weights = {name: module.weight.float().clone() for name, module in dense.named_modules() if is_linear(module)}
    if config is not None:
        ids = torch.randint(3, 160, (4, 16), generator=torch.Generator().manual_seed(5))
        dense = mtq.quantize(dense, config, forward_loop=lambda loaded: loaded(ids))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with torch.inference_mode():
            export_hf_checkpoint(dense, export_dir=folder)
        found = tensors(folder)
        quantization = folder / "hf_quant_config.json"
        own = json.loads(quantization.read_text(encoding="utf-8")) if quantization.exists() else None
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        files = sorted(path.name for path in folder.iterdir())
    algorithm = own["quantization"]["quant_algo"] if own else None
    errors = {
        stem: float((decode(stem, found, algorithm) - weight).abs().max() / weight.abs().max())
        for stem, weight in weights.items()
    }
    return {
        "files": files,
        "hf_quant_config": own,
        "quantization_config": described.get("quantization_config"),
        "dtype": described.get("dtype"),
        "tensors": {
            name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in found.items()
        },
        "constant": {name: value.unique().item() for name, value in found.items() if name.endswith("pre_quant_scale")},
        "error": max(errors.values()),
    }


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def main(out: str) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("nvidia-modelopt", "torch", "transformers")}
    formats = {name: recorded(config) for name, config in FORMATS.items()}
    made = {"script": "benchmarks/modelopt_layouts.py", "versions": versions, "sizes": dict(SIZES), "formats": formats}
    Path(out).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
