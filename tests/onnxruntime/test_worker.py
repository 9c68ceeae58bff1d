"""The worker's protocol, driven through a real process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.backends.onnxruntime.worker import OnnxRuntimeWorker
from compile_sparse.backends.worker import decoder, scoring
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.targets.target import find_target
from tests.onnxruntime.conftest import FolderOf, ProgramOf


class Client:
    """Sends one request at a time and keeps the progress events that come before the reply."""

    def __init__(self) -> None:
        command = OnnxRuntimeBackend().worker_command(find_target("ort-cpu"))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.events: list[dict[str, Any]] = []
        self.sent = 0

    def raw(self, line: str) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self.events = []
        while True:
            reply: dict[str, Any] = json.loads(self.process.stdout.readline())
            if "event" not in reply:
                return reply
            self.events.append(reply)

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        self.sent += 1
        reply = self.raw(json.dumps({"id": self.sent, "op": op, **fields}))
        assert reply["id"] == self.sent
        assert reply["ok"], reply
        return dict(reply["result"])


@pytest.fixture(scope="module")
def client(folder_of: FolderOf) -> Iterator[Client]:
    made = Client()
    for name, scheme in (("fp32", ""), ("w8a8", "w8a8")):
        made.ask("load", name=name, folder=str(folder_of("llama", scheme)[0]), threads=1, device="cpu")
    yield made
    made.raw('{"id": 0, "op": "shutdown"}')
    assert made.process.wait(timeout=20) == 0


def _reference(program_of: ProgramOf, ids: list[int]) -> torch.Tensor:
    program = program_of("llama")
    logits = Executor(program).run(decoder_inputs(program, torch.tensor([ids])))["logits"][0]
    return torch.log_softmax(logits.double(), -1)


def test_hello(client: Client) -> None:
    reply = client.ask("hello")
    assert reply["protocol"] == 1
    assert reply["runtime"]["name"] == "onnxruntime"
    assert reply["pid"] == client.process.pid


@pytest.mark.parametrize("prefill", [1, 6, 50])
def test_trace_equals_a_full_forward(client: Client, program_of: ProgramOf, prefill: int) -> None:
    windows = [[5, 17, 40, 8, 33, 2, 71, 9, 12, 50], [9, 3, 3, 60, 1, 44, 7, 7, 90, 11]]
    traces = client.ask("trace", name="fp32", windows=windows, prefill=prefill)["windows"]
    assert [event["done"] for event in client.events] == list(range(min(prefill, 9), 10))
    for ids, trace in zip(windows, traces, strict=True):
        expected = _reference(program_of, ids)
        wanted = [float(expected[i, ids[i + 1]]) for i in range(len(ids) - 1)]
        assert trace["top1"] == expected[:-1].argmax(-1).tolist()
        np.testing.assert_allclose(trace["logprob"], wanted, atol=1e-4)
        best = expected[:-1].topk(2, -1).values
        np.testing.assert_allclose(trace["margin"], (best[:, 0] - best[:, 1]).tolist(), atol=1e-4)


def test_score(client: Client, program_of: ProgramOf) -> None:
    ids = [5, 17, 40, 8, 33, 2, 71, 9, 12, 50]
    (same,) = client.ask("score", name="fp32", against="fp32", windows=[ids])["windows"]
    expected = _reference(program_of, ids)
    assert same["tokens"] == 9
    assert same["nll"] == pytest.approx(-sum(float(expected[i, ids[i + 1]]) for i in range(9)), abs=1e-4)
    assert same["nll_against"] == same["nll"]
    assert same["kl"] == 0
    assert same["top1_equal"] == 9
    (other,) = client.ask("score", name="w8a8", against="fp32", windows=[ids])["windows"]
    assert other["nll_against"] == pytest.approx(same["nll"])
    assert other["kl"] > 0


def test_scores_do_not_depend_on_the_chunk(folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, ids = OnnxRuntimeWorker(), np.random.default_rng(0).integers(3, 96, 60).tolist()
    model = worker.open(str(folder_of("llama")[0]), 1, "cpu")
    whole = decoder.score_window(model, model, ids)
    monkeypatch.setattr(decoder, "CHUNK_TOKENS", 7)
    monkeypatch.setattr(scoring, "ROWS", 3)
    pieces = decoder.score_window(model, model, ids)
    assert pieces.nll == pytest.approx(whole.nll, abs=1e-4)
    assert pieces.tokens == pieces.top1_equal == 59


def test_benchmark(client: Client) -> None:
    fields = {"prompt_tokens": 8, "output_tokens": 4, "batch": 2, "rounds": 3, "warmup": 1, "seed": 1, "vocab": 96}
    rounds = client.ask("benchmark", names=["fp32", "w8a8"], **fields)["rounds"]
    for name in ("fp32", "w8a8"):
        assert len(rounds[name]) == 3
        for measured in rounds[name]:
            assert len(measured["token_s"]) == 4
            assert measured["decode_s"] == pytest.approx(sum(measured["token_s"]))
            assert measured["prefill_s"] > 0
    assert client.events[-1]["done"] == client.events[-1]["total"] == 8


def test_memory_and_bandwidth(client: Client, folder_of: FolderOf) -> None:
    fields = {"prompt_tokens": 8, "output_tokens": 2, "batch": 1}
    reply = client.ask("memory", folder=str(folder_of("llama")[0]), **fields)
    assert reply["peak_rss_bytes"] > 10 << 20
    assert client.ask("bandwidth")["bytes_per_s"] > 1e8


def test_run_and_samples(client: Client, folder_of: FolderOf, program_of: ProgramOf, tmp_path: Path) -> None:
    client.ask("load", name="vit", folder=str(folder_of("vit")[0]), threads=1, device="cpu")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "feeds.npz", pixel_values=pixels.numpy())
    paths = {"feeds": str(tmp_path / "feeds.npz"), "outputs": str(tmp_path / "outputs.npz")}
    client.ask("run", name="vit", **paths)
    expected = Executor(program_of("vit")).run({"pixel_values": pixels})["logits"]
    np.testing.assert_allclose(np.load(paths["outputs"])["logits"], expected.numpy(), atol=1e-4)
    rounds = client.ask("benchmark_samples", names=["vit"], feeds=paths["feeds"], rounds=2, warmup=1)["rounds"]
    assert len(rounds["vit"]) == 2
    client.ask("unload", name="vit")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("not json", "Expecting value"),
        ("[1]", "JSON object"),
        ('{"id": 7, "op": "fly"}', "unknown operation 'fly'"),
        ('{"id": 7, "op": ["hello"]}', "unknown operation"),
        ('{"id": 7, "op": "__init__"}', "unknown operation"),
        ('{"id": 7, "op": "load", "name": "x", "folder": "/nowhere", "threads": 1}', "no model.onnx in /nowhere"),
        ('{"id": 7, "op": "load", "name": "x", "folder": "/nowhere", "threads": "all"}', "'threads'"),
        ('{"id": 7, "op": "trace", "name": "absent", "windows": [[1, 2]], "prefill": 1}', "'absent'"),
        ('{"id": 7, "op": "trace", "name": "fp32", "windows": [[1]], "prefill": 1}', "at least 2"),
        ('{"id": 7, "op": "trace", "name": "fp32", "windows": [[1, 2], [1, 2, 3]], "prefill": 1}', "equal lengths"),
        ('{"id": 7, "op": "score", "name": "fp32", "against": "fp32", "windows": [[1, -2]]}', "at least 0"),
        ('{"id": 7, "op": "score", "name": "fp32", "against": "fp32", "windows": [[1, 5000, 2]]}', ""),
        ('{"id": 7, "op": "trace", "name": "fp32", "windows": [[1, 2]]}', "'prefill'"),
        ('{"id": 7, "op": "trace", "name": "fp32", "windows": [[1, true]], "prefill": 1}', "'windows[0][1]'"),
        ('{"id": 7, "op": "benchmark", "names": [], "prompt_tokens": 1}', "'names'"),
    ],
)
def test_a_bad_request_is_answered_and_survived(client: Client, line: str, part: str) -> None:
    reply = client.raw(line)
    assert reply["ok"] is False
    assert part in reply["error"]["message"]
    assert reply["error"]["type"]
    client.ask("hello")
