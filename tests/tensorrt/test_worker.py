"""The measuring process: the reference runtime for real, and the engine's session with a double of the engine.

The double is as TensorRT documents itself: it knows shapes and addresses only, refuses shapes outside its profile, and reads and
writes memory at the addresses it was given. It computes with the reference runtime. What it cannot show is anything of CUDA.
"""

from __future__ import annotations

import ctypes
import math
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
from compile_sparse.backends.tensorrt.description import DESCRIPTION_FILE, Description, EngineRecord, Profile, Value
from compile_sparse.backends.tensorrt.engine.engines import Here
from compile_sparse.backends.tensorrt.engine.gpu import Gpu, find_gpu
from compile_sparse.backends.tensorrt.run.decode_graph import GreedyStep, prefill
from compile_sparse.backends.tensorrt.run.engine_session import CacheOnDevice, EngineSession
from compile_sparse.backends.tensorrt.run.io_binding import bind, fitting_profile
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
from compile_sparse.compiler.targets.target import find_target
from tests.tensorrt.graphs import DECODER, K, decoder, decoder_profiles, linear, save

if find_spec("onnxruntime") is None:
    pytest.skip("ONNX Runtime is not installed", allow_module_level=True)

PROMPT, STEPS, BATCH = 5, 16, 2
LENGTH = PROMPT + STEPS


def described(model: onnx.ModelProto, **fields: Any) -> Description:
    """What the lowering would write beside ``model``."""

    def values(protos: Any) -> tuple[Value, ...]:
        found = []
        for proto in protos:
            kind = proto.type.tensor_type
            shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
            found.append(
                Value(name=proto.name, dtype=helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape=shape)
            )
        return tuple(found)

    outputs = values(model.graph.output)
    aliases = {v.name: v.name.replace("present", "past_key_values") for v in outputs if v.name.startswith("present")}
    graph = {"inputs": values(model.graph.input), "outputs": outputs, "aliases": aliases}
    return Description(kind="text", precision="fp16", **graph, **fields)


def decoder_folder(folder: Path, *, precision: str = "float16", decomposable: bool = False) -> Path:
    model = decoder(precision=precision, decomposable=decomposable)
    save(model, folder, external=True)
    profiles = tuple(Profile.model_validate(profile) for profile in decoder_profiles(batch=BATCH, prompt=8))
    description = described(model, max_length=DECODER["max_length"], profiles=profiles)
    (folder / DESCRIPTION_FILE).write_text(description.model_dump_json())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("decoder"), decomposable=True)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("exact"), precision="float32")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(0, DECODER["vocabulary"], (BATCH, LENGTH + 1))


