"""Refitting: exact where the kept inputs can say it all, never worse, and the places it may not touch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compile_sparse.compiler.axes.analysis import Analysis, analyse
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.axes.selection import KeepTables, Selection
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.passes.reconstruction.least_squares import refit
from compile_sparse.passes.reconstruction.matching import objective_of

GENERATOR = torch.Generator().manual_seed(1)
WINDOWS = CalibrationStream(tuple(tuple(torch.randint(3, 96, (24,), generator=GENERATOR).tolist()) for _ in range(24)))
SILENT = SilentProgress()


def cut(program: Program, kind: str, share: int = 4) -> tuple[Analysis, KeepTables, Program]:
    """The first ``1/share`` of the positions of every group of a kind removed."""
    analysis = analyse(program)
    keep = {
        g.anchor: torch.arange(g.size) >= g.size // share for g in analysis.prunable(kind) if "broadcast" not in g.roles
    }
    return analysis, keep, rewrite(program, analysis, keep)


def gatherer(analysis: Analysis, keep: KeepTables) -> Callable[[str, torch.Tensor], torch.Tensor]:
    selection = Selection(analysis, keep)
    return lambda node, value: selection.gather(value, analysis.labels[node])  # type: ignore[arg-type]


def stream_error(dense: Program, pruned: Program) -> float:
    """Mean square difference of the logits on the calibration text."""
    ids = torch.tensor(WINDOWS.windows)
    a = Executor(dense).run(decoder_inputs(dense, ids))["logits"]
    b = Executor(pruned).run(decoder_inputs(pruned, ids))["logits"]
    return float((a - b).double().square().mean())


def with_redundant_channels(program: Program) -> Program:
    """The first quarter of every MLP's channels become copies of the second quarter: removing them loses nothing."""
    changes = {}
    for layer in range(2):
        for part in ("gate_proj", "up_proj"):
            name = f"model.layers.{layer}.mlp.{part}.weight"
            value = program.weights.load(name).clone()
            value[:22] = value[22:44]
            changes[name] = ResidentTensor(value)
    return Program(**{**vars(program), "weights": program.weights.updated(changes)})


def test_redundant_channels_are_replaced_exactly(tiny_llama_program: Program) -> None:
    dense = with_redundant_channels(tiny_llama_program)
    analysis, keep, pruned = cut(dense, "channels")
    consumers = {c.node for g in analysis.prunable("channels") for c in g.consumers}
    plain = stream_error(dense, pruned)
    done = refit(dense, pruned, WINDOWS, SILENT, gather=gatherer(analysis, keep), only=consumers, dampings=[1e-7])
    assert done.layers == 2
    # The kept copy takes twice the weight; what is left is the ridge (1e-7 of the mean square) and float32.
    assert stream_error(dense, done.program) < 1e-6 * plain
    assert done.residual < 1e-4


@pytest.mark.parametrize("kind", ["channels", "heads", "width"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_refitting_lowers_the_error(captured: Callable[[str], Program], name: str, kind: str) -> None:
    dense = captured(name)
    analysis, keep, pruned = cut(dense, kind)
    done = refit(dense, pruned, WINDOWS, SILENT, gather=gatherer(analysis, keep))
    assert done.layers >= 2
    assert 0.0 <= done.residual < 1.0
    assert stream_error(dense, done.program) < stream_error(dense, pruned)
    for tensor, source in done.program.weights.items():
        assert source.shape == pruned.weights[tensor].shape
        assert source.dtype == pruned.weights[tensor].dtype


def test_nothing_lost_nothing_changed(tiny_llama_program: Program) -> None:
    done = refit(tiny_llama_program, tiny_llama_program, WINDOWS, SILENT)
    # Only the rounding of x W^T is missing, 2^-24 sqrt(64) of logits of about 1, and fitting that is as harmless.
    assert stream_error(tiny_llama_program, done.program) < (2**-24 * 8) ** 2 * 100


def test_biases_only(tiny_gpt2_program: Program) -> None:
    dense = tiny_gpt2_program
    analysis, keep, pruned = cut(dense, "channels")
    done = refit(dense, pruned, WINDOWS, SILENT, gather=gatherer(analysis, keep), biases_only=True)
    changed = {n for n in pruned.weights if not torch.equal(pruned.weights.load(n), done.program.weights.load(n))}
    assert changed
    assert all(name.endswith("bias") for name in changed)
    assert stream_error(dense, done.program) < stream_error(dense, pruned)


def test_biases_only_leaves_a_model_without_biases_alone(tiny_llama_program: Program) -> None:
    analysis, keep, pruned = cut(tiny_llama_program, "channels")
    done = refit(tiny_llama_program, pruned, WINDOWS, SILENT, gather=gatherer(analysis, keep), biases_only=True)
    assert done.layers == 0


def test_tied_head_and_logits_stay(captured: Callable[[str], Program]) -> None:
    dense = captured("llama_tied")
    analysis, keep, pruned = cut(dense, "channels")
    done = refit(dense, pruned, WINDOWS, SILENT, gather=gatherer(analysis, keep))
    embedding = "model.embed_tokens.weight" if "model.embed_tokens.weight" in dense.weights else "lm_head.weight"
    assert torch.equal(done.program.weights.load(embedding), pruned.weights.load(embedding))


def test_a_projection_answers_for_the_residual_sum_it_feeds(tiny_llama_program: Program) -> None:
    order = {node: place for place, node in enumerate(tiny_llama_program.graph.nodes)}
    found = {}
    for linear in find_linears(tiny_llama_program)[0]:
        objective = objective_of(linear, order)
        found[linear.tensor] = bool(objective.others)
    assert found["model.layers.0.self_attn.o_proj.weight"]
    assert found["model.layers.1.mlp.down_proj.weight"]
    assert not found["model.layers.0.self_attn.q_proj.weight"]
    assert not found["model.layers.0.mlp.up_proj.weight"]
