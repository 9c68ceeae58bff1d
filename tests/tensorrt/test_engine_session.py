"""Sessions on a double of an engine: caches in place, prompts in parts, steps with fixed addresses."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compile_sparse.backends.tensorrt.run.decode_graph import GreedyStep, prefill
from compile_sparse.backends.tensorrt.run.engine_session import CacheOnDevice, EngineSession
from compile_sparse.backends.tensorrt.run.io_binding import bind, fitting_profile
from compile_sparse.backends.tensorrt.run.reference_session import ReferenceRuntime
from compile_sparse.backends.worker.errors import RequestError
from tests.tensorrt.decoders import (
    BATCH,
    LENGTH,
    PROMPT,
    STEPS,
    full_forward,
    through_the_cache,
    tolerance,
)
from tests.tensorrt.graphs import DECODER

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
