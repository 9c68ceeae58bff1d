"""Small random Llamas as checkpoints of every scheme, and what transformers with compressed-tensors reads from them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file

from compile_sparse.backends.vllm.checkpoint import write
from compile_sparse.compiler.capture import capture_model
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.edit import eliminate_dead_code
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.compiler.ir.storage import cast_weights
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import Target, find_target
from compile_sparse.passes.quantize import Quantize
from tests.support.contexts import context as any_context

__all__ = [
    "IDS",
    "Answer",
    "calibration",
    "context",
    "emit",
    "gpu",
    "llama",
    "llama_model",
    "quantized",
    "read_back",
    "tied_llama",
]

WORKER = Path(__file__).with_name("transformers_worker.py")
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")
# Dynamo would compile a rounding function of three lines with the system's compiler.
SETTINGS = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
IDS = torch.randint(3, 160, (2, 12), generator=torch.Generator().manual_seed(5)).tolist()


@dataclass(frozen=True)
class Answer:
    """What the consumer made of a folder.

    Attributes:
        weights: decompressed weights of linear layers by module name.
        plain: logits with floating-point activations.
        quantized: logits of its quantized forward.
        failure: its traceback, empty when there is none.
    """

    weights: Mapping[str, torch.Tensor]
    plain: torch.Tensor
    quantized: torch.Tensor
    failure: str = ""


def llama_model() -> hf.LlamaForCausalLM:
    """Every size that could be taken for another differs: 256 wide, 384 channels, 128 for keys and values, 160 tokens."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=160,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = hf.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * 0.3 + 1.0 if "norm" in name else noise * 0.06
    return model


@cache
def llama() -> Program:
    """``llama_model``, captured."""
    return capture_model(llama_model())


def tied_llama() -> Program:
    """The same model whose embedding is its lm_head, in the form in which one is captured."""
    edited = llama().clone()
    by_tensor = {binding.tensor: edited.node(name) for name, binding in edited.bindings.items()}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    by_tensor[embedding].replace_all_uses_with(by_tensor[head])
    config = {**edited.config, "tie_word_embeddings": True}
    return eliminate_dead_code(replace(edited, config=config, aliases={embedding: head}))


def gpu() -> Target:
    """vLLM on a GPU: every scheme. Which real targets there are is not the layouts' concern."""
    every = dict.fromkeys(SCHEMES, "somehow")
    return find_target("vllm-cpu").model_copy(update={"name": "vllm-test", "device": "cuda", "schemes": every})


def calibration() -> CalibrationStream:
    """Text whose ranges are those of the ids that are compared."""
    return CalibrationStream(tuple(tuple(window) for window in IDS))


def context(target: Target | None = None) -> PassContext:
    """What quantize is given."""
    return any_context(calibration(), goal=target or gpu())


def quantized(program: Program, scheme: str, target: Target | None = None, **options: Any) -> Program:
    """As compiling does it: quantize, then round what is left to bf16."""
    fits = max(map(max, IDS)) < int(program.config["vocab_size"])
    given = context(target) if fits else any_context(None, goal=target or gpu())
    made = Quantize(scheme=scheme, **options).run(program, given).program  # type: ignore[arg-type]
    return cast_weights(made, torch.bfloat16)


def emit(program: Program, folder: Path, target: Target | None = None) -> dict[str, Any]:
    """Write a checkpoint; its config."""
    folder.mkdir()
    write(program, target or gpu(), folder, SilentProgress())
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def read_back(python: str | Path, folders: Sequence[Path], job: Path) -> dict[str, Answer]:
    """Answers by folder name, all from one process."""
    job.write_text(json.dumps({"folders": [str(folder) for folder in folders], "ids": IDS}), encoding="utf-8")
    given = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    command = [str(python), "-P", str(WORKER), str(job)]
    ended = subprocess.run(command, env={**given, **SETTINGS}, capture_output=True, text=True, timeout=300, check=False)
    if ended.returncode:
        raise RuntimeError(ended.stderr[-3000:])
    return {folder.name: _answer(folder) for folder in folders}


def _answer(folder: Path) -> Answer:
    if (folder / "answer.txt").exists():
        nothing = torch.empty(0)
        return Answer({}, nothing, nothing, (folder / "answer.txt").read_text(encoding="utf-8"))
    found = load_file(folder / "answer.safetensors")
    prefix = "weight."
    weights = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    return Answer(weights, found["plain"], found["quantized"])
