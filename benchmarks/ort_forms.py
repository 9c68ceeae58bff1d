"""Our ONNX graphs against the graph of onnxruntime-genai's own model builder, on a random model.

All models run in one worker process and take turns, the order flips every round, and figures are medians over rounds of
the per-round ratio to the first model. Random weights: only speed and size mean anything here.

The builder needs the package onnx-ir (``pip install 'compile-sparse[bench]'``).

    python benchmarks/ort_forms.py [--config config.json] [--rounds 7] [--prompt 128] [--output 32] [--threads 1]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Benchmark, Load
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.compiler.verify.measure import folder_bytes
from compile_sparse.passes.prune_channels import PruneChannels
from compile_sparse.passes.quantize import Quantize

TARGET = find_target("ort-cpu")
BUILDER, OURS = "genai builder fp32", "ours fp32"


def _default_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def make_model(config: Any, folder: Path) -> None:
    """A random float32 checkpoint, with a tokenizer because the builder asks for one."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words = {f"w{index}": index for index in range(config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w2")
    tokenizer.save_pretrained(folder)


def lower_ours(source: Path, work: Path) -> dict[str, Path]:
    """One folder per form, written one after the other."""
    program = capture(open_folder(str(source)))
    forms: dict[str, list[Pass]] = {
        OURS: [],
        "channels -50 %": [PruneChannels(fraction=0.5)],
        "w4a16 g128": [Quantize(scheme="w4a16")],
        "w8a16 g128": [Quantize(scheme="w8a16")],
        "w8a8": [Quantize(scheme="w8a8")],
        "channels -50 % w8a8": [PruneChannels(fraction=0.5), Quantize(scheme="w8a8")],
    }
    context = PassContext(target=TARGET, progress=SilentProgress())
    folders: dict[str, Path] = {}
    for index, (name, passes) in enumerate(forms.items()):
        changed, _ = run_passes(program, passes, context)
        folders[name] = work / f"form{index}"
        folders[name].mkdir()
        began = time.perf_counter()
        OnnxRuntimeBackend().lower(changed, TARGET, folders[name], SilentProgress())
        _say(f"{name}: written in {time.perf_counter() - began:.1f} s, {folder_bytes(folders[name]) / 1e6:.0f} MB")
    _say(f"peak memory of capturing and writing: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    return folders


def build_theirs(source: Path, work: Path) -> Path:
    """The fp32 CPU model of onnxruntime-genai's builder."""
    out = work / "builder"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(source), "-o", str(out)]
    began = time.perf_counter()
    command += ["-p", "fp32", "-e", "cpu", "-c", str(work / "cache")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The model builder failed: {done.stderr.strip().splitlines()[-1]}")
    _say(f"{BUILDER}: written in {time.perf_counter() - began:.1f} s, {folder_bytes(out) / 1e6:.0f} MB")
    return out


def main() -> None:
    """Build, write, measure, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--config", help="Hugging Face config.json of a causal language model")
    for name, value in (("rounds", 7), ("prompt", 128), ("output", 32), ("threads", 1)):
        options.add_argument(f"--{name}", type=int, default=value)
    given = options.parse_args()
    config = AutoConfig.from_pretrained(given.config) if given.config else _default_config()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = work / "model"
        # In a process of its own, so that the memory of making the model is not counted as ours.
        maker = multiprocessing.get_context("spawn").Process(target=make_model, args=(config, source))
        maker.start()
        maker.join()
        folders = {BUILDER: build_theirs(source, work), **lower_ours(source, work)}
        with Worker(OnnxRuntimeBackend().worker_command(TARGET)) as worker:
            for label, folder in folders.items():
                worker.call(Load(label, str(folder), threads=given.threads))
            request = Benchmark(
                list(folders),
                prompt_tokens=given.prompt,
                output_tokens=given.output,
                rounds=given.rounds,
                vocab=config.vocab_size,
            )
            rounds = worker.call(request).rounds
    _say(
        f"\nprompt {given.prompt}, output {given.output}, {given.threads} thread(s), {given.rounds} rounds, median ratios"
    )
    _say(f"{'':20} {'prefill':>9} {'/builder':>9} {'/ours':>7} {'decode':>10} {'/builder':>9} {'/ours':>7}")
    for label, times in rounds.items():
        parts = [label.ljust(20)]
        for phase in ("prefill_s", "decode_s"):
            parts.append(f"{statistics.median(getattr(t, phase) for t in times):8.3f}s")
            for other in (BUILDER, OURS):
                ratios = [getattr(o, phase) / getattr(t, phase) for o, t in zip(rounds[other], times, strict=True)]
                parts.append(f"{statistics.median(ratios):7.2f}x")
        _say("  ".join(parts))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
