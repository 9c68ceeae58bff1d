"""What a class cannot express is refused with the reason, and equal shapes are never enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compile_sparse.backends.checkpoint.checkpoint import plan_checkpoint, write_checkpoint
from compile_sparse.backends.checkpoint.gate import Gate, Verdict
from compile_sparse.backends.huggingface import HuggingFaceBackend
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.passes.low_rank import LowRank
from compile_sparse.passes.quantize import Quantize
from tests.huggingface.emitting import pruned, same

CASES = {
    # GPT-2, OPT and BERT divide their width by the number of heads; there is no other size of a head.
    "gpt2-heads": ("gpt2", (("heads", 8, 6),), "No config"),
    "bert-heads": ("bert", (("heads", 8, 6),), "No config"),
    # 6 heads do not divide a width of 64.
    "llama-heads": ("llama", (("heads", 4, 3),), "not a multiple of the number of attention heads"),
    # The class recomputes the scale of attention and the rotary frequencies, or a multiplier of the embedding.
    "llama-head-size": ("llama", (("head_dim", 4, 3), ("head_dim", 8, 6)), "outputs differ"),
    "gemma2-width": ("gemma2", (("width", 48, 36),), "outputs differ"),
    # The size of a cached key is a fact, so the size of a head cannot stay what it was.
    "llama-keys-only": ("llama", (("head_dim", 4, 3),), "No config"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_not_expressible(case: str, captured: Callable[[str], Program], tmp_path: Path) -> None:
    name, wanted, why = CASES[case]
    with pytest.raises(Refusal, match="CS4205") as caught:
        write_checkpoint(pruned(captured(name), *wanted), tmp_path, SilentProgress())
    assert why in caught.value.why
    assert "ort-cpu" in caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("gpt2", (("heads", 8, 6), ("width", 64, 48))), ("llama", (("head_dim", 4, 3), ("head_dim", 8, 6)))],
)
def test_without_the_gate_a_wrong_config_would_be_written(
    name: str,
    wanted: tuple[tuple[str, int, int], ...],
    captured: Callable[[str], Program],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mutant: shapes alone accept a config that computes something else."""
    monkeypatch.setattr(Gate, "judge", lambda *args, **kwargs: Verdict(True, 0.0, 1.0))
    program = pruned(captured(name), *wanted)
    write_checkpoint(program, tmp_path, SilentProgress())
    with pytest.raises(AssertionError):
        same(program, tmp_path)


def test_quantized(tiny_llama_program: Program, tmp_path: Path) -> None:
    context = PassContext(target=find_target("null"), progress=SilentProgress())
    program = Quantize(scheme="w8a16").run(tiny_llama_program, context).program
    with pytest.raises(Refusal, match="CS4202"):
        write_checkpoint(program, tmp_path, SilentProgress())


def test_low_rank(tiny_llama_program: Program, tmp_path: Path) -> None:
    context = PassContext(target=find_target("null"), progress=SilentProgress())
    program = LowRank(fraction=0.5).run(tiny_llama_program, context).program
    with pytest.raises(Refusal, match="CS4203"):
        write_checkpoint(program, tmp_path, SilentProgress())


def test_layers_that_differ(tiny_llama_program: Program, tmp_path: Path) -> None:
    program = pruned(tiny_llama_program, ("channels", 88, 66), only=1)
    with pytest.raises(Refusal, match="CS4206") as caught:
        write_checkpoint(program, tmp_path, SilentProgress())
    assert "every layer" in caught.value.why
    assert "uniform" in caught.value.hint
    (diagnostic,) = HuggingFaceBackend().plan(program, find_target("hf"))
    assert diagnostic.code == "CS4206"


def test_not_from_transformers(tiny_llama_program: Program) -> None:
    with pytest.raises(Refusal, match="CS4201"):
        plan_checkpoint(replace(tiny_llama_program, config={"model_type": "llama", "architectures": ["Nobody"]}))


@pytest.mark.parametrize("factor", [1.0, 1.0 + 1e-3])
def test_the_gate_sees_a_change_of_one_weight_in_a_thousand(
    factor: float, tiny_llama_program: Program, tmp_path: Path
) -> None:
    """The bound is far above rounding and far below what a wrong head count does."""
    from compile_sparse.backends.checkpoint.architecture import architecture_of
    from compile_sparse.backends.checkpoint.tensors import read_tensors
    from compile_sparse.compiler.capture.skeleton import new_fake_mode
    from compile_sparse.compiler.ir.weights import ResidentTensor

    program = tiny_llama_program
    architecture = architecture_of(program.config)
    config = architecture.parsed(architecture.config)
    sources = dict(read_tensors(program, architecture.shapes(config)).sources)
    name = "model.layers.0.mlp.down_proj.weight"
    sources[name] = ResidentTensor(factor * sources[name].load())
    verdict = Gate(program).judge(architecture.skeleton(config, new_fake_mode()), sources)
    assert verdict.accepted == (factor == 1.0)
    assert verdict.bound < 1e-4


def test_half_precision_is_judged_in_float32(tiny_llama_program: Program) -> None:
    from compile_sparse.backends.checkpoint.gate import _in_float32
    from compile_sparse.compiler.ir.weights import DerivedTensor, WeightStore

    half = {
        name: DerivedTensor(source.shape, torch.bfloat16, lambda source=source: source.load().bfloat16())
        for name, source in tiny_llama_program.weights.items()
    }
    wide = _in_float32(replace(tiny_llama_program, weights=WeightStore(half)))
    assert {source.dtype for source in wide.weights.values()} == {torch.float32}
    name = "lm_head.weight"
    assert torch.equal(wide.weights.load(name), tiny_llama_program.weights.load(name).bfloat16().float())
