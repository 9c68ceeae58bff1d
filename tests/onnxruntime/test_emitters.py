"""Operators one by one: the ONNX graph of a function gives what torch gives, at two sizes of the dynamic dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.export import Dim

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.backends.onnxruntime.lowering import rehearse, write_graph
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from tests.onnxruntime.running import run, session
from tests.toys import Applied, toy_program

F = torch.nn.functional
Function = Callable[[torch.Tensor], torch.Tensor]


def image(x: torch.Tensor, channels: int = 4, size: int = 6) -> torch.Tensor:
    """``[batch, channels, size, size]``, every element another function of x."""
    steps = torch.arange(channels * size * size).reshape(channels, size, size) / 7
    return torch.sin(x[:, :1, None, None] * 3 + x[:, 1:2, None, None] * steps + steps)


def weight(*shape: int) -> torch.Tensor:
    """A weight kept in the graph."""
    return torch.cos(torch.arange(math.prod(shape)) * 1.3).reshape(shape)


# One argument, float [batch, 6] with a dynamic batch.
FUNCTIONS: dict[str, Function] = {
    "arithmetic": lambda x: (2 - x) * 3 + torch.sub(x, x.neg(), alpha=2) / 4.0,
    "division of integers": lambda x: torch.arange(6) / 4 + x,
    "comparison with a number": lambda x: torch.where(x > 0.5, x, -1.0),
    "integer against float": lambda x: ((x * 4).to(torch.int64) >= 1.5).float(),
    "logic": lambda x: (((x > 0) & (x < 1)) | ~(x != x)).float(),
    "booleans multiplied": lambda x: ((x > 0) * (x < 1)).float(),
    "clamp": lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0),
    "powers": lambda x: x.pow(2) + x.abs().pow(1.5) + torch.rsqrt(x.abs() + 1),
    "functions": lambda x: x.sin() + x.cos() + x.exp() + (x.abs() + 1).log() + x.tanh() + x.sigmoid() + torch.erf(x),
    "rounding": lambda x: (x * 3).floor() + (x * 2).ceil() * x.sign(),
    "activations": lambda x: F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh") + F.relu(x) + F.hardswish(x),
    "reductions": lambda x: x.mean(-1) + x.sum(1) + x.amax(-1) - x.amin(-1) + x.mean((0, 1)),
    "any and all": lambda x: (x > 0).any(-1).float() + (x > -9).all(-1).float(),
    "maximum": lambda x: torch.maximum(x, -x) + torch.max(x),
    "softmax": lambda x: x.softmax(-1) + x.softmax(0),
    "top positions": lambda x: x.topk(3, -1)[0].sum(-1) + x.topk(2, -1, largest=False)[1].sum(-1),
    "repeated positions": lambda x: x.repeat_interleave(3, 0).cumsum(0) + x.repeat_interleave(3, 0),
    "cumulative sum": lambda x: (x > 0).cumsum(1).float() + x.cumsum(0),
    "reshape with a dynamic size": lambda x: x.reshape(x.shape[0], 2, 3).reshape(-1, 3).reshape(x.shape[0], -1),
    "flatten and unflatten": lambda x: x.unflatten(1, (2, 3)).flatten(0, 1),
    "expand": lambda x: x[:, None].expand(-1, 4, -1) + x.unsqueeze(0).expand(2, x.shape[0], 6)[:, :1, None, :].sum(0),
    "slices": lambda x: x[:, 1:5:2] + x[:, -2:] * x[:1, 3:4],
    "slice to a dynamic end": lambda x: torch.cat([x, x])[: x.shape[0]] + torch.cat([x, x * 2])[x.shape[0] :],
    "select": lambda x: x[:, 2] + x.select(1, -1),
    "split": lambda x: torch.cat([p * i for i, p in enumerate(x.split(4, 1))], 1) + torch.cat(x.chunk(2, 1)[::-1], 1),
    "stack and permute": lambda x: torch.stack([x, x * 2], 1).permute(2, 0, 1).transpose(0, -1),
    "squeeze": lambda x: x[:, None, :, None].squeeze(-1).squeeze(1),
    "arange": lambda x: torch.arange(x.shape[0])[:, None] + x + torch.arange(2, 14, 2),
    "created": lambda x: (
        x.new_ones(x.shape[0], 6) + torch.full((6,), 2.5) + torch.ones_like(x) + torch.zeros(x.shape[0], 1)
    ),
    "masked fill": lambda x: x.masked_fill(x > 0, -3),
    "gather": lambda x: x[:, torch.tensor([2, 0, 2])] + x.index_select(1, torch.tensor([1, 1, 1])),
    "index by two broadcast indices": lambda x: x[torch.arange(x.shape[0])[:, None], torch.arange(3)[None, :]],
    "matmul": lambda x: x @ x.t() @ x + torch.bmm(x[None], x.t()[None])[0] @ x,
    "layer norm without weight": lambda x: F.layer_norm(x, (6,)),
    "convolution": lambda x: F.conv1d(x[:, None], torch.ones(2, 1, 3), padding=1, stride=2),
    "rectifiers": lambda x: (
        F.relu6(x * 4) + F.hardtanh(x, -0.5, 0.7) + F.leaky_relu(x, 0.2) + F.elu(x, 0.5) + F.selu(x)
    ),
    "smooth activations": lambda x: F.hardsigmoid(x) + F.softplus(x) + F.mish(x) + F.softsign(x) + x.log_softmax(-1),
    "slope per channel": lambda x: (
        F.prelu(x, torch.arange(6) / 4) + F.prelu(x[:, :, None, None], torch.full((1,), 0.3)).sum((2, 3))
    ),
    "gated linear unit": lambda x: F.glu(x, 1) + F.glu(x, -1),
    "vector norm": lambda x: F.normalize(x, dim=-1) + torch.linalg.vector_norm(x, dim=0),
    "roll": lambda x: (
        x.roll(2, 1) - x.roll((-1, 1), (1, 1)) + x.roll(6, 1) + x.unflatten(1, (2, 3)).roll((1, -1), (1, 2)).flatten(1)
    ),
    "repeat": lambda x: x.repeat(1, 2)[:, 3:9] + x.repeat(x.shape[0], 1, 1).sum(0) + (x > 0).type_as(x),
    "unbind": lambda x: x.unbind(1)[1] * x.unflatten(1, (2, 3)).unbind(2)[-1].sum(1),
    "pad": lambda x: (
        F.pad(x, (1, 2)) + F.pad(x, (2, 1), value=0.5) + F.pad(x, (4, -1)) + F.pad(x, (0, 3))[: x.shape[0]]
    ),
    "pad a batch": lambda x: F.pad(x, (0, 0, 1, 2)),
    "pad from inside": lambda x: (
        F.pad(image(x), (1, 1, 0, 2), mode="reflect")[:, :, 1:] * F.pad(image(x), (2, 0, 0, 1), mode="replicate")
        + F.pad(image(x), (0, 2, 1, 0), mode="circular")
    ),
    "einsum": lambda x: (
        torch.einsum("bi,oi->bo", x, torch.ones(4, 6)) + torch.einsum("...i,i", x, torch.arange(6.0))[:, None]
    ),
    "scalar sizes": lambda x: x * x.shape[0] + (x.shape[0] * 2 - 1) // 2,
}

FUNCTIONS |= {
    "convolution by name": lambda x: (
        F.conv2d(image(x), weight(5, 4, 2, 3), padding="same")
        + F.conv2d(image(x), weight(5, 4, 1, 1), weight(5), padding="valid")
        + F.conv2d(image(x), weight(5, 4, 3, 3), padding="same", dilation=2)
    ),
    "grouped convolution": lambda x: (
        F.conv2d(image(x), weight(8, 2, 3, 3), weight(8), stride=2, padding=(1, 0), groups=2).sum(3)
        + F.conv2d(image(x), weight(8, 1, 3, 3), stride=2, padding=1, groups=4).sum(3)
    ),
    "convolution of a volume": lambda x: F.conv3d(image(x)[:, None], weight(2, 1, 2, 3, 3), padding=(0, 1, 1)),
    "transposed convolution": lambda x: (
        F.conv_transpose2d(image(x), weight(4, 3, 3, 3), weight(3), stride=2, padding=1, output_padding=1)
        + F.conv_transpose2d(image(x), weight(4, 3, 2, 2), stride=2)
    ),
    "grouped transposed convolution": lambda x: F.conv_transpose1d(
        image(x).flatten(2), weight(4, 3, 3), stride=2, dilation=2, groups=2
    ),
    "batch norm": lambda x: (
        F.batch_norm(image(x), weight(4), weight(4) + 2, weight(4), weight(4))
        + F.batch_norm(image(x), weight(4), weight(4) + 2)
    ),
    "group norm": lambda x: F.group_norm(image(x), 2, weight(4), weight(4) + 1, 1e-3) + F.group_norm(image(x), 4),
    "instance norm": lambda x: (
        F.instance_norm(image(x), weight=weight(4), bias=weight(4))
        + F.instance_norm(image(x), weight(4), weight(4) + 2, use_input_stats=False)
    ),
    "maximum pooling": lambda x: (
        F.max_pool2d(image(x), 3, 2, 1)
        + F.max_pool2d(image(x), 2, return_indices=True)[0]
        + F.max_pool2d(image(x), 2, ceil_mode=True)
    ),
    "mean pooling": lambda x: (
        F.avg_pool2d(image(x), 3, 2, 1)
        + F.avg_pool2d(image(x), 3, 2, 1, count_include_pad=False)
        + F.avg_pool2d(image(x), (2, 2))
    ),
    "windows larger than the image": lambda x: (
        F.avg_pool2d(image(x), 9, ceil_mode=True) + F.max_pool2d(image(x), (7, 6), 2, ceil_mode=True)
    ),
    "pooling of a line": lambda x: F.max_pool1d(x[:, None], 2) + F.avg_pool1d(x[:, None], 3, 2, 1),
    "adaptive pooling": lambda x: (
        F.adaptive_avg_pool2d(image(x), 1) * F.adaptive_max_pool2d(image(x), 1)
        + F.adaptive_avg_pool2d(image(x), (2, 3)).sum()
    ),
    "adaptive pooling of a line": lambda x: F.adaptive_avg_pool1d(x[:, None], 1) + F.adaptive_max_pool1d(x[:, None], 3),
    "interpolation": lambda x: (
        F.interpolate(image(x), scale_factor=2)
        + F.interpolate(image(x), size=(12, 12), mode="nearest-exact")
        + F.interpolate(image(x), scale_factor=2, mode="bilinear")
        + F.interpolate(image(x), size=(12, 12), mode="bilinear", align_corners=True)
        + F.interpolate(image(x), size=(12, 12), mode="bicubic")
    ),
    "interpolation to a smaller size": lambda x: (
        F.interpolate(image(x), size=(4, 5)) + F.interpolate(image(x), size=(4, 5), mode="bilinear")
    ),
    "interpolation of a line": lambda x: (
        F.interpolate(x[:, None], size=9, mode="linear") + F.interpolate(x[:, None], size=9)
    ),
    "pixel shuffle": lambda x: F.pixel_shuffle(image(x, 8), 2),
}

UNSUPPORTED: dict[str, tuple[Function, str]] = {
    "positions": (lambda x: F.max_pool2d(image(x), 2, return_indices=True)[1] * 1.0, "positions of maxima"),
    "edges": (lambda x: F.max_pool2d(image(x), 4, 4, ceil_mode=True), "ceil_mode"),
    "divisor": (lambda x: F.avg_pool2d(image(x), 2, divisor_override=3), "divisor"),
    "unequal windows": (lambda x: F.adaptive_avg_pool2d(image(x), 4), "unequal"),
    "partial factor": (lambda x: F.interpolate(image(x), scale_factor=1.3, mode="bilinear"), "whole size"),
    "no batch": (
        lambda x: F.conv1d(x, weight(2, 2, 3))[0] if x.shape[0] == 2 else F.avg_pool1d(x, 2),
        "batch dimension",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_has_no_equal_form_is_planned_as_a_diagnostic(name: str) -> None:
    function, why = UNSUPPORTED[name]
    program = toy_program(Applied(function), [torch.randn(6, 6)], [{0: Dim("batch", min=3, max=64)}])
    (found,) = rehearse(program)
    assert found.code == "CS2311"
    assert why in found.why


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    function = FUNCTIONS[name]
    program = toy_program(
        Applied(function), [torch.randn(6, 6, generator=generator)], [{0: Dim("batch", min=2, max=64)}]
    )
    write_graph(program, tmp_path, SilentProgress())
    loaded = session(tmp_path)
    for batch in (6, 9):
        x = torch.randn(batch, 6, generator=generator)
        expected = Executor(program).run({"x0": x})["y0"]
        torch.testing.assert_close(run(loaded, {"x0": x})["y0"], expected, rtol=1e-5, atol=1e-5)


def test_an_operator_without_emitter_is_planned_and_refused(tmp_path: Path) -> None:
    program = toy_program(Applied(lambda x: torch.flip(x, [0]).relu()), [torch.randn(3, 4)])
    (found,) = rehearse(program)
    assert found.code == "CS2311"
    assert "aten::flip" in found.why
    assert found.where.startswith("flip")
    with pytest.raises(Refusal, match="CS2311"):
        OnnxRuntimeBackend().lower(program, find_target("ort-cpu"), tmp_path, SilentProgress())
    assert not list(tmp_path.iterdir())


def test_half_precision_is_refused(tmp_path: Path) -> None:
    program = toy_program(torch.nn.Sequential(torch.nn.Linear(4, 4)).to(torch.bfloat16), [torch.randn(3, 4).bfloat16()])
    (found,) = OnnxRuntimeBackend().plan(program, find_target("ort-cpu"))
    assert found.code == "CS2312"
    with pytest.raises(Refusal, match="CS2312"):
        OnnxRuntimeBackend().lower(program, find_target("ort-cpu"), tmp_path, SilentProgress())


def test_probe_names_what_is_missing() -> None:
    target = find_target("ort-cpu")
    backend = OnnxRuntimeBackend()
    assert backend.probe(target).available
    old = backend.probe(target.model_copy(update={"minimum_versions": {"onnxruntime": "99.0"}}))
    assert not old.available
    assert "99.0" in old.why_not
    device = backend.probe(target.model_copy(update={"device": "abacus"}))
    assert not device.available
    assert "abacus" in device.why_not
