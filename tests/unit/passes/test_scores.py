"""Every criterion against its formula written out, by hand-made slices and the original model's own gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from compile_sparse.compiler.axes.analysis import Analysis, analyse
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.passes.criteria.consumers import contracted_dim
from compile_sparse.passes.criteria.registry import CRITERIA
from compile_sparse.testing.models import build_model
from tests.toys import toy_program

WINDOWS = CalibrationStream(((5, 9, 12, 40, 3, 8), (7, 7, 20, 33, 90, 4), (11, 60, 2)))
HEADS, KV, REPEATS, SIZE = 8, 4, 2, 8
"""Of the tiny models: query heads, key-value heads, query heads of each, elements per head."""

Captured = Callable[[str], Program]
Slices = dict[str, Callable[[torch.Tensor], torch.Tensor]]
"""Parameter name -> function that arranges its elements as ``[positions, elements]``."""


def score(criterion: str, analysis: Analysis, group: Group, windows: CalibrationStream = WINDOWS) -> torch.Tensor:
    (found,) = CRITERIA[criterion].score(analysis, [group], windows, SilentProgress()).values()
    return found


def find_group(analysis: Analysis, kind: str, size: int) -> Group:
    return next(group for group in analysis.prunable(kind) if group.size == size)


def observed(program: Program, node: str) -> torch.Tensor:
    """Rows of one node's value on all windows, float64."""
    rows: list[torch.Tensor] = []
    for window in WINDOWS.windows:
        inputs = decoder_inputs(program, torch.tensor([window]))
        Executor(program).run(inputs, observe={node: lambda value: rows.append(value.flatten(0, -2).double())})
    return torch.cat(rows)


# The tiny models' first layer: what each position of a group owns, and its consumer as ``[K, N]`` plus columns per position.
MLP_LLAMA: Slices = {
    "model.layers.0.mlp.gate_proj.weight": lambda w: w,
    "model.layers.0.mlp.up_proj.weight": lambda w: w,
    "model.layers.0.mlp.down_proj.weight": lambda w: w.T,
}
HEADS_LLAMA: Slices = {
    "model.layers.0.self_attn.q_proj.weight": lambda w: w.view(KV, -1),
    "model.layers.0.self_attn.k_proj.weight": lambda w: w.view(KV, -1),
    "model.layers.0.self_attn.v_proj.weight": lambda w: w.view(KV, -1),
    "model.layers.0.self_attn.o_proj.weight": lambda w: w.T.reshape(KV, -1),
}
MLP_GPT2: Slices = {
    "transformer.h.0.mlp.c_fc.weight": lambda w: w.T,
    "transformer.h.0.mlp.c_fc.bias": lambda b: b[:, None],
    "transformer.h.0.mlp.c_proj.weight": lambda w: w,
}
HEADS_GPT2: Slices = {
    "transformer.h.0.attn.c_attn.weight": lambda w: w.T.reshape(3, HEADS, -1).transpose(0, 1).flatten(1),
    "transformer.h.0.attn.c_attn.bias": lambda b: b.view(3, HEADS, -1).transpose(0, 1).flatten(1),
    "transformer.h.0.attn.c_proj.weight": lambda w: w.view(HEADS, -1),
}
CASES = {
    "llama-mlp": ("llama", "channels", 88, MLP_LLAMA),
    "llama-kv-groups": ("llama", "heads", KV, HEADS_LLAMA),
    "gpt2-mlp": ("gpt2", "channels", 88, MLP_GPT2),
    "gpt2-heads": ("gpt2", "heads", HEADS, HEADS_GPT2),
}
each_case = pytest.mark.parametrize("case", CASES)


@each_case
def test_magnitude(captured: Captured, case: str) -> None:
    name, kind, size, slices = CASES[case]
    analysis = analyse(captured(name))
    weights = analysis.program.weights
    wanted = sum(arrange(weights.load(tensor).double()).square().sum(1) for tensor, arrange in slices.items())
    torch.testing.assert_close(score("magnitude", analysis, find_group(analysis, kind, size)), wanted.sqrt())


@each_case
@pytest.mark.parametrize("criterion", ["activation", "wanda", "fasp"])
def test_scores_of_the_consumers_input(captured: Captured, case: str, criterion: str) -> None:
    name, kind, size, slices = CASES[case]
    analysis = analyse(captured(name))
    group = find_group(analysis, kind, size)
    (consumer,) = group.consumers
    tensor = list(slices)[-1]
    assert consumer.weight == tensor
    # [positions, columns of a position, outputs] and [positions, columns of a position]
    weight = slices[tensor](analysis.program.weights.load(tensor).double()).view(size, -1, 64)
    squares = observed(analysis.program, consumer.operand).square().mean(0).view(size, -1)
    if criterion == "activation":
        wanted = squares.mean(1).sqrt()
    elif criterion == "wanda":
        wanted = (weight.square() * squares[..., None]).sum((1, 2)).sqrt()
    else:
        wanted = (weight.abs() * squares.sqrt()[..., None]).sum((1, 2))
    # Batched and single runs round float32 products differently.
    torch.testing.assert_close(score(criterion, analysis, group), wanted, rtol=1e-4, atol=1e-7)


def gate_gradients(name: str, slices: Slices) -> torch.Tensor:
    """``sum of w dL/dw`` per window and position, ``[windows, positions]``, by the original model's own autograd."""
    model = build_model(name)
    rows = []
    for window in WINDOWS.windows:
        model.zero_grad()
        ids = torch.tensor([window])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        products = {key: value.detach() * value.grad for key, value in model.named_parameters() if key in slices}
        assert products.keys() == slices.keys()
        rows.append(sum(arrange(products[key].double()).sum(1) for key, arrange in slices.items()))
    return torch.stack(rows)


