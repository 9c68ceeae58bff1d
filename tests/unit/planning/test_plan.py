"""The numbers of a plan, against sizes counted by hand."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.cli.tables import plan_table
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import stored_bytes
from compile_sparse.compiler.planning.axis_shares import group_rows
from compile_sparse.compiler.planning.speedup_bound import speedup_bound
from compile_sparse.compiler.planning.token_cost import token_cost
from compile_sparse.compiler.targets.target import Target, find_target
from compile_sparse.passes.mask import Sparsify
from compile_sparse.passes.prune_channels import PruneChannels
from compile_sparse.passes.quantize import Quantize
from tests.support.contexts import context as any_context
from tests.toys import toy_program

# The tiny models of tests.models: two layers, hidden 64, 8 heads of 8 (Llama: 4 key-value heads), MLP 88, vocabulary 96.
LAYERS, HIDDEN, MLP, VOCAB = 2, 64, 88, 96
LLAMA_ATTENTION = HIDDEN * HIDDEN * 2 + HIDDEN * (HIDDEN // 2) * 2
LLAMA_LAYER = LLAMA_ATTENTION + 3 * HIDDEN * MLP
LLAMA = LAYERS * (LLAMA_LAYER + 2 * HIDDEN) + HIDDEN + 2 * VOCAB * HIDDEN
GPT2_LAYER = HIDDEN * 3 * HIDDEN + HIDDEN * HIDDEN + 2 * HIDDEN * MLP


def context(target: Target | None = None) -> PassContext:
    return any_context(goal=target or find_target("null"), plan_only=True)


def rows(program: Program) -> dict[tuple[str, int, str, bool], dict[str, Any]]:
    """By kind, size, unit and whether it is frozen."""
    found = group_rows(analyse(program), token_cost(program))
    return {(row["kind"], row["size"], row["unit"], bool(row["frozen"])): row for row in found}


def buffers(program: Program) -> int:
    return sum(program.weights.nbytes(b.tensor) for b in program.bindings.values() if b.kind == "buffer")


@pytest.mark.parametrize(
    ("kind", "size", "unit", "count", "parameters"),
    [
        ("channels", MLP, "position", LAYERS, LAYERS * 3 * HIDDEN * MLP),
        ("heads", 4, "position", LAYERS, LAYERS * LLAMA_ATTENTION),
        ("heads", 2, "query", LAYERS, LAYERS * 2 * HIDDEN * HIDDEN),
    ],
)
def test_llama_groups(
    tiny_llama_program: Program, kind: str, size: int, unit: str, count: int, parameters: int
) -> None:
    row = rows(tiny_llama_program)[kind, size, unit, False]
    assert (row["count"], row["parameters"], row["bytes"], row["flops"]) == (
        count,
        parameters,
        4 * parameters,
        2 * parameters,
    )
    assert row["parameter_share"] == pytest.approx(parameters / LLAMA)
    assert row["byte_share"] == pytest.approx(4 * parameters / (4 * LLAMA + buffers(tiny_llama_program)))
    assert row["flop_share"] == pytest.approx(parameters / (LAYERS * LLAMA_LAYER + HIDDEN * VOCAB))


def test_everything_goes_through_the_width_and_frozen_axes_say_why(tiny_llama_program: Program) -> None:
    found = group_rows(analyse(tiny_llama_program), token_cost(tiny_llama_program))
    (width,) = (row for row in found if row["kind"] == "width")
    assert (width["parameters"], width["flop_share"], width["frozen"]) == (LLAMA, 1.0, None)
    embedding, head = (row for row in found if row["kind"] == "vocab")
    assert (embedding["parameters"], embedding["flops"]) == (VOCAB * HIDDEN, 0)  # rows are looked up
    assert (head["parameters"], head["flops"]) == (VOCAB * HIDDEN, 2 * VOCAB * HIDDEN)
    assert "model output 'logits' has a fixed shape (modeling_llama.py:" in head["frozen"]


def test_gpt2_groups_of_a_fused_and_a_tied_weight(tiny_gpt2_program: Program) -> None:
    by_key = rows(tiny_gpt2_program)
    heads = by_key["heads", 8, "position", False]
    matrices = HIDDEN * 3 * HIDDEN + HIDDEN * HIDDEN
    assert (heads["parameters"], heads["flops"]) == (LAYERS * (matrices + 3 * HIDDEN), LAYERS * 2 * matrices)
    channels = by_key["channels", MLP, "position", False]
    assert channels["parameters"] == LAYERS * (2 * HIDDEN * MLP + MLP)
    assert channels["flops"] == LAYERS * 2 * 2 * HIDDEN * MLP
    tied = by_key["vocab", VOCAB, "position", True]  # one tensor, looked up and multiplied
    assert (tied["parameters"], tied["flops"]) == (VOCAB * HIDDEN, 2 * VOCAB * HIDDEN)


def test_of_a_fused_weight_only_the_segments_count(tiny_gpt2_program: Program) -> None:
    analysis = analyse(tiny_gpt2_program)
    values = next(group for group in analysis.groups if "v_dim" in group.roles)
    (row,) = group_rows(replace(analysis, groups=(values,)), token_cost(tiny_gpt2_program))
    # A third of the fused projection and of its bias, and the output projection.
    assert row["parameters"] == HIDDEN * HIDDEN + HIDDEN + HIDDEN * HIDDEN
    assert row["flops"] == 2 * 2 * HIDDEN * HIDDEN


def test_a_token_reads_one_row_of_each_embedding(tiny_llama_program: Program, tiny_gpt2_program: Program) -> None:
    llama, gpt2 = token_cost(tiny_llama_program), token_cost(tiny_gpt2_program)
    assert sum(llama.read_bytes.values()) == 4 * (LLAMA - (VOCAB - 1) * HIDDEN) + buffers(tiny_llama_program)
    assert sum(llama.flops.values()) == 2 * (LAYERS * LLAMA_LAYER + VOCAB * HIDDEN)
    assert llama.head_flops == 2 * VOCAB * HIDDEN
    # GPT-2's tied embedding is read whole by the head; of its 64 learned positions one row is.
    assert stored_bytes(tiny_gpt2_program) - sum(gpt2.read_bytes.values()) == 4 * 63 * HIDDEN
    assert sum(gpt2.flops.values()) == 2 * (LAYERS * GPT2_LAYER + VOCAB * HIDDEN)


def test_a_token_uses_the_experts_it_chooses(captured: Callable[[str], Program]) -> None:
    program = captured("mixtral")  # 7 experts of which 2 are chosen, hidden 48, MLP 88
    cost = token_cost(program)
    experts = [name for name in cost.flops if ".experts." in name]
    elements = sum(program.weights.elements(name) for name in experts)
    assert elements == LAYERS * 7 * 3 * 48 * 88
    assert sum(cost.flops[name] for name in experts) == 2 * elements * 2 // 7
    assert sum(cost.read_bytes[name] for name in experts) == 4 * elements * 2 // 7
    attention = 48 * 60 * 2 + 48 * 30 * 2  # six query heads and three key-value heads of ten
    assert sum(cost.flops.values()) == 2 * (LAYERS * (attention + 7 * 48) + 48 * VOCAB) + 2 * elements * 2 // 7


def test_an_encoder_is_counted_by_sample(tiny_bert_program: Program) -> None:
    block, pooler = LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * MLP), HIDDEN * HIDDEN
    assert sum(token_cost(tiny_bert_program, tokens=10).flops.values()) == 2 * (10 * block + pooler)
    gain = speedup_bound(tiny_bert_program, tiny_bert_program, find_target("null"), prompt=10)
    assert set(gain) == {"basis", "forward"}
    assert (gain["forward"]["baseline"], gain["forward"]["at_most"]) == (2 * (10 * block + pooler), 1.0)


@pytest.mark.parametrize(
    ("layer", "multiply_adds"),
    [
        (torch.nn.Conv2d(4, 6, 3, padding=1), 25 * 6 * 4 * 9),
        (torch.nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), 9 * 8 * 2 * 9),
        (torch.nn.ConvTranspose2d(4, 6, 2, stride=2), 25 * 4 * 6 * 4),
    ],
    ids=["plain", "grouped", "transposed"],
)
def test_convolutions_are_counted_at_every_place(layer: torch.nn.Module, multiply_adds: int) -> None:
    program = toy_program(layer, [torch.zeros(2, 4, 5, 5)], dynamic=[{0: torch.export.Dim("batch")}])
    cost = token_cost(program)
    assert cost.flops == {"weight": 2 * multiply_adds}
    assert cost.read_bytes == {b.tensor: program.weights.nbytes(b.tensor) for b in program.bindings.values()}


def test_products_that_cannot_be_counted_leave_no_bound() -> None:
    class Letters(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,oi->bo", x, self.weight)

    program = toy_program(Letters(3, 4, bias=False), [torch.zeros(2, 3)])
    found = speedup_bound(program, program, find_target("null"), prompt=1)["forward"]
    assert found["at_most"] is None
    assert found["unknown_because"] == "the work of einsum is not counted"


def test_the_bound_of_pruned_channels(tiny_llama_program: Program) -> None:
    step = PruneChannels(fraction=0.25)
    planned = step.run(tiny_llama_program, context()).program
    made = step.run(tiny_llama_program, replace(context(), plan_only=False)).program
    gain = speedup_bound(tiny_llama_program, planned, find_target("null"), prompt=8)
    assert gain == speedup_bound(tiny_llama_program, made, find_target("null"), prompt=8)
    kept = 64  # the multiple of 8 nearest to 66
    removed = LAYERS * 3 * HIDDEN * (MLP - kept)
    read = 4 * (LLAMA - (VOCAB - 1) * HIDDEN) + buffers(tiny_llama_program)
    assert gain["decode"]["at_most"] == pytest.approx(read / (read - 4 * removed))
    # The head is left out: a prompt needs its last position only, and a bound must hold for runtimes that know.
    work = LAYERS * LLAMA_LAYER
    assert gain["prefill"]["at_most"] == pytest.approx(work / (work - removed))
    assert gain["decode"]["if"] == "bandwidth-bound on weights"


def test_quantized_products_have_no_bound_but_their_bytes_have(tiny_llama_program: Program) -> None:
    planned = Quantize(scheme="w8a16").run(tiny_llama_program, context()).program
    gain = speedup_bound(tiny_llama_program, planned, find_target("null"), prompt=8)
    assert gain["prefill"]["at_most"] is None
    assert "another rate" in gain["prefill"]["unknown_because"]
    assert gain["prefill"]["compiled"] == gain["prefill"]["baseline"]
    assert 2.0 < gain["decode"]["at_most"] < 4.0  # a byte for four, and scales


def test_zeros_that_the_target_skips_have_no_bound(tiny_llama_program: Program) -> None:
    planned = Sparsify(pattern="2:4").run(tiny_llama_program, context()).program
    paying = speedup_bound(tiny_llama_program, planned, find_target("null"), prompt=8)
    assert {paying[phase]["at_most"] for phase in ("decode", "prefill")} == {None}
    assert "2:4" in paying["decode"]["unknown_because"]
    useless = speedup_bound(tiny_llama_program, planned, find_target("ort-cpu"), prompt=8)
    assert {useless[phase]["at_most"] for phase in ("decode", "prefill")} == {1.0}


def test_the_table_calls_the_bound_a_bound(tiny_llama_program: Program) -> None:
    planned = PruneChannels(fraction=0.25).run(tiny_llama_program, context()).program
    gain = speedup_bound(tiny_llama_program, planned, find_target("null"), prompt=8)
    plan = {"groups": list(rows(tiny_llama_program).values()), "gain": gain}
    written = io.StringIO()
    Console(width=140, file=written).print(plan_table(plan))
    text = written.getvalue()
    for part in (
        "at most (not measured)",
        "at most 1.17x if bandwidth-bound on weights",
        "at most 1.19x if compute-bound on weights",
        "A bound from shapes, not a measurement",
        "heads (query, in each group)",
        "47.6%",
        "52.4%",
    ):
        assert part in text, part
