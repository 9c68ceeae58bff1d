"""Raising must not change values, must say what it left alone, and must refuse what it cannot prove."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import fx

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.nodes import is_op, qualified_name
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.lowering import AttentionShape, raising_steps, run_steps
from tests.support.tolerance import fp32_tolerance

ProgramOf = Callable[[str], Program]
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "opt")


def _raised(
    program: Program, refuse: Callable[[AttentionShape], str] = lambda shape: ""
) -> tuple[Program, list[Diagnostic]]:
    return run_steps(program, raising_steps(refuse))


def _operators(program: Program) -> Counter[str]:
    return Counter(qualified_name(node) for node in program.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(("batch", "length", "padded"), [(2, 7, False), (1, 1, False), (3, 9, True)])
def test_raised_program_gives_the_same_values(
    captured: ProgramOf, name: str, batch: int, length: int, padded: bool
) -> None:
    program = captured(name)
    raised, left_alone = _raised(program)
    verify_program(raised, after="raising")
    assert not left_alone
    ids = torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(batch, length, dtype=torch.long)
    if padded:
        mask[1, 4:] = 0
        mask[2, 6:] = 0
    before = Executor(program).run(decoder_inputs(program, ids, attention_mask=mask))
    after = Executor(raised).run(decoder_inputs(raised, ids, attention_mask=mask))
    error = (before["logits"] - after["logits"]).abs() * mask[..., None]
    assert float(error.max()) <= fp32_tolerance(before["logits"])
    if padded:
        return
    longer = torch.ones(batch, length + 3, dtype=torch.long)
    step = ids[:, :1].expand(-1, 3).contiguous()
    before = Executor(program).run(decoder_inputs(program, step, attention_mask=longer, past=before))
    after = Executor(raised).run(decoder_inputs(raised, step, attention_mask=longer, past=after))
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=fp32_tolerance(value))


@pytest.mark.parametrize(
    ("name", "rotary", "window"),
    [("llama", True, 0), ("qwen3", True, 0), ("mistral", True, 4), ("gpt2", False, 0), ("opt", False, 0)],
)
def test_the_whole_attention_becomes_one_operator(captured: ProgramOf, name: str, rotary: bool, window: int) -> None:
    raised, _ = _raised(captured(name))
    operators = _operators(raised)
    assert operators["compile_sparse::cached_attention"] == 2
    assert not {"aten::scaled_dot_product_attention", "aten::cat", "aten::neg", "aten::arange"} & set(operators)
    attention = next(n for n in raised.graph.nodes if is_op(n, "compile_sparse::cached_attention"))
    assert (attention.args[6] is not None) == rotary
    assert attention.args[11] == window


def test_the_original_is_untouched(captured: ProgramOf) -> None:
    program = captured("llama")
    before = str(program.graph)
    _raised(program)
    assert str(program.graph) == before


def _edit_mask(program: Program, edit: str) -> Program:
    """The same program with a mask that is no longer causal."""
    changed = program.clone()
    attention = next(n for n in changed.graph.nodes if is_op(n, "aten::scaled_dot_product_attention"))
    mask = attention.args[3]
    assert isinstance(mask, fx.Node)
    for node in changed.graph.nodes:
        if edit == "strict" and is_op(node, "aten::le"):
            node.target = torch.ops.aten.lt.Tensor
        if edit == "ignores padding" and is_op(node, "aten::index"):
            with changed.graph.inserting_after(node):
                always = changed.graph.call_function(torch.ops.aten.ones_like.default, (node,))
            always.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(always, delete_user_cb=lambda user, new=always: user is not new)
        if edit == "flipped" and is_op(node, "aten::le"):
            node.target = torch.ops.aten.ge.Tensor
    return changed


@pytest.mark.parametrize("edit", ["strict", "flipped"])
def test_a_mask_that_is_not_causal_stays_explicit(captured: ProgramOf, edit: str) -> None:
    raised, left_alone = _raised(_edit_mask(captured("llama"), edit))
    assert [found.code for found in left_alone] == ["CS2303", "CS2303"]
    assert _operators(raised)["aten::scaled_dot_product_attention"] == 2


def test_a_mask_that_ignores_right_padding_is_still_causal_for_valid_queries(captured: ProgramOf) -> None:
    raised, left_alone = _raised(_edit_mask(captured("llama"), "ignores padding"))
    assert not left_alone
    assert _operators(raised)["compile_sparse::cached_attention"] == 2


def test_angles_that_depend_on_the_length_stay_outside(captured: ProgramOf) -> None:
    changed = captured("llama").clone()
    cosine = next(n for n in changed.graph.nodes if is_op(n, "aten::cos"))
    angle = cosine.args[0]
    assert isinstance(angle, fx.Node)
    with changed.graph.inserting_before(cosine):
        length = changed.graph.call_function(torch.ops.aten.sym_size.int, (angle, 1))
        length.meta["val"] = angle.meta["val"].shape[1]
        scaled = changed.graph.call_function(torch.ops.aten.mul.Tensor, (angle, length))
        scaled.meta["val"] = angle.meta["val"]
    cosine.args = (scaled,)
    raised, left_alone = _raised(changed)
    assert [found.code for found in left_alone] == ["CS2304", "CS2304"]
    attention = next(n for n in raised.graph.nodes if is_op(n, "compile_sparse::cached_attention"))
    assert attention.args[6] is None
    inputs = decoder_inputs(changed, torch.tensor([[5, 9, 11, 4]]))
    expected = Executor(changed).run(inputs)["logits"]
    torch.testing.assert_close(Executor(raised).run(inputs)["logits"], expected, rtol=0, atol=fp32_tolerance(expected))


def test_a_backend_may_refuse_a_shape_or_only_the_rotation(captured: ProgramOf) -> None:
    program = captured("llama")
    whole, left_alone = _raised(program, lambda shape: "too wide.")
    assert {found.code for found in left_alone} == {"CS2304", "CS2305"}
    assert "compile_sparse::cached_attention" not in _operators(whole)

    def no_rotation(shape: AttentionShape) -> str:
        return "no rotation." if shape.rotary else ""

    partly, left_alone = _raised(program, no_rotation)
    assert {found.code for found in left_alone} == {"CS2304"}
    assert _operators(partly)["compile_sparse::cached_attention"] == 2


def test_a_norm_without_weight_is_reported(captured: ProgramOf) -> None:
    changed = captured("llama").clone()
    root = next(n for n in changed.graph.nodes if is_op(n, "aten::rsqrt"))
    scaled = next(iter(root.users))
    gain = next(iter(scaled.users))
    gain.replace_all_uses_with(scaled)
    changed.graph.erase_node(gain)
    _, left_alone = _raised(changed)
    assert [found.code for found in left_alone] == ["CS2301"]
