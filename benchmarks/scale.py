"""What planning costs on deep models: capture, analysis, and pruning with its proof, on shapes alone.

    python benchmarks/scale.py [llama-24] [llama-70b]

No weights are read or made: the models are captured from their configs. Prints CPU seconds and peak resident memory per step.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compile_sparse.compiler.axes.analysis import Analysis, analyse
from compile_sparse.compiler.axes.groups import Anchor
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.ir.program import Program

MODELS: dict[str, dict[str, Any]] = {
    "llama-24": {
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def captured(sizes: dict[str, Any]) -> Program:
    """A Llama of these sizes, without weights."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return capture(open_folder(folder), require_weights=False)


def quarter(analysis: Analysis) -> dict[Anchor, torch.Tensor]:
    """A quarter of every channel, head and width group removed."""
    keep = {}
    for group in analysis.prunable():
        if group.kind in ("channels", "heads", "width") and "broadcast" not in group.roles:
            keep[group.anchor] = torch.arange(group.size) >= group.size // 4
    return keep


@contextmanager
def measured(step: str) -> Iterator[None]:
    gc.collect()  # what earlier steps left is not this step's cost: ten times that of an analysis
    start = time.process_time()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  {step:26s} {time.process_time() - start:8.3f} CPU s   peak {peak:5.2f} GiB", flush=True)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names:
        print(name)
        with measured("capture"):
            program = captured(MODELS[name])
        print(f"  {len(program.graph.nodes)} nodes, {program.parameter_count() / 1e9:.2f} B parameters")
        with measured("analysis"):
            analysis = analyse(program)
        with measured("plan, rewrite and check"):
            pruned = rewrite(program, analysis, quarter(analysis))
        print(f"  {len(analysis.groups)} groups, {pruned.parameter_count() / 1e9:.2f} B parameters after a quarter")


if __name__ == "__main__":
    main(sys.argv[1:] or list(MODELS))
