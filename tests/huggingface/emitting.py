"""Prune by rewriting alone, load what was written in transformers, and compare."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
import transformers as hf
from torch.utils import _pytree as pytree

from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.axes.groups import Anchor
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.verify.reference import sample_inputs

__all__ = ["load", "outputs", "pruned", "same", "tolerance"]


def pruned(program: Program, *wanted: tuple[str, int, int], only: int | None = None) -> Program:
    """``(kind, size, left)``: random ``left`` of every group of that kind and size, another choice per group.

    ``only`` keeps the change to the group of that number.
    """
    analysis = analyse(program)
    keep: dict[Anchor, torch.Tensor] = {}
    for kind, size, left in wanted:
        groups = [group for group in analysis.prunable(kind) if group.size == size]
        assert groups, f"no {kind} of {size}"
        for place, group in enumerate(groups):
            if only in (None, place):
                table = torch.zeros(size, dtype=torch.bool)
                table[torch.randperm(size, generator=torch.Generator().manual_seed(place))[:left]] = True
                keep[group.anchor] = table
    return rewrite(program, analysis, keep)


def load(folder: Path, unused: Collection[str] = ()) -> hf.PreTrainedModel:
    """The folder in its own class; nothing missing but ``unused``, nothing left over."""
    config = hf.AutoConfig.from_pretrained(folder)
    model, report = getattr(hf, config.architectures[0]).from_pretrained(folder, output_loading_info=True)
    assert (
        set(report["missing_keys"]) <= set(unused) and not report["unexpected_keys"] and not report["mismatched_keys"]
    ), report
    return model.eval()


def outputs(program: Program, model: hf.PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the program and the model compute on the same inputs, without caches."""
    if program.kind == "decoder":
        ids = torch.randint(3, program.config["vocab_size"], (3, 19), generator=torch.Generator().manual_seed(7))
        feeds, given = decoder_inputs(program, ids), {"input_ids": ids, "use_cache": False}
    else:
        feeds = {name: torch.from_numpy(v) for name, v in sample_inputs(program, 7, batch=3, length=19).items()}
        given = dict(feeds)
    expected = Executor(program).run(feeds)
    with torch.no_grad():
        result = model(**given)
    found = {}
    for name, value in result.items():
        leaves = pytree.tree_leaves(value)
        found |= {name if len(leaves) == 1 else f"{name}.{i}": leaf for i, leaf in enumerate(leaves)}
    return {name: value for name, value in expected.items() if not name.startswith("present")}, found


def tolerance(expected: torch.Tensor, width: int = 96, depth: int = 12) -> float:
    """Two float32 orders of summation of ``width`` terms differ by about ``eps * sqrt(width)`` of the value, per product."""
    return float(torch.finfo(torch.float32).eps * width**0.5 * depth * expected.abs().max())


def same(program: Program, folder: Path, unused: Collection[str] = ()) -> None:
    """Assert that the folder, loaded by transformers, computes what the program does."""
    expected, found = outputs(program, load(folder, unused))
    assert expected
    for name, value in expected.items():
        assert float(value.abs().max()) > 0
        assert float((value - found[name]).abs().max()) <= tolerance(value), name