def full_forward(folder: Path, ids: np.ndarray[Any, Any]) -> torch.Tensor:
    """Logits of all positions at once in float64, by torch and without a cache, from the weights in ``folder``."""
    model = onnx.load(str(folder / "model.onnx"))
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()).double() for t in model.graph.initializer}
    heads, kv_heads, size = DECODER["heads"], DECODER["kv_heads"], DECODER["head_size"]
    batch, length = ids.shape
    cos, sin = weights["cos"][:length], weights["sin"][:length]

    def normal(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    def split(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(batch, length, count, size).transpose(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)

    x = weights["embedding"][torch.from_numpy(ids)]
    for i in range(DECODER["layers"]):
        n = normal(x)
        q, k = rotate(split(n @ weights[f"wq{i}"], heads)), rotate(split(n @ weights[f"wk{i}"], kv_heads))
        v = split(n @ weights[f"wv{i}"], kv_heads)
        k, v = (z.repeat_interleave(heads // kv_heads, 1) for z in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        x = x + attended @ weights[f"wo{i}"]
    return normal(x) @ weights["head"]


def tolerance(precision: str, expected: torch.Tensor) -> float:
    """Six standard deviations of what rounding does to a logit, and the rounding of the largest logit itself.

    Each of the about 20 values stored on the way through two layers is off by half a unit in its last place, at random; sums of
    64 terms add the root of their number of such errors when they are kept in ``precision`` too, which float16's are not.
    """
    half_unit = torch.finfo(getattr(torch, precision)).eps / 2
    terms = DECODER["width"] if precision == "float32" else 1
    return float(half_unit * (6 * math.sqrt(20 * terms) * expected.std() + expected.abs().max()))


def through_the_cache(model: Any, ids: np.ndarray[Any, Any], first: int = PROMPT) -> np.ndarray[Any, Any]:
    generation = model.generation(ids.shape[0], ids.shape[1])
    pieces = [generation.step(ids[:, :first])]
    pieces += [generation.step(ids[:, at : at + 1]) for at in range(first, ids.shape[1])]
    return np.concatenate(pieces, axis=1)


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


# The engine's session, with a double of the engine.


class Context:
    """Shapes and addresses in, memory out."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile = engine, None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = self.engine.description.profiles[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "no profile was chosen"
        low, _, high = self.profile.shapes[name]
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return [value.name for value in self.engine.description.inputs if value.name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch, sequence = self.shapes["input_ids"]
        known = {"batch": batch, "sequence": sequence}
        (value,) = [value for value in self.engine.description.outputs if value.name == name]
        return tuple(known.get(size, size) for size in value.shape)

    def execute_async_v3(self, stream: int) -> bool:
        feeds = {v.name: self.at(v.name, self.shapes[v.name], v.dtype) for v in self.engine.description.inputs}
        for output, source in self.engine.description.aliases.items():
            assert self.addresses[output] == self.addresses[source], "the cache is not updated in place"
        self.engine.calls.append((self.profile.name, self.shapes["input_ids"]))
        for name, value in self.engine.model.step(feeds).items():
            self.at(name, value.shape, value.dtype)[...] = value
        return True

    def at(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        dtype = np.dtype(dtype)
        count = math.prod(shape) * dtype.itemsize
        memory = (ctypes.c_char * count).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


class Engine:
    def __init__(self, folder: Path) -> None:
        self.model = ReferenceRuntime(folder, 1)
        self.description = self.model.description
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def create_execution_context(self) -> Context:
        return Context(self)


@pytest.fixture
def session(exact: Path) -> EngineSession:
    engine = Engine(exact)
    return EngineSession(engine, engine.description, ["prefill", "decode"], device="cpu", stream=lambda: 0)  # type: ignore[arg-type]


def calls(session: EngineSession) -> list[tuple[str, tuple[int, ...]]]:
    return session._engine.calls  # type: ignore[attr-defined, no-any-return]


def test_a_session_gives_what_the_graph_computes(
    session: EngineSession, exact: Path, tokens: np.ndarray[Any, Any]
) -> None:
    ids = tokens[:, :LENGTH]
    expected = full_forward(exact, ids)
    np.testing.assert_allclose(through_the_cache(session, ids), expected, atol=tolerance("float32", expected), rtol=0)
    assert calls(session) == [("prefill", (BATCH, PROMPT))] + [("decode", (BATCH, 1))] * STEPS


def test_long_prompts_and_large_batches_are_cut(session: EngineSession, exact: Path) -> None:
    """Profiles hold two rows and eight tokens; five rows of nineteen tokens are six calls for each part but the last."""
    ids = np.random.default_rng(2).integers(0, DECODER["vocabulary"], (5, 19))
    expected = full_forward(exact, ids)
    found = session.generation(5, 19).step(ids)
    np.testing.assert_allclose(found, expected, atol=tolerance("float32", expected), rtol=0)
    assert calls(session) == [("prefill", (rows, n)) for rows in (2, 2, 1) for n in (8, 8, 3)]


def test_two_generations_of_one_session_do_not_mix(session: EngineSession, tokens: np.ndarray[Any, Any]) -> None:
    ids = tokens[:, :8]
    alone = through_the_cache(session, ids, 4)
    first, second = session.generation(BATCH, 8), session.generation(BATCH, 8)
    begun = first.step(ids[:, :4])
    second.step(ids[::-1, :4])
    found = np.concatenate([begun, *(first.step(ids[:, at : at + 1]) for at in range(4, 8))], axis=1)
    np.testing.assert_array_equal(found, alone)


def test_greedy_steps_with_fixed_addresses(session: EngineSession, exact: Path, tokens: np.ndarray[Any, Any]) -> None:
    """The step that a CUDA graph records; here it is called instead of replayed."""
    prompt = torch.from_numpy(tokens[:, :PROMPT])
    cache = CacheOnDevice(session, BATCH, PROMPT + 6)
    first = prefill(cache, prompt)
    step = GreedyStep(cache, first, 6)
    context = session._contexts["decode"]
    addresses = dict(context.addresses)  # type: ignore[attr-defined]
    step.run()
    step.run()
    step.rewind()
    for _ in range(6):
        step.run()
    assert context.addresses == addresses  # type: ignore[attr-defined]
    ids = torch.cat([prompt, first, step.chosen], dim=1)
    expected = full_forward(exact, ids.numpy()).argmax(-1)[:, PROMPT - 1 : -1]
    assert torch.equal(ids[:, PROMPT:], expected)


def test_what_a_session_refuses(session: EngineSession) -> None:
    with pytest.raises(RequestError, match="do not fit the cache"):
        session.generation(1, DECODER["max_length"] + 1)
    shape = {"input_ids": (3, 4)}
    with pytest.raises(
        RequestError, match=r"not built for input_ids \[3, 4\]; it was for prefill: input_ids \[1, 1\] to \[2, 8\]"
    ):
        fitting_profile(session.profiles, shape)
    assert fitting_profile(session.profiles, {"input_ids": (1, 1)}).name == "decode"
    assert fitting_profile(session.profiles, {"input_ids": (1, 2)}).name == "prefill"
    cache = CacheOnDevice(session, 1, 4)
    feeds = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "write_indices": torch.zeros(1, dtype=torch.int64)}
    context = session.context({**feeds, **cache.past})
    with pytest.raises(RequestError, match=r"feeds lack past_key_values\.0\.key"):
        bind(context, session.description, feeds)
    wrong = {"input_ids": torch.zeros(1, 4, dtype=torch.int32)}
    with pytest.raises(RequestError, match=r"input_ids must be int64, got torch\.int32"):
        bind(context, session.description, feeds | cache.past | wrong)
    turned = {"input_ids": torch.zeros(4, 2, dtype=torch.int64).t()}
    with pytest.raises(RequestError, match="not contiguous"):
        bind(context, session.description, feeds | cache.past | turned)
    with pytest.raises(RequestError, match="lacks the engine's profile 'other'"):
        EngineSession(session._engine, session.description, ["other"], device="cpu")


# What is here.


def test_probe_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "installed_builders", lambda: {"tensorrt_rtx": "1.7.1"})
    probe = processor.probe_runtime(find_target("trt-a100"))
    assert not probe.available
    assert probe.why_not == "The package tensorrt is not installed."
    assert "compile-sparse[tensorrt]" in probe.hint


@pytest.mark.parametrize(
    ("version", "gpu", "why"),
    [
        ("10.9.0", Gpu("NVIDIA A100-SXM4-80GB", "8.0"), "TensorRT 10.9.0 is older than 11"),
        ("11.4.0", None, "There is no GPU here; the target is an NVIDIA A100 (compute capability 8.0)"),
        ("11.4.0", Gpu("NVIDIA A30", "8.0"), "the GPU here is called 'NVIDIA A30'"),
        ("11.4.0", Gpu("NVIDIA A10", "8.6"), "NVIDIA A10 has compute capability 8.6, the target 8.0"),
        ("11.4.0", Gpu("NVIDIA A1000", "8.0"), "the GPU here is called 'NVIDIA A1000'"),
        ("11.4.0", Gpu("NVIDIA A100-SXM4-80GB", "8.0"), ""),
    ],
)
def test_probe(version: str, gpu: Gpu | None, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "installed_builders", lambda: {"tensorrt": version})
    monkeypatch.setattr(processor, "find_gpu", lambda: gpu)
    monkeypatch.setattr(processor, "_torch_has_cuda", lambda: True)
    probe = processor.probe_runtime(find_target("trt-a100"))
    assert probe.available is (why == "")
    assert why in probe.why_not
    assert probe.version == version
    if probe.available:
        assert probe.processor == "NVIDIA A100-SXM4-80GB 8.0"
        monkeypatch.setattr(processor, "_torch_has_cuda", lambda: False)
        assert "without CUDA" in processor.probe_runtime(find_target("trt-a100")).why_not


def test_what_is_installed_here() -> None:
    builders = processor.installed_builders()
    assert ("tensorrt_rtx" in builders) is (find_spec("tensorrt_rtx") is not None)
    assert "unknown" not in builders.values()
    assert processor.reference_version().split(".")[0].isdigit()
    found = processor.here()
    assert isinstance(found, Here)
    assert (found.compute_capability == "") is (find_gpu() is None)
