"""Each rule of normalisation on a graph that breaks it, with the same values before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from compile_sparse.compiler.capture.normalize import normalize
from compile_sparse.compiler.ir.edit import op_name, schema_arguments
from tests.toys import Applied

X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


def normalized(function: Callable[[torch.Tensor], torch.Tensor]) -> tuple[list[Any], torch.Tensor]:
    """Calls of the normalised graph, and what it computes from ``X``."""
    exported = torch.export.export(Applied(function), (X,)).run_decompositions({})
    module, bindings = normalize(exported, {})
    assert not bindings
    with torch.no_grad():
        (result,) = module(X)
    return [node for node in module.graph.nodes if node.op == "call_function"], result


def test_attention_states_the_scale_it_has_by_default() -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x)

    (call,), found = normalized(attend)
    assert schema_arguments(call)["scale"] == pytest.approx(6**-0.5)
    torch.testing.assert_close(found, attend(X))


def test_a_scale_of_the_models_own_is_kept() -> None:
    (call,), _ = normalized(lambda x: functional.scaled_dot_product_attention(x, x, x, scale=0.25))
    assert schema_arguments(call)["scale"] == 0.25


def test_views_become_reshapes() -> None:
    (call,), found = normalized(lambda x: x.view(8, 6))
    assert op_name(call) == "reshape"
    assert torch.equal(found, X.view(8, 6))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone().tanh(),
        lambda x: x.contiguous().tanh(),
        lambda x: x[:, :].tanh(),
        lambda x: x.to(torch.float32).tanh(),
        lambda x: x.expand(-1, -1, -1).tanh(),
        lambda x: (x * 1.0).tanh(),
        lambda x: (x + 0).tanh(),
        lambda x: functional.dropout(x, 0.5, training=False).tanh(),
        lambda x: functional.pad(x, (0, 0, 0, 0)).tanh(),
        lambda x: torch.cat([x[..., :6], x[..., 6:]], -1).tanh(),  # partial rotation of the whole head
    ],
)
def test_what_changes_no_value_is_removed(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    calls, found = normalized(function)
    assert [op_name(call) for call in calls] == ["tanh"]
    assert torch.equal(found, X.tanh())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, 1:],
        lambda x: x[:, :3],
        lambda x: x[:, ::2],
        lambda x: torch.cat([x, x[:, 4:], x[:, :1]], 1),
        lambda x: torch.cat([x[:, 4:], x[:, 4:]], 1),
        lambda x: x.to(torch.float64),
        lambda x: x * 1.5,
        lambda x: x * x,
        lambda x: x + 1,
        lambda x: x[:, :1].expand(-1, 4, -1),
        lambda x: functional.pad(x, (0, 0, 0, 1)),
    ],
)
def test_what_changes_a_value_is_kept(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    calls, found = normalized(function)
    assert calls
    assert found.dtype == function(X).dtype
    assert torch.equal(found, function(X))
