"""The reference worker: its answers are the graph's, and it says what it cannot tell."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from compile_sparse.backends.tensorrt import processor
from compile_sparse.backends.tensorrt.description import DESCRIPTION_FILE, Description, EngineRecord
from compile_sparse.backends.tensorrt.engine.gpu import find_gpu
from compile_sparse.backends.tensorrt.run.portable import portable_model
from compile_sparse.backends.tensorrt.run.reference_session import ReferenceRuntime
from compile_sparse.backends.tensorrt.run.worker import Generate, main
from compile_sparse.backends.worker.errors import RequestError
from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import (
    Benchmark,
    BenchmarkSamples,
    Load,
    Memory,
    Run,
    Score,
    Trace,
)
from tests.tensorrt.decoders import (
    LENGTH,
    PROMPT,
    described,
    full_forward,
    through_the_cache,
    tolerance,
)
from tests.tensorrt.graphs import DECODER, K, linear, save

if find_spec("onnxruntime") is None:
    pytest.skip("ONNX Runtime is not installed", allow_module_level=True)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_prefill_and_sixteen_steps_equal_the_full_forward(
    precision: str, folder: Path, exact: Path, tokens: np.ndarray[Any, Any]
) -> None:
    model = ReferenceRuntime(folder if precision == "float16" else exact, 1)
    ids = tokens[:, :LENGTH]
    expected = full_forward(folder if precision == "float16" else exact, ids)
    limit = tolerance(precision, expected)
    np.testing.assert_allclose(through_the_cache(model, ids), expected, atol=limit, rtol=0)
    # The bound would notice a position, a mask or a head that is off: such logits differ by as much as they are large.
    assert limit < 0.02 * float(expected.std()), "a tolerance that says nothing"


def test_attributes_of_tensorrt_are_left_out(folder: Path) -> None:
    def attributes(model: onnx.ModelProto) -> set[str]:
        return {attribute.name for node in model.graph.node for attribute in node.attribute}

    path = folder / "model.onnx"
    before = attributes(onnx.load(str(path), load_external_data=False))
    after = attributes(onnx.load_from_string(portable_model(path).model))
    assert before - after == {"TRT_decomposable"}
    assert "epsilon" in after


def test_attributes_within_branches_are_left_out(tmp_path: Path) -> None:
    inner = helper.make_node("Identity", ["x"], ["y"])
    inner.attribute.append(helper.make_attribute("TRT_inner", 1))
    value = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    branch = helper.make_graph([inner], "branch", [], [value])
    choice = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph([choice], "g", [helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])], [value])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    assert b"TRT_inner" in (tmp_path / "model.onnx").read_bytes()
    assert b"TRT_inner" not in portable_model(tmp_path / "model.onnx").model


def test_sequences_stay_within_the_cache(folder: Path) -> None:
    model = ReferenceRuntime(folder, 1)
    with pytest.raises(RequestError, match="49 tokens do not fit the cache, which holds 48"):
        model.generation(1, DECODER["max_length"] + 1)
    generation = model.generation(1, 3)
    generation.step(np.zeros((1, 2), np.int64))
    with pytest.raises(RequestError, match="grow beyond the 3 tokens"):
        generation.step(np.zeros((1, 2), np.int64))


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Worker]:
    command = [sys.executable, "-P", "-m", "compile_sparse.backends.tensorrt.run.worker", "reference"]
    with Worker(command) as worker:
        worker.call(Load("compiled", str(folder), device="cuda", sequence=64, sequences=2))
        yield worker


def test_the_worker_says_that_it_stands_in(client: Worker) -> None:
    assert client.runtime.name == "onnxruntime, standing in for tensorrt"
    assert client.runtime.device == "cpu"
    assert client.runtime.version


def test_trace_and_score(client: Worker, folder: Path, tokens: np.ndarray[Any, Any]) -> None:
    expected = torch.log_softmax(full_forward(folder, tokens), -1)[:, :-1]
    chosen = expected.gather(-1, torch.from_numpy(tokens[:, 1:, None]))[..., 0]
    limit = tolerance("float16", full_forward(folder, tokens))
    traces = client.call(Trace("compiled", tokens.tolist(), PROMPT)).windows
    for trace, wanted, row in zip(traces, chosen, expected, strict=True):
        np.testing.assert_allclose(trace.logprob, wanted, atol=limit)
        best = row.topk(2, -1).values
        clear = (best[:, 0] - best[:, 1] > 2 * limit).numpy()
        assert clear.sum() > 10, "enough positions that rounding cannot decide"
        assert (np.array(trace.top1)[clear] == row.argmax(-1).numpy()[clear]).all()
    scores = client.call(Score("compiled", "compiled", tokens.tolist())).windows
    for score, wanted in zip(scores, chosen, strict=True):
        assert score.nll == pytest.approx(-float(wanted.sum()), abs=limit * len(wanted))
        assert score.kl == 0


def test_greedy_tokens(client: Worker, folder: Path, tokens: np.ndarray[Any, Any]) -> None:
    prompts = tokens[:, :PROMPT]
    found = client.call(Generate("compiled", prompts.tolist(), output_tokens=4)).tokens
    ids = np.concatenate([prompts, np.array(found)], axis=1)
    expected = full_forward(folder, ids)[:, PROMPT - 1 : -1]
    best = expected.topk(2, -1).values
    clear = best[..., 0] - best[..., 1] > 2 * tolerance("float16", expected)
    assert clear.any()
    assert torch.equal(torch.tensor(found)[clear], expected.argmax(-1)[clear])


def test_memory_and_no_speed(client: Worker, folder: Path) -> None:
    sizes = {"prompt_tokens": 4, "output_tokens": 2, "vocab": DECODER["vocabulary"]}
    assert client.call(Memory(str(folder), device="cuda", **sizes)).peak_rss_bytes > 30 << 20
    for request in (Benchmark(["compiled"], rounds=1, **sizes), BenchmarkSamples(["compiled"], "", rounds=1)):
        with pytest.raises(EnvironmentFailure, match="CS5204") as caught:
            client.call(request)
        assert "says nothing of TensorRT's" in caught.value.why


def test_models_without_a_cache(client: Worker, tmp_path: Path) -> None:
    model = linear("int8")
    save(model, tmp_path)
    (tmp_path / DESCRIPTION_FILE).write_text(described(model).model_dump_json())
    client.call(Load("encoder", str(tmp_path), device="cuda"))
    x = np.random.default_rng(0).standard_normal((3, K)).astype(np.float32)
    feeds, outputs = tmp_path / "in.npz", tmp_path / "out.npz"
    np.savez(feeds, x=x)
    client.call(Run("encoder", str(feeds), str(outputs)))
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    step = np.float32(weights["step"].item())
    codes = np.clip(np.rint(x.astype(np.float16) / weights["step"]), -128, 127).astype(np.float32)
    expected = codes * step @ (weights["codes"] * weights["steps"].astype(np.float32))
    found = np.load(outputs)["y"]
    assert found.dtype == np.float32
    # One code more or less of an input, where a quotient lies between two, moves a sum by a step times a weight of at most 1.27.
    limit = 2 * float(step) * 1.27 + 2.0**-10 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=limit)
    assert limit < 0.5 * expected.std()
    for request in (Trace("encoder", [[1, 2]], 1), Score("encoder", "encoder", [[1, 2]])):
        with pytest.raises(EnvironmentFailure, match="CS5204") as caught:
            client.call(request)
        assert "needs a decoder" in caught.value.why


def test_graphs_that_cannot_stand_in_are_answered(client: Worker, tmp_path: Path) -> None:
    model = linear("nvfp4")
    save(model, tmp_path)
    (tmp_path / DESCRIPTION_FILE).write_text(described(model).model_dump_json())
    with pytest.raises(EnvironmentFailure, match="CS5204") as caught:
        client.call(Load("nvfp4", str(tmp_path), device="cuda"))
    assert "cannot stand in for TensorRT" in caught.value.why
    with pytest.raises(EnvironmentFailure, match="CS5204") as caught:
        client.call(Load("absent", str(tmp_path / "absent"), device="cuda"))
    assert "CS4419" in caught.value.why


def test_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["gpu"], ["engine", "--fast"], ["reference", "more"]):
        assert main(arguments) == 2
    assert "reference" in capsys.readouterr().err


def test_an_engine_worker_without_a_gpu_says_what_is_missing(folder: Path) -> None:
    if find_gpu() is not None:
        pytest.skip("there is a GPU")
    record = EngineRecord(
        file="model.engine",
        sha256="0" * 64,
        bytes=1,
        builder="tensorrt_rtx",
        version=processor.installed_builders().get("tensorrt_rtx", "1.0"),
        compute_capability="8.0",
    )
    described_engine = Description.model_validate_json((folder / DESCRIPTION_FILE).read_text())
    path = folder.parent / "with-engine"
    path.mkdir(exist_ok=True)
    text = described_engine.model_copy(update={"engines": (record,)}).model_dump_json()
    (path / DESCRIPTION_FILE).write_text(text)
    command = [sys.executable, "-P", "-m", "compile_sparse.backends.tensorrt.run.worker", "engine"]
    with Worker(command) as worker, pytest.raises(EnvironmentFailure, match="CS5204") as caught:
        worker.call(Load("compiled", str(path), device="cuda"))
    assert "CS4422" in caught.value.why or "CS5210" in caught.value.why
