"""ONNX Runtime against the program run in torch, float32, with and without raising."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from compile_sparse.backends.onnxruntime.lowering import write_graph
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.progress import SilentProgress
from tests.onnxruntime.conftest import FolderOf, ProgramOf
from tests.onnxruntime.running import run, session
from tests.support.served_models import SMALL
from tests.support.tolerance import fp32_tolerance

VOCABULARY = 96


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


@pytest.fixture(params=["raised", "written form"])
def raised(request: pytest.FixtureRequest) -> bool:
    return request.param == "raised"


def _folder(folder_of: FolderOf, program_of: ProgramOf, name: str, raised: bool, tmp_path: Path) -> Path:
    if raised:
        return folder_of(name)[0]
    write_graph(program_of(name), tmp_path, SilentProgress())
    return tmp_path


@pytest.mark.parametrize("name", SMALL.decoders)
def test_decoder(program_of: ProgramOf, folder_of: FolderOf, name: str, raised: bool, tmp_path: Path) -> None:
    """Right-padded prefill, and a prefill continued by 16 cached steps, equal one full forward pass in torch."""
    program = program_of(name)
    loaded = session(_folder(folder_of, program_of, name, raised, tmp_path))
    names = {value.name for value in loaded.get_inputs()}
    assert {"input_ids", "attention_mask", "past_key_values.1.value"} <= names
    rotary = name not in ("gpt2", "opt")
    assert ("position_ids" in names) == (not raised or not rotary)

    ids, mask = _ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    padded = decoder_inputs(program, ids, attention_mask=mask)
    expected = Executor(program).run(padded)["logits"]
    error = (run(loaded, padded)["logits"] - expected).abs() * mask[..., None]
    assert float(error.max()) <= fp32_tolerance(expected)

    ids = _ids(2, 21)
    full = Executor(program).run(decoder_inputs(program, ids))
    outputs = run(loaded, decoder_inputs(program, ids[:, :5]))
    pieces = [outputs["logits"]]
    for position in range(5, 21):
        outputs = run(loaded, decoder_inputs(program, ids[:, position : position + 1].contiguous(), past=outputs))
        pieces.append(outputs["logits"])
    assert float((torch.cat(pieces, 1) - full["logits"]).abs().max()) <= fp32_tolerance(full["logits"])
    for key in ("present.1.key", "present.1.value"):
        torch.testing.assert_close(outputs[key], full[key], rtol=0, atol=fp32_tolerance(full[key]))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_ragged_batch_decodes_like_its_rows_alone(program_of: ProgramOf, folder_of: FolderOf, name: str) -> None:
    """The grouped-query kernel puts each row's new token right after that row's last valid one."""
    program, loaded = program_of(name), session(folder_of(name)[0])
    ids, lengths, steps = _ids(2, 14), (6, 3), 8
    width = max(lengths)
    prompt, mask = ids[:, :width].clone(), torch.ones(2, width, dtype=torch.long)
    prompt[1, lengths[1] :] = 0
    mask[1, lengths[1] :] = 0
    outputs = run(loaded, decoder_inputs(program, prompt, attention_mask=mask))
    for step in range(steps):
        valid = [length + step + 1 for length in lengths]
        tokens = torch.tensor([[int(ids[row, valid[row] - 1])] for row in range(2)])
        mask = (torch.arange(width + step + 1)[None] < torch.tensor(valid)[:, None]).long()
        feeds = decoder_inputs(program, tokens, attention_mask=mask, past=outputs)
        feeds["position_ids"] = torch.tensor([[count - 1] for count in valid])
        outputs = run(loaded, feeds)
        for row in range(2):
            alone = Executor(program).run(decoder_inputs(program, ids[row : row + 1, : valid[row]]))["logits"][0, -1]
            torch.testing.assert_close(outputs["logits"][row, 0], alone, rtol=0, atol=fp32_tolerance(alone))


@pytest.mark.parametrize("name", SMALL.others)
def test_encoder(program_of: ProgramOf, folder_of: FolderOf, name: str, raised: bool, tmp_path: Path) -> None:
    program = program_of(name)
    loaded = session(_folder(folder_of, program_of, name, raised, tmp_path))
    for batch, length in ((2, 7), (1, 4)):
        made = {
            "input_ids": _ids(batch, length),
            "attention_mask": (torch.arange(length)[None] < torch.tensor([length, 3])[:batch, None]).long(),
            "token_type_ids": torch.ones(batch, length, dtype=torch.long),
            "pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch)),
        }
        feeds = {entry.name: made[entry.role] for entry in program.inputs}
        expected = Executor(program).run(feeds)
        got = run(loaded, feeds)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=0, atol=fp32_tolerance(value))


def test_digests_and_stored_bytes(folder_of: FolderOf) -> None:
    folder, lowered, program = folder_of("llama")
    on_disk = {path.name for path in folder.iterdir()}
    assert (
        on_disk == set(lowered.files) == {"model.onnx", "model.onnx.data", "genai_config.json", "compile_sparse.json"}
    )
    for name, digest in lowered.files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert lowered.form["GroupQueryAttention"] == 2
    assert any("right" in limit for limit in lowered.limits)
    stored = np.fromfile(folder / "model.onnx.data", np.float32)
    weight = program.weights.load("model.layers.0.mlp.down_proj.weight").numpy().T.reshape(-1)
    starts = np.flatnonzero(stored == weight[0])
    assert any(np.array_equal(stored[s : s + weight.size], weight) for s in starts)


def test_a_tied_embedding_is_stored_once(folder_of: FolderOf) -> None:
    folder, _, program = folder_of("qwen2")
    floats = sum(program.weights.nbytes(name) for name in program.weights)
    assert (folder / "model.onnx.data").stat().st_size < floats + 4096 * len(program.weights)


def test_a_failed_lowering_leaves_nothing(program_of: ProgramOf, tmp_path: Path) -> None:
    class Stops:
        def task(self, label: str, total: int | None = None) -> Stops:
            return self

        def __enter__(self) -> Stops:
            return self

        def __exit__(self, *exc: object) -> None:
            return None

        def advance(self, steps: int = 1) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_graph(program_of("llama"), tmp_path, Stops())
    assert not list(tmp_path.iterdir())
