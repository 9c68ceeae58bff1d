"""Tensors of compressed-tensors that contradict their config. What fits is compared with the library in ``tests/vllm``."""

from __future__ import annotations

import pytest
import torch

from compile_sparse.compiler.capture.quantized.compressed_tensors import CompressedTensors
from compile_sparse.compiler.capture.quantized.compressed_tensors_config import read_config
from compile_sparse.compiler.errors import ModelError
from tests.unit.capture.quantized.conftest import Read

WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}
STORED = {
    "layer.weight": torch.arange(-16, 16, dtype=torch.int8).reshape(4, 8),
    "layer.weight_scale": torch.full((4, 1), 0.5),
}


def test_zero_points_that_move_nothing_are_read(read: Read) -> None:
    zeros = {"layer.weight_zero_point": torch.zeros(4, 1, dtype=torch.int8)}
    found = read(CompressedTensors(read_config(CONFIG)), {**STORED, **zeros}).sources["layer.weight"].load()
    assert torch.equal(found, STORED["layer.weight"].float() * 0.5)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("weight_zero_point", torch.full((4, 1), 5, dtype=torch.int8)),
        ("weight_zero_point", torch.zeros(4, 1)),
        ("weight_scale", torch.ones(4, 1, dtype=torch.int32)),
    ],
    ids=["not symmetric", "float zero points", "integer scales"],
)
def test_what_contradicts_the_config_is_refused(read: Read, part: str, value: torch.Tensor) -> None:
    with pytest.raises(ModelError) as caught:
        read(CompressedTensors(read_config(CONFIG)), {**STORED, f"layer.{part}": value})
    assert (caught.value.code, caught.value.where) == ("CS2021", f"layer.{part}")
