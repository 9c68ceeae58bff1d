"""What we ship keeps the contracts that third parties are held to, and what breaks a rule is told which."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from compile_sparse.backends.huggingface import HuggingFaceBackend
from compile_sparse.backends.null import NullBackend
from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.extension.backend_contract import Lowered
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext, PassResult, Phase
from compile_sparse.compiler.extension.quantizers import find_quantizer
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import DerivedTensor, ResidentTensor
from compile_sparse.compiler.targets.target import find_target, load_targets
from compile_sparse.passes.low_rank import LowRank
from compile_sparse.passes.mask import Sparsify
from compile_sparse.passes.prune_channels import PruneChannels
from compile_sparse.passes.prune_conv import PruneConv
from compile_sparse.passes.prune_heads import PruneHeads
from compile_sparse.passes.prune_layers import PruneLayers
from compile_sparse.passes.prune_width import PruneWidth
from compile_sparse.passes.quantization.round_to_nearest import RoundToNearest
from compile_sparse.passes.quantize import Quantize
from compile_sparse.passes.quantize_cache import QuantizeCache
from compile_sparse.testing import (
    NonConforming,
    check_backend,
    check_pass,
    check_quantizer,
    check_target,
    tiny_program,
)

OURS: list[Pass] = [
    PruneChannels(fraction=0.25),
    PruneHeads(fraction=0.5),
    PruneWidth(fraction=0.25),
    PruneConv(fraction=0.25),
    PruneLayers(fraction=0.5),
    LowRank(fraction=0.3),
    Sparsify(pattern="2:4"),
    Quantize(scheme="w8a8"),
    QuantizeCache(),
]


@pytest.mark.parametrize("step", OURS, ids=lambda step: step.name)
def test_every_pass_keeps_the_contract(step: Pass) -> None:
    loose = step.name in ("low-rank", "prune-layers")  # ranks and blocks are chosen by what they cost
    quantized_caches = next(target for target in load_targets().values() if target.cache_formats)
    target = quantized_caches if step.name == "quantize-cache" else find_target("null")
    check_pass(step, target=target, sizes_follow_values=loose)


@pytest.mark.parametrize("name", load_targets())
def test_every_target_is_complete(name: str) -> None:
    check_target(find_target(name))


@pytest.mark.parametrize(
    ("backend", "target"),
    [(NullBackend(), "null"), (OnnxRuntimeBackend(), "ort-cpu"), (HuggingFaceBackend(), "hf")],
    ids=["null", "onnxruntime", "huggingface"],
)
def test_backends_keep_the_contract(backend: NullBackend, target: str) -> None:
    check_backend(backend, find_target(target))


def test_round_to_nearest_keeps_the_contract() -> None:
    check_quantizer(find_quantizer("rtn"))


class Broken(Pass):
    """Doubles a weight, unless told to break a rule."""

    name: ClassVar[str] = "broken"
    phase: ClassVar[Phase] = "recovery"
    changes_numerics: ClassVar[bool] = False

    rule: str = ""

    def run(self, program: Program, context: PassContext) -> PassResult:
        name = next(b.tensor for b in program.bindings.values() if b.kind == "parameter")
        source = program.weights[name]
        if self.rule == "says nothing changed":
            changed = replace(program, weights=program.weights.updated({name: doubled(source)}))
            return PassResult(changed, modified=False)
        if self.rule == "reads weights when planning":
            program.weights.load(name)
        if self.rule == "draws":
            noise = torch.randn(source.shape)
            return changed_to(program, name, ResidentTensor(noise))
        if self.rule == "changes what it is given":
            program.weights._sources[name] = doubled(source)
        if self.rule == "not finite":
            return changed_to(program, name, DerivedTensor(source.shape, source.dtype, lambda: source.load() / 0))
        if self.rule == "other shapes in plans" and context.plan_only:
            return changed_to(program, "additional", doubled(source))
        return changed_to(program, name, doubled(source))


def doubled(source: DerivedTensor) -> DerivedTensor:
    return DerivedTensor(source.shape, source.dtype, lambda: 2 * source.load())


def changed_to(program: Program, name: str, source: DerivedTensor | ResidentTensor) -> PassResult:
    if name == "additional":
        first = next(node for node, b in program.bindings.items() if b.kind == "parameter")
        bindings = {**program.bindings, first: replace(program.bindings[first], tensor=name)}
        program = replace(program, bindings=bindings)
    return PassResult(replace(program, weights=program.weights.updated({name: source})), modified=True)


def test_a_pass_that_breaks_nothing_passes() -> None:
    check_pass(Broken(), [tiny_program("bert")])


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("says nothing changed", "says truly whether it changed"),
        ("draws", "bit for bit"),
        ("changes what it is given", "stays as it was"),
        ("not finite", "finite"),
        ("other shapes in plans", "A plan has the shapes"),
        ("reads weights when planning", "does something for some model"),
    ],
)
def test_a_pass_that_breaks_a_rule_is_told_which(rule: str, said: str) -> None:
    program = tiny_program("bert")
    own = replace(program, weights=program.weights.updated({}))  # one of them writes into it
    with pytest.raises(NonConforming, match=said):
        check_pass(Broken(rule=rule), [own])


def test_a_class_that_lacks_something_is_told_what() -> None:
    class Nameless(Broken):
        phase: ClassVar[Phase] = "later"  # type: ignore[assignment]

    with pytest.raises(NonConforming, match="'later'"):
        check_pass(Nameless(), [tiny_program("bert")])


class BrokenBackend(NullBackend):
    """The null backend, with one rule broken."""

    def __init__(self, change: Callable[[Lowered, Path], Lowered]) -> None:
        self.change = change

    def lower(self, program, target, out, progress, settings=None) -> Lowered:  # type: ignore[no-untyped-def]
        return self.change(super().lower(program, target, out, progress), out)


BrokenBackend.__module__ = NullBackend.__module__  # a module that imports nothing heavy


def _unlisted(lowered: Lowered, out: Path) -> Lowered:
    (out / "more.txt").write_text("?")
    return lowered


def _wrong_digest(lowered: Lowered, out: Path) -> Lowered:
    return dataclasses.replace(lowered, files=dict.fromkeys(lowered.files, "0" * 64))


def _forgotten(lowered: Lowered, out: Path) -> Lowered:
    (out / "program.txt").unlink()
    return lowered


def _refused(lowered: Lowered, out: Path) -> Lowered:
    for path in out.iterdir():
        path.unlink()
    raise Refusal("CS4999", "Never.", why="The plan did not say so.")


def _left(lowered: Lowered, out: Path) -> Lowered:
    raise Refusal("CS4999", "Never.", why="Files are left.")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_unlisted, "more.txt"),
        (_wrong_digest, "digests"),
        (_forgotten, "listed is written"),
        (_refused, "the plan says"),
        (_left, "leaves nothing behind"),
    ],
)
def test_a_backend_that_breaks_a_rule_is_told_which(change: Callable[[Lowered, Path], Lowered], said: str) -> None:
    with pytest.raises(NonConforming, match=said):
        check_backend(BrokenBackend(change), find_target("null"), [tiny_program("bert")])


def test_a_runtime_that_computes_something_else_is_found() -> None:
    class Wrong(OnnxRuntimeBackend):
        def lower(self, program, target, out, progress, settings=None) -> Lowered:  # type: ignore[no-untyped-def]
            name = next(b.tensor for b in program.bindings.values() if "down" in b.tensor)
            other = replace(program, weights=program.weights.updated({name: doubled(program.weights[name])}))
            return super().lower(other, target, out, progress)

    Wrong.__module__ = OnnxRuntimeBackend.__module__
    with pytest.raises(NonConforming, match="computes the program"):
        check_backend(Wrong(), find_target("ort-cpu"), [tiny_program("llama")])


def test_an_error_that_lowering_does_not_keep_is_found() -> None:
    class Strict(NullBackend):
        def plan(self, program, target, settings=None):  # type: ignore[no-untyped-def]
            return [Diagnostic("model", "CS4998", "It cannot be written.", severity="error")]

    Strict.__module__ = NullBackend.__module__
    with pytest.raises(NonConforming, match="lowering refuses"):
        check_backend(Strict(), find_target("null"), [tiny_program("bert")])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backend": "nowhere"}, "installed"),
        ({"schemes": {"w3a3": "somehow"}}, "exist"),
        ({"schemes": {"w8a8": ""}}, "says how it runs"),
        ({"refused_schemes": {"w8a8": "slow"}}, "both"),
        ({"fallbacks": {"w8a8": ("w8a16", "w4a16-asym")}}, "Fallbacks"),
        ({"fallbacks": {"fp8": ()}}, "Fallbacks"),
        ({"minimum_versions": {"onnx": "new"}}, "numbers"),
    ],
)
def test_a_target_that_contradicts_itself_is_told_where(changes: dict[str, object], said: str) -> None:
    with pytest.raises(NonConforming, match=said):
        check_target(find_target("ort-cpu").model_copy(update=changes))


@pytest.mark.parametrize("gone", ["measured", "instead", "why"])
def test_a_pattern_that_does_not_pay_says_everything(gone: str) -> None:
    target = find_target("ort-cpu")
    patterns = tuple(entry.model_copy(update={gone: ""}) for entry in target.sparse_patterns)
    with pytest.raises(NonConforming, match="pattern"):
        check_target(target.model_copy(update={"sparse_patterns": patterns}))


class Changing(RoundToNearest):
    """Writes into the weight it is given."""

    def quantize(self, rows, grid, *, statistics, zeros):  # type: ignore[no-untyped-def]
        found = super().quantize(rows, grid, statistics=statistics, zeros=zeros)
        rows.zero_()
        return found


class Drawing(RoundToNearest):
    """Adds noise before rounding, but to zeros."""

    def quantize(self, rows, grid, *, statistics, zeros):  # type: ignore[no-untyped-def]
        noise = torch.rand(rows.shape) * grid.step.abs() * (rows != 0)
        return super().quantize(rows + noise, grid, statistics=statistics, zeros=zeros)


@pytest.mark.parametrize(("quantizer", "said"), [(Changing(), "stays as it was"), (Drawing(), "the same codes")])
def test_a_quantizer_that_breaks_a_rule_is_told_which(quantizer: RoundToNearest, said: str) -> None:
    with pytest.raises(NonConforming, match=said):
        check_quantizer(quantizer, ["w4a16-g32"])
