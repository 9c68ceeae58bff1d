"""A functional export is not decomposed: normalised, it is the graph that decomposition gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.nn import functional

from compile_sparse.compiler.capture import capture_model, huggingface
from compile_sparse.compiler.capture.functional import is_functional
from compile_sparse.compiler.capture.normalize import normalize
from compile_sparse.compiler.ir.sizes import shape_of
from compile_sparse.testing.models import build_model
from tests.toys import Applied

X = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))


def exported(function: Callable[[torch.Tensor], torch.Tensor]) -> ExportedProgram:
    return torch.export.export(Applied(function), (X,), dynamic_shapes=(({0: torch.export.Dim.DYNAMIC},),))


def printed(graph: fx.Graph) -> list[str]:
    """Calls with their arguments by place, and the shapes and types of their values."""
    place = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        given = fx.node.map_aggregate((node.args, node.kwargs), lambda item: place.get(item, item))  # type: ignore
        value = node.meta.get("val")
        kinds = [
            (item.dtype, shape_of(item))
            for item in (value if isinstance(value, (tuple, list)) else [value])
            if isinstance(item, torch.Tensor)
        ]
        lines.append(f"{node.op} {node.target if node.op == 'call_function' else ''} {given} {kinds}")
    return lines


FUNCTIONAL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a cast": lambda x: x.to(torch.float64) * 2,
    "a cast by device": lambda x: x.to("cpu", torch.float16).tanh(),
    "a cast by another tensor's type": lambda x: x.half().tanh(),
    "a cast to the type it has": lambda x: x.to(torch.float32).tanh(),
    "reshapes": lambda x: x.transpose(1, 2).reshape(x.shape[0], 28).contiguous().tanh(),
    "equal chunks": lambda x: torch.mul(*x.chunk(2, 1)),
    "chunks, the last one smaller": lambda x: x.chunk(2, -1)[1].tanh(),
    "dropout that does nothing": lambda x: functional.dropout(x, 0.5, training=False).tanh(),
    "views": lambda x: x.permute(1, 0, 2).unsqueeze(0).expand(3, -1, -1, -1)[:, 1:].tanh(),
    "attention": lambda x: functional.scaled_dot_product_attention(x, x, x),
}


@pytest.mark.parametrize("kind", FUNCTIONAL)
def test_a_functional_graph_is_the_decomposed_one(kind: str) -> None:
    program = exported(FUNCTIONAL[kind])
    assert is_functional(program.graph)
    plain, _ = normalize(program, {})
    decomposed, _ = normalize(program.run_decompositions({}), {})
    assert printed(plain.graph) == printed(decomposed.graph)
    with torch.no_grad():
        for one, other in zip(plain(X), decomposed(X), strict=True):
            assert torch.equal(one, other)


def _with_a_region(x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        y = x.tanh()
    return y * 2


OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a value is changed in place": lambda x: x.tanh().add_(1),
    "a composite view": lambda x: x.flatten(1).tanh(),
    "batch norm": lambda x: functional.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "dropout": lambda x: functional.dropout(x, 0.5, training=True),
    "a sub-graph": _with_a_region,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_any_other_graph_is_decomposed(kind: str) -> None:
    with torch.no_grad():
        program = exported(OTHERS[kind])
    assert not is_functional(program.graph)


_EXPORT = huggingface._export
"""The real one: the session's remembers."""


def test_a_captured_model_is_the_decomposed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT casts, and has dropout that does nothing."""
    asked: list[bool] = []

    def noted(graph: fx.Graph) -> bool:
        asked.append(is_functional(graph))
        return not asked[1:]  # the second one is decomposed whatever it is

    monkeypatch.setattr(huggingface, "_export", _EXPORT)
    monkeypatch.setattr(huggingface, "is_functional", noted)
    model = build_model("bert_classifier")
    plain, decomposed = capture_model(model), capture_model(model)
    assert asked == [True, True]
    assert printed(plain.graph) == printed(decomposed.graph)
    assert [*plain.bindings.values()] == [*decomposed.bindings.values()]
    assert plain.inputs == decomposed.inputs and plain.outputs == decomposed.outputs
