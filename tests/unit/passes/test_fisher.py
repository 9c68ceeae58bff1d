"""Fisher information of layer outputs against the original model's own gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.passes.statistics.fisher import output_fisher, output_fisher_diagonal
from compile_sparse.testing.models import build_model

WINDOWS = CalibrationStream(((5, 9, 12, 40, 3, 8), (7, 7, 20, 33, 90, 4), (11, 60, 2)))

LAYERS = {
    "llama": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"],
}


def written_out(name: str, layer: str) -> torch.Tensor:
    """Mean of ``g g^T`` over all tokens, one window at a time, from hooks on the original model."""
    model = build_model(name)
    rows: list[torch.Tensor] = []

    def forward(_: torch.nn.Module, __: object, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: rows.append(gradient.flatten(0, 1).double()))

    model.get_submodule(layer).register_forward_hook(forward)
    for window in WINDOWS.windows:
        ids = torch.tensor([window])
        logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
    gradients = torch.cat(rows)
    assert len(gradients) == WINDOWS.tokens
    return gradients.T @ gradients / WINDOWS.tokens


@pytest.mark.parametrize("name", LAYERS)
def test_equals_hooks_on_the_original_model(captured: Callable[[str], Program], name: str) -> None:
    program = captured(name)
    nodes = {linear.tensor.removesuffix(".weight"): linear.node.name for linear in find_linears(program)[0]}
    found = output_fisher(program, [nodes[layer] for layer in LAYERS[name]], WINDOWS, SilentProgress())
    assert len(found) == len(LAYERS[name])
    for layer in LAYERS[name]:
        wanted = written_out(name, layer)
        actual = found[nodes[layer]]
        assert actual.dtype == torch.float64
        # float32 gradients; entries of a Gram are as exact as its largest one.
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_the_diagonal_is_the_diagonal(tiny_llama_program: Program) -> None:
    nodes = [linear.node.name for linear in find_linears(tiny_llama_program)[0]]
    full = output_fisher(tiny_llama_program, nodes, WINDOWS, SilentProgress())
    diagonal = output_fisher_diagonal(tiny_llama_program, nodes, WINDOWS, SilentProgress())
    assert full.keys() == diagonal.keys() == set(nodes)
    for node in nodes:
        torch.testing.assert_close(diagonal[node], full[node].diagonal(), rtol=1e-5, atol=1e-12)


def test_the_choice_of_nodes_does_not_matter(tiny_llama_program: Program) -> None:
    """Differentiation starts at the first node that is watched; what comes after is the same."""
    nodes = [linear.node.name for linear in find_linears(tiny_llama_program)[0]]
    alone = output_fisher(tiny_llama_program, [nodes[-1]], WINDOWS, SilentProgress())[nodes[-1]]
    together = output_fisher(tiny_llama_program, nodes, WINDOWS, SilentProgress())[nodes[-1]]
    assert bool(alone.any())
    torch.testing.assert_close(alone, together)


def test_fewer_windows_are_spread_over_the_text(tiny_llama_program: Program) -> None:
    node = find_linears(tiny_llama_program)[0][0].node.name
    some = output_fisher(tiny_llama_program, [node], WINDOWS, SilentProgress(), max_windows=2)[node]
    chosen = CalibrationStream((WINDOWS.windows[0], WINDOWS.windows[1]))
    torch.testing.assert_close(some, output_fisher(tiny_llama_program, [node], chosen, SilentProgress())[node])


def test_without_a_loss_it_is_refused(tiny_bert_program: Program) -> None:
    node = find_linears(tiny_bert_program)[0][0].node.name
    with pytest.raises(UsageError) as caught:
        output_fisher(tiny_bert_program, [node], WINDOWS, SilentProgress())
    assert caught.value.code == "CS1127"


def test_an_unknown_node_is_named(tiny_llama_program: Program) -> None:
    with pytest.raises(KeyError, match="nowhere"):
        output_fisher(tiny_llama_program, ["nowhere"], WINDOWS, SilentProgress())
