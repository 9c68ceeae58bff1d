"""An operator that nothing here knows: frozen and reported with its place, never guessed and never a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.models.llama import modeling_llama

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.capture import capture_model
from compile_sparse.compiler.errors import ModelError, Refusal
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.passes.prune_channels import PruneChannels
from compile_sparse.testing.models import build_model

TARGET = find_target("ort-cpu")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    """A Llama whose MLP goes through a Fourier transform, which mixes all channels."""

    def forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(torch.fft.irfft(torch.fft.rfft(hidden), n=hidden.shape[-1]))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    return capture_model(build_model("llama"))


def test_its_axes_are_frozen_and_others_are_not(program: Program) -> None:
    analysis = analyse(program)
    assert {"fft_rfft", "fft_irfft"} <= set(analysis.unknown)
    assert not analysis.prunable("channels")
    assert analysis.prunable("heads")


def test_pruning_through_it_is_refused_with_the_operator(program: Program) -> None:
    with pytest.raises(ModelError, match="CS2104") as caught:
        PruneChannels(fraction=0.25).run(program, PassContext(target=TARGET, progress=SilentProgress()))
    assert "fft" in caught.value.why


def test_lowering_it_is_refused_with_its_place(program: Program, tmp_path: Path) -> None:
    diagnostics = OnnxRuntimeBackend().plan(program, TARGET)
    assert any(found.code == "CS2311" and "layers.0.mlp" in found.where for found in diagnostics)
    with pytest.raises(Refusal, match="CS2311"):
        OnnxRuntimeBackend().lower(program, TARGET, tmp_path, SilentProgress())
    assert not list(tmp_path.iterdir())
