"""A quantized program is pruned like the dense one, as far as its groups of weights allow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf

from compile_sparse.compiler.axes.analysis import Analysis, analyse
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.axes.rules import quantization
from compile_sparse.compiler.capture import capture_model
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.passes.quantize import Quantize
from compile_sparse.testing.models import example_inputs
from compile_sparse.testing.oracles import compare
from tests.support.contexts import context
from tests.toys import toy_program
from tests.unit.axes.test_models import random_keep


@pytest.fixture(scope="session")
def roomy_llama() -> Program:
    """One block in which every dimension is two groups of 128, or fits in one; rotary pairs too, being half a head."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=512,
        vocab_size=96,
        max_position_embeddings=64,
    )
    return capture_model(hf.LlamaForCausalLM(config).eval())


def quantized(program: Program, scheme: str) -> Program:
    return Quantize(scheme=scheme).run(program, context(schemes=tuple(SCHEMES), plan_only=True)).program


def kinds(analysis: Analysis) -> list[str]:
    return sorted(group.kind for group in analysis.prunable())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_leaves_as_many_groups_as_the_dense_program(roomy_llama: Program, scheme: str) -> None:
    analysis = analyse(quantized(roomy_llama, scheme))
    assert not analysis.unknown and not analysis.conflicts
    dense = analyse(roomy_llama)
    assert kinds(analysis) == kinds(dense)
    assert len(dense.prunable()) == 6


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "fp8-block"])
def test_one_group_for_a_whole_dimension_restricts_nothing(tiny_llama_program: Program, scheme: str) -> None:
    dense, analysis = analyse(tiny_llama_program), analyse(quantized(tiny_llama_program, scheme))
    assert sorted((g.kind, g.size) for g in analysis.prunable()) == sorted((g.kind, g.size) for g in dense.prunable())


def test_groups_that_cut_heads_keep_the_heads_and_free_the_rest(tiny_llama_program: Program) -> None:
    analysis = analyse(quantized(tiny_llama_program, "nvfp4"))  # 16: two heads of 8, six and a half groups of 88
    found = [(g.kind, g.size) for g in analysis.prunable()]
    assert ("heads", 4) in found and ("heads", 2) not in found and ("head_dim", 8) not in found
    assert ("channels", 5) in found and ("width", 4) in found


class Blocks(torch.nn.Module):
    """Two linear layers in e4m3 with a scale per square of 4."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, rows, columns in (("up", 12, 8), ("down", 8, 12)):
            values = torch.randn(rows, columns, generator=generator)
            self.register_buffer(name, values.to(torch.float8_e4m3fn))
            self.register_buffer(f"{name}_scale", torch.rand(rows // 4, columns // 4, generator=generator) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dequantize = torch.ops.compile_sparse.dequantize_block
        hidden = torch.relu(torch.nn.functional.linear(x, dequantize(self.up, self.up_scale, 4)))
        return torch.nn.functional.linear(hidden, dequantize(self.down, self.down_scale, 4))


class Nibbles(torch.nn.Module):
    """Two linear layers in e2m1 with a scale per 16, the last group of the second shorter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("divisor", torch.tensor([2.0]))
        for name, rows, columns in (("up", 40, 8), ("down", 8, 40)):
            self.register_buffer(name, torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.int8))
            scale = torch.rand(rows, -(-columns // 16), generator=generator) + 0.5
            self.register_buffer(f"{name}_scale", scale.to(torch.float8_e4m3fn))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dequantize = torch.ops.compile_sparse.dequantize_nvfp4
        hidden = torch.relu(torch.nn.functional.linear(x, dequantize(self.up, self.up_scale, self.divisor)))
        return torch.nn.functional.linear(hidden, dequantize(self.down, self.down_scale, self.divisor))


def both_oracles_hold(module: torch.nn.Module) -> bool:
    """Whether the pruned program equals what zeros and masks in the dense one give."""
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    program = toy_program(module, [x])
    analysis = analyse(program)
    keep = {
        group.anchor: torch.arange(group.size) != 0 for group in analysis.prunable()
    }  # all behind the first move up
    assert keep
    report = compare(rewrite(program, analysis, keep), analysis, keep, {"x0": x})
    assert report.zero is not None and report.masked is not None
    return report.holds


@pytest.mark.parametrize("module", [Blocks, Nibbles])
def test_the_pruned_toy_equals_both_oracles(module: Callable[[], torch.nn.Module]) -> None:
    assert both_oracles_hold(module())


@pytest.mark.parametrize("module", [Blocks, Nibbles])
def test_a_rule_that_frees_positions_within_a_group_is_caught(
    module: Callable[[], torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every shape fits, and values move into their neighbour's scale."""
    honest = quantization._grouped
    monkeypatch.setattr(quantization, "_grouped", lambda axis, group: (honest(axis, group)[0], []))
    assert not both_oracles_hold(module())


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16"])
@pytest.mark.parametrize("kind", ["channels", "heads", "width"])
def test_a_pruned_quantized_model_equals_the_oracles(tiny_llama_program: Program, scheme: str, kind: str) -> None:
    """Weights only: rounded activations would turn another order of a sum into another code."""
    program = Quantize(scheme=scheme).run(tiny_llama_program, context()).program
    analysis = analyse(program)
    keep = random_keep(analysis, kind, seed=1)
    assert keep
    report = compare(rewrite(program, analysis, keep), analysis, keep, example_inputs(program, 2, 7))
    assert report.holds, report
