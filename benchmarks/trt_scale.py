"""What it costs to lower a large decoder for TensorRT: seconds and memory, against the size of the model in fp16.

    python benchmarks/trt_scale.py [--work FOLDER] [--tied] [--layers 24] [--only TEXT]

Makes a random Llama of 1.1B parameters in bfloat16 (2.4 GB), one tensor at a time. Every form is then made in a fresh process:
capture, passes, and the TensorRT backend's ``lower`` without an engine. TensorRT-RTX then parses the graph in another fresh
process. Weight files are dropped from the page cache before each form, so reading them costs what the disk costs. Peak memory
is VmHWM, the kernel's own figure for resident pages, those of mapped files included. Needs 8 GB of disk until it ends.

The bounds: lowering within 60 s and what the disk needs to read and write the model once (said with and without capture), and
both processes within twice the fp16 size. Passes are timed apart; what they only plan is computed while weights are written.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TARGET = "trt-a100"
CALIBRATION = "calibration.jsonl"
FORMS: dict[str, dict[str, Any]] = {
    "fp16": {},
    "fp16, and the unified checkpoint": {"checkpoint": True},
    "2:4, w4a16": {"sparsity": "2:4", "quantize": "w4a16"},
    "w8a8-static": {"quantize": "w8a8-static", "calibration": CALIBRATION},
}
SHARD_BYTES = 400 << 20
MOST_SECONDS, MOST_SIZES = 60.0, 2.0


def make_model(folder: Path, layers: int, *, tied: bool) -> int:
    """Write the checkpoint in shards, and calibration windows beside it; returns the number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from compile_sparse.compiler.ir.safetensors_stream import write_safetensors
    from compile_sparse.compiler.ir.weights import DerivedTensor

    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **SIZES}
    config |= {"num_hidden_layers": layers, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LlamaForCausalLM(LlamaConfig(**config)).named_parameters()}
    generator = torch.Generator().manual_seed(0)

    def source(shape: tuple[int, ...]) -> DerivedTensor:
        def values() -> torch.Tensor:
            if len(shape) == 1:
                return torch.ones(shape, dtype=torch.bfloat16)
            return torch.empty(shape).normal_(0.0, 0.02, generator=generator).to(torch.bfloat16)

        return DerivedTensor(shape, torch.bfloat16, values)

    shards: list[dict[str, DerivedTensor]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if filled and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = source(shape)
        filled += size
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    chosen = random.Random(0)
    windows = [[chosen.randrange(SIZES["vocab_size"]) for _ in range(32)] for _ in range(4)]
    text = "".join(json.dumps({"input_ids": window}) + "\n" for window in windows)
    (folder.parent / CALIBRATION).write_text(text, encoding="utf-8")
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def disk_seconds(folder: Path, size: int) -> tuple[float, float]:
    """Seconds to write ``size`` bytes to the disk, and to read them again from it."""
    path, block = folder / "disk-speed", os.urandom(16 << 20)
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    written = time.perf_counter() - began
    forget(path)
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(len(block)):
            pass
    read = time.perf_counter() - began
    path.unlink()
    return written, read


def forget(*paths: Path) -> None:
    """Drop files from the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(kind: str) -> int:
    """Bytes that /proc says of this process: VmHWM, RssAnon, ..."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


@contextmanager
def largest_anonymous() -> Iterator[list[int]]:
    """Highest RssAnon (pages that belong to no file) of the block, sampled every 20 ms."""
    found, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.02):
            found[0] = max(found[0], resident("RssAnon"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def lower(model: Path, out: Path, form: str) -> dict[str, Any]:
    """Make one form in this process, and say what that took."""
    import torch

    from compile_sparse.compiler.capture import capture
    from compile_sparse.compiler.ir.storage import cast_weights, torch_dtype
    from compile_sparse.compiler.pipeline.job import prepare
    from compile_sparse.compiler.pipeline.runner import run_passes
    from compile_sparse.compiler.progress import SilentProgress
    from compile_sparse.compiler.recipes.flags import merge_options

    torch.set_num_threads(1)
    options = dict(FORMS[form])
    checkpoint = options.pop("checkpoint", False)
    if "calibration" in options:
        options["calibration"] = str(model.parent / options["calibration"])
    job, progress, stages = prepare(model, TARGET, merge_options(engine="none", **options)), SilentProgress(), {}
    assert job.settings.options is not None
    settings = replace(job.settings, options=job.settings.options.model_copy(update={"checkpoint": checkpoint}))

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        stages[name] = {"s": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "peak": resident("VmHWM")}

    with largest_anonymous() as anonymous:
        with stage("capture"):
            program = capture(job.folder, progress=progress)
        with stage("passes"):
            program, _ = run_passes(program, job.passes, job.context(progress))
            program = cast_weights(program, torch_dtype(job.precision))
        with stage("lower"):
            lowered = job.backend.lower(program, job.target, out, progress, settings)
    return {"stages": stages, "peak": resident("VmHWM"), "anonymous": anonymous[0], "form": dict(lowered.form)}


def parse(folder: Path) -> tuple[float, int, int]:
    """Seconds, peak bytes and layers of TensorRT-RTX's parser."""
    from compile_sparse.backends.tensorrt.description import read_description
    from compile_sparse.backends.tensorrt.engine.builder import BuildRequest, build
    from compile_sparse.compiler.progress import SilentProgress

    profiles = [profile.model_dump(mode="json") for profile in read_description(folder).profiles]
    built = build(
        BuildRequest(
            onnx=folder / "model.onnx",
            engine=None,
            builder="tensorrt_rtx",
            compute_capability="8.0",
            profiles=profiles,
            parse_only=True,
        ),
        SilentProgress(),
    )
    return built.seconds, built.peak_rss_bytes, built.layers


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--work", type=Path, default=None, help="existing folder for scratch files; default: a temporary one"
    )
    options.add_argument("--layers", type=int, default=24)
    options.add_argument("--tied", action="store_true", help="one tensor for the embedding and the head")
    options.add_argument("--only", default="", help="forms whose name contains this")
    options.add_argument("--lower", nargs=3, metavar=("MODEL", "OUT", "FORM"), help=argparse.SUPPRESS)
    given = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if given.lower:
        print(json.dumps(lower(Path(given.lower[0]), Path(given.lower[1]), given.lower[2])))
        return
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        measured(Path(name), given)


def measured(work: Path, given: argparse.Namespace) -> None:
    """Print a row for each form."""
    parameters = make_model(work / "model", given.layers, tied=given.tied)
    size = 2 * parameters
    write, read = disk_seconds(work, size)
    print(f"{parameters / 1e9:.3f} B parameters, {size / 1e9:.2f} GB in fp16, {'tied' if given.tied else 'not tied'}")
    print(
        f"disk: {size / 1e6 / write:.0f} MB/s written, {size / 1e6 / read:.0f} MB/s read: {write + read:.1f} s for both\n"
    )
    print(
        "| form | capture s (CPU) | passes s | lower s (CPU) | peak GB | of fp16 | anonymous GB | written GB | parse s "
        "| its peak GB | of fp16 | layers | bounds |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|"
    )
    for form in FORMS:
        if given.only not in form:
            continue
        out = work / "out"
        out.mkdir()
        forget(*(work / "model").glob("*.safetensors"))
        command = [sys.executable, __file__, "--lower", str(work / "model"), str(out), form]
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        found = json.loads(answer.splitlines()[-1])
        stages = found["stages"]
        forget(*out.glob("model.onnx*"))
        parse_seconds, parse_peak, layers = parse(out)
        bounds = {
            "lower": stages["lower"]["s"] < MOST_SECONDS + write + read,
            "capture + lower": stages["capture"]["s"] + stages["lower"]["s"] < MOST_SECONDS + write + read,
            "memory": max(found["peak"], parse_peak) < MOST_SIZES * size,
        }
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        cells = [
            form,
            f"{stages['capture']['s']:.1f} ({stages['capture']['cpu']:.1f})",
            f"{stages['passes']['s']:.1f}",
            f"{stages['lower']['s']:.1f} ({stages['lower']['cpu']:.1f})",
            f"{found['peak'] / 1e9:.2f}",
            f"{found['peak'] / size:.2f}x",
            f"{found['anonymous'] / 1e9:.2f}",
            f"{written / 1e9:.2f}",
            f"{parse_seconds:.1f}",
            f"{parse_peak / 1e9:.2f}",
            f"{parse_peak / size:.2f}x",
            str(layers),
            ", ".join(f"{name} {'held' if held else 'MISSED'}" for name, held in bounds.items()),
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
        peaks = ", ".join(f"{name} {stage['peak'] / 1e9:.2f}" for name, stage in stages.items())
        print(f"  peak GB so far after {peaks}; {found['form']}", file=sys.stderr, flush=True)
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
