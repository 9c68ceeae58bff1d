"""What each kind of structural pruning gains in ONNX Runtime, next to the share of parameters it removes.

A random Llama of 197M parameters (or any config), a random mixture of experts and a random convolutional network are pruned
by every kind that applies, lowered, and measured in turns in one worker process; ratios are medians over rounds of the
per-round ratio to the dense model. Random weights: only speed and size mean anything here. Without calibration text the choice
of what goes is arbitrary, which does not matter for speed.

    python benchmarks/ort_kinds.py [--only llama|experts|conv] [--rounds 7] [--prompt 128] [--output 32] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.errors import ModelError, Refusal
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Benchmark, BenchmarkSamples, Load
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.passes.low_rank import LowRank
from compile_sparse.passes.prune_channels import PruneChannels
from compile_sparse.passes.prune_conv import PruneConv
from compile_sparse.passes.prune_experts import PruneExperts
from compile_sparse.passes.prune_heads import PruneHeads
from compile_sparse.passes.prune_layers import PruneLayers
from compile_sparse.passes.prune_width import PruneWidth

TARGET = find_target("ort-cpu")
DENSE = "dense"

_LLAMA: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama() -> hf.PreTrainedModel:
    """197M parameters."""
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA))


def experts() -> hf.PreTrainedModel:
    """8 experts, 2 per token; about 200M parameters."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 14, "num_attention_heads": 8}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**{**_LLAMA, **sizes}, num_local_experts=8, num_experts_per_tok=2))


def conv() -> hf.PreTrainedModel:
    """A ResNet-50."""
    return hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000))


MODELS: Mapping[str, tuple[Callable[[], hf.PreTrainedModel], Mapping[str, list[Pass]]]] = {
    "llama": (
        llama,
        {
            "channels -25 %": [PruneChannels(fraction=0.25)],
            "channels -50 %": [PruneChannels(fraction=0.5)],
            "heads -25 % (key-value groups)": [PruneHeads(fraction=0.25)],
            "heads -50 % (query heads)": [PruneHeads(fraction=0.5, unit="query")],
            "width -25 %": [PruneWidth(fraction=0.25)],
            "layers -25 %": [PruneLayers(fraction=0.25, criterion="deepest")],
            "attention of 25 % of the layers": [PruneLayers(fraction=0.25, criterion="deepest", unit="attention")],
            "low rank -20 %": [LowRank(fraction=0.2)],
            "low rank -50 %": [LowRank(fraction=0.5)],
        },
    ),
    "experts": (
        experts,
        {"experts -50 %": [PruneExperts(fraction=0.5)], "channels -50 %": [PruneChannels(fraction=0.5)]},
    ),
    "conv": (conv, {"conv -25 %": [PruneConv(fraction=0.25)], "conv -50 %": [PruneConv(fraction=0.5)]}),
}


def measure(name: str, options: argparse.Namespace) -> None:
    """Build, prune, lower, measure and print one model."""
    build, forms = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        torch.manual_seed(0)
        build().save_pretrained(work / "model")
        program = capture(open_folder(str(work / "model")))
        context = PassContext(target=TARGET, progress=SilentProgress())
        parameters: dict[str, int] = {}
        for index, (label, passes) in enumerate({DENSE: [], **forms}.items()):
            try:
                changed, _ = run_passes(program, passes, context)
                (work / f"form{index}").mkdir()
                OnnxRuntimeBackend().lower(changed, TARGET, work / f"form{index}", SilentProgress())
            except (ModelError, Refusal) as error:
                _say(f"{label}: refused, {error.what} {error.why}")
                continue
            parameters[label] = changed.parameter_count()
        with Worker(OnnxRuntimeBackend().worker_command(TARGET)) as worker:
            for index, label in enumerate([DENSE, *forms]):
                if label in parameters:
                    where = str(work / f"form{index}")
                    worker.call(Load(label, where, threads=options.threads))
            if program.kind == "decoder":
                phases = ("prefill_s", "decode_s")
                request = Benchmark(
                    list(parameters),
                    prompt_tokens=options.prompt,
                    output_tokens=options.output,
                    rounds=options.rounds,
                    vocab=_LLAMA["vocab_size"],
                )
                rounds = {label: list(map(vars, times)) for label, times in worker.call(request).rounds.items()}
            else:
                phases = ("image_s",)
                images = work / "images.npz"
                np.savez(images, pixel_values=np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32))
                reply = worker.call(BenchmarkSamples(list(parameters), str(images), 4 * options.rounds, warmup=3))
                rounds = {label: [{"image_s": s} for s in times] for label, times in reply.rounds.items()}
    _report(name, parameters, rounds, phases)


def _report(name: str, parameters: Mapping[str, int], rounds: Mapping[str, Any], phases: tuple[str, ...]) -> None:
    _say(f"\n| {name} | parameters | bound | {' | '.join(p.removesuffix('_s') for p in phases)} |")
    _say("|---|---|---|" + "---|" * len(phases))
    for label, count in parameters.items():
        cells = [f"{count / 1e6:.1f}M", f"{parameters[DENSE] / count:.2f}x"]
        for phase in phases:
            ratios = [d[phase] / t[phase] for d, t in zip(rounds[DENSE], rounds[label], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")
        _say(f"| {label} | {' | '.join(cells)} |")


def main() -> None:
    """Measure what was asked for."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", choices=list(MODELS))
    for name, value in (("rounds", 7), ("prompt", 128), ("output", 32), ("threads", 1)):
        options.add_argument(f"--{name}", type=int, default=value)
    given = options.parse_args()
    for name in [given.only] if given.only else MODELS:
        measure(name, given)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