@each_case
def test_sensitivities(captured: Captured, case: str) -> None:
    name, kind, size, slices = CASES[case]
    analysis = analyse(captured(name))
    group = find_group(analysis, kind, size)
    gates = gate_gradients(name, slices)
    # Signed sums of float32 products cancel: the error is that of the terms, not of the result.
    slack = 1e-5 * float(gates.abs().max())
    torch.testing.assert_close(score("taylor", analysis, group), gates.abs().mean(0), rtol=1e-4, atol=slack)
    wanted = gates.square().mean(0)
    torch.testing.assert_close(score("fisher", analysis, group), wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


def test_taylor_is_the_slope_of_the_loss(tiny_llama_program: Program) -> None:
    """An oracle without autograd: scale everything a channel couples and watch the loss."""
    channel, step = 17, 1e-2
    analysis = analyse(tiny_llama_program)
    window = CalibrationStream(WINDOWS.windows[:1])
    found = score("taylor", analysis, find_group(analysis, "channels", 88), window)[channel]
    ids = torch.tensor(window.windows)

    def loss(scale: float) -> float:
        model = build_model("llama").double()
        mlp = model.model.layers[0].mlp
        with torch.no_grad():
            mlp.gate_proj.weight[channel] *= scale
            mlp.up_proj.weight[channel] *= scale
            mlp.down_proj.weight[:, channel] *= scale
            return float(model(input_ids=ids, labels=ids, use_cache=False).loss)

    slope = (loss(1 + step) - loss(1 - step)) / (2 * step)
    # Truncation is of order step^2; the loss is rounded to float32: 1e-6 / (2 step) of a slope of a few hundredths.
    assert float(found) == pytest.approx(abs(slope), rel=1e-2)


def test_sensitivity_does_not_depend_on_batching(tiny_llama_program: Program) -> None:
    analysis = analyse(tiny_llama_program)
    group = find_group(analysis, "channels", 88)
    for criterion in ("taylor", "fisher"):
        alone = score(criterion, analysis, group, CalibrationStream(WINDOWS.windows, tokens_per_batch=1))
        assert torch.equal(score(criterion, analysis, group), alone)


def test_tied_weights_count_once_with_both_uses(captured: Captured) -> None:
    """The width axis runs through the tied embedding, whose gradient is the sum over its two uses."""
    analysis = analyse(captured("llama_tied"))
    group = find_group(analysis, "width", 64)
    model = build_model("llama_tied")
    rows = []
    for window in WINDOWS.windows:
        model.zero_grad()
        ids = torch.tensor([window])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        total = torch.zeros(64, dtype=torch.float64)
        for key, value in model.named_parameters():
            product = (value.detach() * value.grad).double()
            inner = value.ndim == 1 or key.endswith(
                ("embed_tokens.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")
            )
            inner = inner or key.endswith(("gate_proj.weight", "up_proj.weight"))
            total += product.view(-1, 64).sum(0) if inner else product.sum(1)
        rows.append(total.abs())
    wanted = torch.stack(rows).mean(0)
    torch.testing.assert_close(score("taylor", analysis, group), wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_several_groups_at_once_are_what_each_is_alone(tiny_llama_program: Program, criterion: str) -> None:
    analysis = analyse(tiny_llama_program)
    groups = analysis.prunable("channels") + [g for g in analysis.prunable("heads") if g.size == KV]
    assert len(groups) == 4
    together = CRITERIA[criterion].score(analysis, groups, WINDOWS, SilentProgress())
    for group in groups:
        found = together[group.leaf]
        assert found.dtype == torch.float64 and found.shape == (group.size,)
        assert criterion == "ablation" or bool((found >= 0).all())  # a model may be better off without a position
        torch.testing.assert_close(found, score(criterion, analysis, group))


@pytest.mark.parametrize("criterion", ["activation", "wanda", "fasp"])
def test_what_no_weight_contracts_cannot_be_ranked_by_its_input(tiny_llama_program: Program, criterion: str) -> None:
    analysis = analyse(tiny_llama_program)
    rotary = next(group for group in analysis.groups if group.kind == "head_dim" and not group.consumers)
    with pytest.raises(UsageError) as caught:
        score(criterion, analysis, rotary)
    assert caught.value.code == "CS1126"
    assert criterion in caught.value.what


class Residual(torch.nn.Module):
    """``h + mix(h)`` with a square weight: both of its dimensions are the axis that is pruned."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.mix = torch.nn.Parameter(torch.randn(16, 16))
        self.form = form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x).relu()
        if self.form == "linear":
            h = h + torch.nn.functional.linear(h, self.mix)
        elif self.form == "mm":
            h = h + h @ self.mix
        elif self.form == "mm-transposed":
            h = h + h @ self.mix.t()
        elif self.form == "addmm":
            h = torch.addmm(h, h, self.mix.permute(1, 0))
        else:
            h = h + (self.mix @ h.t()).t()
        return self.down(h)


@pytest.mark.parametrize(
    ("form", "dim"), [("linear", 1), ("mm", 0), ("mm-transposed", 1), ("addmm", 1), ("weight-on-the-left", 1)]
)
def test_the_contracted_side_of_a_square_weight(form: str, dim: int) -> None:
    analysis = analyse(toy_program(Residual(form), [torch.randn(3, 8)]))
    (group,) = (found for found in analysis.groups if found.size == 16 and not found.frozen)
    found: Sequence[int] = [contracted_dim(analysis, c) for c in group.consumers if c.weight == "mix"]
    assert found == [dim]
