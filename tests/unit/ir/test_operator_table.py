"""The table of operators is complete and true: no operator without a row, nothing claimed that is not there, nor the reverse."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils import flop_counter

import compile_sparse.backends.onnxruntime.lowering
import compile_sparse.backends.tensorrt.graph.lowering  # noqa: F401  importing both registers every emitter
from compile_sparse.backends.onnxruntime.dialect import DIALECT as ONNXRUNTIME
from compile_sparse.backends.tensorrt.graph.dialect import DIALECT as TENSORRT
from compile_sparse.compiler.axes.rules.registry import rule_for
from compile_sparse.compiler.ir import gemms
from compile_sparse.compiler.ir.ops.table import OPERATORS
from compile_sparse.compiler.planning.token_cost import MOVING


def _own() -> set[str]:
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("compile_sparse::")}


def _counted_by_torch() -> set[str]:
    """Operators that torch's own counter of operations knows, but for gradients and kernels of one device (private names too)."""
    names = {
        packet._qualified_op_name for packet in flop_counter.flop_registry if hasattr(packet, "_qualified_op_name")
    }
    others = re.compile(r"aten::(_|cudnn_)|.*(backward|overrideable)")
    return {name for name in names if name.startswith("aten::") and not others.match(name)}


def _missing_rows(operators: set[str]) -> set[str]:
    return operators - OPERATORS.keys()


def _existing(name: str) -> dict[str, bool]:
    """What the compiler has for an operator, asked where it is registered."""
    bare = name.split("::")[1]
    return {
        "axis rule": rule_for(bare if name.startswith("aten::") else name) is not None,
        "cost": name in gemms.FORMS or bare in MOVING,
        "calibration": name in gemms.LAYERS,
        "onnxruntime": ONNXRUNTIME.find(name) is not None,
        "tensorrt": TENSORRT.find(name) is not None,
    }


def test_every_operator_of_ours_and_every_product_has_a_row() -> None:
    assert not _missing_rows(_own() | gemms.FORMS.keys() | gemms.WITHOUT_FORM | _counted_by_torch())


def test_a_new_operator_without_a_row_is_noticed() -> None:
    with torch.library._scoped_library("compile_sparse", "FRAGMENT") as library:
        library.define("forgotten(Tensor x) -> Tensor")
        assert _missing_rows(_own()) == {"compile_sparse::forgotten"}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_row_lacks_exactly_what_is_not_there(name: str) -> None:
    absent = {fact for fact, exists in _existing(name).items() if not exists}
    assert absent == OPERATORS[name].keys()
    assert all(reason.endswith(".") for reason in OPERATORS[name].values())


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_fake_kernel(name: str) -> None:
    entry = torch._library.simple_registry.singleton.find(name)
    if entry.fake_impl.kernel is None:
        keys = ("Meta", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
        assert any(torch._C._dispatch_has_kernel_for_dispatch_key(_with_overload(name), key) for key in keys)
    assert name not in _own() or entry.fake_impl.kernel is not None


def _with_overload(name: str) -> str:
    namespace, bare = name.split("::")
    packet = getattr(getattr(torch.ops, namespace), bare)
    operator = getattr(packet, packet.overloads()[0])
    assert isinstance(operator, torch._ops.OpOverload)
    return operator.name()
