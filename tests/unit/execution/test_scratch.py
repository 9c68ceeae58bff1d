"""Scratch tensors come back as they were and leave nothing behind."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import pytest
import torch

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.execution.scratch import SMALL_BYTES, Scratch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_come_back_and_the_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch = Scratch()
    value = torch.randn(300, 130).to(dtype)
    source = scratch.keep(value.t())
    small = scratch.keep(value[0])
    assert source.shape == (130, 300)
    assert source.dtype == dtype
    del scratch
    gc.collect()
    assert torch.equal(source.load(), value.t())
    assert torch.equal(small.load(), value[0])
    assert value[0].nbytes <= SMALL_BYTES < value.nbytes
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    del source
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_environment_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compile_sparse.compiler.execution.scratch.save_file", full)
    with pytest.raises(EnvironmentFailure) as caught:
        Scratch().keep(torch.zeros(400, 400))
    assert caught.value.code == "CS5011"
    assert "No space left" in caught.value.why
