"""Speed of every form we write for vLLM against the dense model, in one vLLM process, in alternation.

    python benchmarks/vllm_forms.py --rounds 5 --concurrency 1,8

The model is a random Llama of 152M parameters (hidden 1024, MLP 2816, 12 layers, 16 heads in 4 groups, 8192 words). Ratios are
medians over rounds of dense time over the form's time, with the range over rounds in brackets. Forms that the registered vLLM
cannot run on this processor are left out with the reason. The first line tells the processor and the precision it is run in:
bfloat16, or float32 where vLLM has no bfloat16 kernels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compile_sparse.backends.vllm.backend import VllmBackend
from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext
from compile_sparse.compiler.ir.storage import cast_weights
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.environments import find_runtime
from compile_sparse.compiler.runtimes.messages import Benchmark, Load
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.compiler.verify.measure import folder_bytes
from compile_sparse.passes.low_rank import LowRank
from compile_sparse.passes.mask import Sparsify
from compile_sparse.passes.prune_channels import PruneChannels
from compile_sparse.passes.prune_heads import PruneHeads
from compile_sparse.passes.prune_layers import PruneLayers
from compile_sparse.passes.quantize import Quantize

TARGET = find_target("vllm-cpu")
DENSE = "dense"


def make_model(folder: Path) -> None:
    """A random bfloat16 checkpoint."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def forms(reduce_range: bool) -> dict[str, list[Pass]]:
    """What is measured."""
    int8 = Quantize(scheme="w8a8", reduce_range=reduce_range)
    half = PruneChannels(fraction=0.5, criterion="magnitude")
    return {
        DENSE: [],
        "w8a8": [int8],
        "channels -25 %": [PruneChannels(fraction=0.25, criterion="magnitude")],
        "channels -50 %": [half],
        "channels -50 %, w8a8": [half, int8],
        "layers -25 %": [PruneLayers(fraction=0.25, criterion="deepest")],
        "heads -25 % (plugin)": [PruneHeads(fraction=0.25, unit="query", criterion="magnitude")],
        "w4a16": [Quantize(scheme="w4a16")],
        "low rank -50 % (plugin)": [LowRank(fraction=0.5, criterion="svd")],
        "2:4 (plugin)": [Sparsify(pattern="2:4")],
    }


def write(source: Path, work: Path, only: str) -> dict[str, Path]:
    """One folder per form."""
    program = capture(open_folder(str(source)))
    context = PassContext(target=TARGET.model_copy(update={"low_rank": None}), progress=SilentProgress())
    record = find_runtime("vllm")
    folders: dict[str, Path] = {}
    for index, (name, passes) in enumerate(forms(bool(record and record.facts.get("int8_saturates"))).items()):
        if name != DENSE and only not in name:
            continue
        changed, _ = run_passes(program, passes, context)
        out = work / f"form{index}"
        out.mkdir()
        VllmBackend().lower(cast_weights(changed, torch.bfloat16), TARGET, out, SilentProgress())
        reason = VllmBackend().cannot_run(out, TARGET)
        say(f"{name}: {folder_bytes(out) / 1e6:.0f} MB. {reason}")
        if not reason:
            folders[name] = out
    return folders


def main() -> None:
    """Write, load, measure, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 5), ("prompt", 256), ("output", 24), ("threads", 1)):
        options.add_argument(f"--{name}", type=int, default=value)
    options.add_argument("--concurrency", default="1,8", help="numbers of requests at once")
    options.add_argument("--only", default="", help="forms whose name contains this")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name, Worker(VllmBackend().worker_command(TARGET)) as worker:
        say(f"vLLM {worker.runtime.version}, {worker.runtime.device}, {given.threads} thread(s)")
        make_model(Path(name, "model"))
        folders = write(Path(name, "model"), Path(name), given.only)
        levels = [int(level) for level in given.concurrency.split(",")]
        for label, folder in folders.items():
            request = Load(
                label,
                str(folder),
                threads=given.threads,
                sequence=given.prompt + given.output + 1,
                sequences=max(levels),
            )
            worker.call(request)
        for level in levels:
            asked = Benchmark(
                list(folders),
                prompt_tokens=given.prompt,
                output_tokens=given.output,
                rounds=given.rounds,
                vocab=8192,
                batch=level,
            )
            rounds = worker.call(asked).rounds
            say(f"\n{level} request(s) at once, prompt {given.prompt}, output {given.output}, {given.rounds} rounds")
            say("| form | MB | prefill tok/s | prefill | decode tok/s | decode |\n|---|--:|--:|--:|--:|--:|")
            for label, times in rounds.items():
                cells = [label, f"{folder_bytes(folders[label]) / 1e6:.0f}"]
                for phase, tokens in (("prefill_s", given.prompt), ("decode_s", given.output)):
                    ratios = [getattr(o, phase) / getattr(t, phase) for o, t in zip(rounds[DENSE], times, strict=True)]
                    rate = level * tokens / statistics.median(getattr(t, phase) for t in times)
                    cells += [
                        f"{rate:.1f}",
                        f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})",
                    ]
                say("| " + " | ".join(cells) + " |")


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
