"""The worker's protocol, driven through a real process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compile_sparse.backends.checkpoint.checkpoint import write_checkpoint
from compile_sparse.backends.huggingface import HuggingFaceBackend
from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import (
    PROTOCOL,
    Bandwidth,
    Benchmark,
    BenchmarkSamples,
    Done,
    Hello,
    Load,
    Memory,
    Run,
    Score,
    Trace,
)
from compile_sparse.compiler.runtimes.wire import Request
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.compiler.verify.reference import sample_inputs
from tests.huggingface.emitting import pruned

WINDOWS = [[5, 17, 40, 8, 33, 2, 71, 9, 12, 50], [9, 3, 3, 60, 1, 44, 7, 7, 90, 11]]


@pytest.fixture(scope="module")
def folders(captured: Callable[[str], Program], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    llama = captured("llama")
    programs = {"llama": llama, "smaller": pruned(llama, ("channels", 88, 66)), "bert": captured("bert")}
    made = {}
    for name, program in programs.items():
        made[name] = tmp_path_factory.mktemp(name)
        write_checkpoint(program, made[name], SilentProgress())
    return made


@pytest.fixture(scope="module")
def worker(folders: dict[str, Path]) -> Iterator[Worker]:
    with Worker(HuggingFaceBackend().worker_command(find_target("hf"))) as started:
        for name, folder in folders.items():
            reply = started.call(Load(name, str(folder)))
            assert reply.missing == []
            assert reply.rss_bytes > 0
        yield started


def _log_probabilities(program: Program, ids: list[int]) -> torch.Tensor:
    logits = Executor(program).run(decoder_inputs(program, torch.tensor([ids])))["logits"][0]
    return torch.log_softmax(logits.double(), -1)


def test_hello(worker: Worker) -> None:
    assert worker.runtime.name == "transformers"
    assert worker.runtime.device == "cpu"


@pytest.mark.parametrize("prefill", [1, 6, 50])
def test_trace_equals_a_full_forward(worker: Worker, captured: Callable[[str], Program], prefill: int) -> None:
    traces = worker.call(Trace("llama", WINDOWS, prefill)).windows
    for ids, trace in zip(WINDOWS, traces, strict=True):
        expected = _log_probabilities(captured("llama"), ids)[:-1]
        assert trace.top1 == expected.argmax(-1).tolist()
        np.testing.assert_allclose(trace.logprob, expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], atol=1e-4)
        best = expected.topk(2, dim=-1).values
        np.testing.assert_allclose(trace.margin, best[:, 0] - best[:, 1], atol=1e-4)


def test_score_against_another(worker: Worker, captured: Callable[[str], Program]) -> None:
    scores = worker.call(Score("smaller", "llama", WINDOWS)).windows
    dense, small = captured("llama"), pruned(captured("llama"), ("channels", 88, 66))
    for ids, score in zip(WINDOWS, scores, strict=True):
        log_q, log_p = _log_probabilities(dense, ids)[:-1], _log_probabilities(small, ids)[:-1]
        picked = torch.tensor(ids[1:])[:, None]
        assert score.tokens == 9
        assert score.nll == pytest.approx(-float(log_p.gather(1, picked).sum()), rel=1e-4)
        assert score.nll_against == pytest.approx(-float(log_q.gather(1, picked).sum()), rel=1e-4)
        assert score.kl == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum()), rel=1e-3)
        assert score.kl > 0.1


def test_benchmark_and_memory(worker: Worker, folders: dict[str, Path]) -> None:
    sizes = {"prompt_tokens": 4, "output_tokens": 3, "batch": 2, "vocab": 96}
    rounds = worker.call(Benchmark(["llama", "smaller"], rounds=3, **sizes)).rounds
    assert {name: len(found) for name, found in rounds.items()} == {"llama": 3, "smaller": 3}
    assert all(len(r.token_s) == 3 and r.prefill_s > 0 for found in rounds.values() for r in found)
    assert worker.call(Memory(str(folders["llama"]), **sizes)).peak_rss_bytes > 1 << 20
    assert worker.call(Bandwidth()).bytes_per_s > 1e8


def test_run_gives_every_output_of_an_encoder(
    worker: Worker, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    program = captured("bert")
    feeds = sample_inputs(program, 0, batch=2, length=11)
    np.savez(tmp_path / "in.npz", **feeds)
    worker.call(Run("bert", str(tmp_path / "in.npz"), str(tmp_path / "out.npz")))
    expected = Executor(program).run({name: torch.from_numpy(value) for name, value in feeds.items()})
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        assert set(found.files) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-4)
    reply = worker.call(BenchmarkSamples(["bert"], str(tmp_path / "in.npz"), rounds=3, warmup=0))
    assert len(reply.rounds["bert"]) == 3
    np.savez(tmp_path / "in.npz", **feeds, pixels=feeds["input_ids"])
    with pytest.raises(EnvironmentFailure, match="CS5204") as caught:
        worker.call(Run("bert", str(tmp_path / "in.npz"), str(tmp_path / "out.npz")))
    assert "takes no pixels" in caught.value.why


@dataclass(frozen=True)
class Nonsense(Request[Done], operation="nonsense"):
    """Nobody answers this."""


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (Load("x", "/nowhere"), "no config.json"),
        (Trace("bert", WINDOWS, 1), "needs a decoder"),
        (Trace("absent", WINDOWS, 1), "no model is loaded"),
        (Score("llama", "llama", [[1]]), "at least 2"),
        (Nonsense(), "unknown operation"),
    ],
)
def test_a_bad_request_is_answered(worker: Worker, request_: Request[Any], why: str) -> None:
    with pytest.raises(EnvironmentFailure, match="CS5204") as caught:
        worker.call(request_)
    assert why in caught.value.why
    assert worker.call(Hello()).protocol == PROTOCOL


def test_weights_that_do_not_fit_the_config_are_not_loaded(
    worker: Worker, folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, text in (("config.json", (folders["llama"] / "config.json").read_text()),):
        (tmp_path / name).write_text(text)
    (tmp_path / "model.safetensors").write_bytes((folders["smaller"] / "model.safetensors").read_bytes())
    with pytest.raises(EnvironmentFailure, match="CS5204"):
        worker.call(Load("bad", str(tmp_path)))
