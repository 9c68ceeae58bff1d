"""What one activation scale per token costs over one for the whole tensor, on a w8a8 folder for ONNX Runtime.

The same graph is rewritten to one scale per tensor (DynamicQuantizeLinear): fast and, on activations with outliers, wrong.
All models run in one worker process and take turns, the order flips every round, and figures are medians over rounds of the
per-round ratio to the first model. Weight files are linked, not copied.

    python benchmarks/activation_scales.py DENSE/model W8A8/model [OTHER/model ...] [--rounds 7] [--prompt 128] [--output 32]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import onnx
from onnx import helper

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Benchmark, Load
from compile_sparse.compiler.targets.target import find_target

MODEL = "model.onnx"


def per_tensor(folder: Path, out: Path) -> Path:
    """A copy of ``folder`` whose integer GEMMs take one run-time scale for all rows of their input."""
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    graph = model.graph
    maker = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    made: dict[str, list[str]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            source = maker[node.input[0]].input[0]
            made[node.output[0]] = [f"{node.output[0]}_{part}" for part in ("whole", "scale", "zero")]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [source], made[node.output[0]]))
        elif node.op_type == "MatMulIntegerToFloat":
            codes, scale, zero = made[node.input[0]]
            node.input[0], node.input[2], node.input[4] = codes, scale, zero
            (product,) = readers[node.output[0]]  # with the scales of the rows
            node.output[0] = product.output[0]
            nodes.append(node)
        elif not any(each.op_type == "MatMulIntegerToFloat" for name in node.input if (each := maker.get(name))):
            nodes.append(node)
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    out.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name != MODEL:
            os.link(path, out / path.name)
    onnx.save(model, str(out / MODEL))
    return out


def main() -> None:
    """Rewrite, measure, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folders", nargs="+", type=Path)
    for name, value in (("rounds", 7), ("prompt", 128), ("output", 32), ("threads", 1)):
        options.add_argument(f"--{name}", type=int, default=value)
    given = options.parse_args()
    dense, coded, *others = given.folders
    config = json.loads((dense / "genai_config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=coded.parent) as scratch:
        folders = {"dense": dense, "one scale per tensor": per_tensor(coded, Path(scratch, "tensor")), "w8a8": coded}
        folders |= {str(other): other for other in others}
        with Worker(OnnxRuntimeBackend().worker_command(find_target("ort-cpu"))) as worker:
            for label, folder in folders.items():
                worker.call(Load(label, str(folder), threads=given.threads))
            request = Benchmark(
                list(folders),
                prompt_tokens=given.prompt,
                output_tokens=given.output,
                rounds=given.rounds,
                vocab=int(config["model"]["vocab_size"]),
            )
            rounds = worker.call(request).rounds
    for label, times in rounds.items():
        parts = [label.ljust(24)]
        for phase in ("prefill_s", "decode_s"):
            ratios = [getattr(o, phase) / getattr(t, phase) for o, t in zip(rounds["dense"], times, strict=True)]
            parts.append(f"{phase} {statistics.median(getattr(t, phase) for t in times):.3f}")
            parts.append(f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")
        sys.stdout.write("  ".join(parts) + "\n")


if __name__ == "__main__":
    main()
