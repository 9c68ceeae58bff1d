"""The reference interpreter: what it computes, how long it holds weights, what it shows to observers."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs, weight_only
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import WeightStore
from compile_sparse.testing.models import example_inputs
from tests.toys import toy_program

LAYERS, WIDTH = 6, 8
X = torch.arange(3.0 * WIDTH).reshape(3, WIDTH) / WIDTH


@dataclass
class Count:
    loads: int = 0
    alive: int = 0
    most: int = 0


@dataclass(frozen=True)
class CountingSource:
    """Gives a new tensor on every load and notices when it is dropped."""

    value: torch.Tensor
    count: Count = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def load(self) -> torch.Tensor:
        loaded = self.value.clone()
        self.count.loads += 1
        self.count.alive += 1
        self.count.most = max(self.count.most, self.count.alive)
        weakref.finalize(loaded, self._dropped)
        return loaded

    def _dropped(self) -> None:
        self.count.alive -= 1


class Chain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def chain() -> Chain:
    torch.manual_seed(0)
    return Chain()


def counted(program: Program) -> tuple[Program, Count]:
    count = Count()
    sources = {name: CountingSource(source.load(), count) for name, source in program.weights.items()}
    return replace(program, weights=WeightStore(sources)), count


def test_outputs_equal_the_module() -> None:
    module = chain()
    with torch.no_grad():
        assert torch.equal(Executor(toy_program(module, [X])).run({"x0": X})["y0"], module(X))


def test_without_a_budget_one_weight_is_in_memory_at_a_time() -> None:
    program, count = counted(toy_program(chain(), [X]))
    executor = Executor(program, cache_bytes=0)
    executor.run({"x0": X})
    assert count.loads == LAYERS
    assert count.most == 1
    assert count.alive == 0
    executor.run({"x0": X})
    assert count.loads == 2 * LAYERS
    assert count.most == 1


def test_a_budget_keeps_as_many_weights_as_fit_between_runs() -> None:
    program, count = counted(toy_program(chain(), [X]))
    one = WIDTH * WIDTH * 4
    executor = Executor(program, cache_bytes=2 * one + 1)
    first = executor.run({"x0": X})["y0"]
    assert (count.loads, count.alive) == (LAYERS, 2)
    second = executor.run({"x0": X})["y0"]
    assert count.loads == LAYERS + LAYERS - 2
    assert count.most == 3  # two kept, one passing through
    assert torch.equal(first, second)


def test_observers_see_the_value_of_their_node_and_nothing_else() -> None:
    module = chain()
    program = toy_program(module, [X])
    first = next(node.name for node in program.graph.nodes if node.op == "call_function")
    seen: list[torch.Tensor] = []
    Executor(program).run({"x0": X}, observe={first: seen.append})
    (value,) = seen
    with torch.no_grad():
        assert torch.equal(value, module.layers[0](X))


def test_inputs_and_weights_can_be_observed() -> None:
    program = toy_program(chain(), [X])
    placeholders = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    seen: dict[str, torch.Tensor] = {}
    observe = {name: (lambda value, name=name: seen.update({name: value})) for name in placeholders}
    Executor(program, cache_bytes=0).run({"x0": X}, observe=observe)
    assert seen.keys() == set(placeholders)
    assert torch.equal(seen[program.inputs[0].placeholder], X)


def test_a_missing_input_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        Executor(toy_program(chain(), [X])).run({"pixels": X})
    assert caught.value.code == "CS1033"
    assert "'x0'" in caught.value.what
    assert "pixels" in caught.value.why


def test_what_depends_on_weights_alone_is_computed_once() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight * 3)

    program = toy_program(Scaled(), [X])
    scaled = next(node for node in program.graph.nodes if node.op == "call_function" and "mul" in node.name)
    original, calls = scaled.target, []
    scaled.target = lambda *arguments: calls.append(1) or original(*arguments)
    executor = Executor(program)
    for _ in range(3):
        assert torch.equal(executor.run({"x0": X})["y0"], 3 * X)
    assert len(calls) == 1


def test_weights_and_what_is_computed_from_them_alone() -> None:
    class Transposed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight * 2).t()

    program = toy_program(Transposed(), [X])
    calls = {node.name for node in weight_only(program) if node.op == "call_function"}
    assert calls == {"mul", "t"}
    assert {node.name for node in weight_only(program)} - calls == set(program.bindings)


def test_decoder_inputs_of_a_first_and_a_second_call(tiny_llama_program: Program) -> None:
    program, ids = tiny_llama_program, torch.tensor([[5, 6, 7], [8, 9, 1]])
    first = decoder_inputs(program, ids)
    assert first.keys() == {entry.name for entry in program.inputs}
    assert first["attention_mask"].tolist() == [[1, 1, 1]] * 2
    assert first["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert first["past_key_values.1.value"].shape == (2, 4, 0, 8)
    outputs = Executor(program).run(first)
    second = decoder_inputs(program, ids[:, :1], past=outputs)
    assert second["attention_mask"].shape == (2, 4)
    assert second["position_ids"].tolist() == [[3], [3]]
    assert second["past_key_values.0.key"] is outputs["present.0.key"]


def test_a_decoder_runs_with_any_batch_length_and_cache(tiny_llama_program: Program) -> None:
    for batch, length, past in ((1, 1, 1), (1, 7, 0), (3, 2, 9)):
        outputs = Executor(tiny_llama_program).run(example_inputs(tiny_llama_program, batch, length, past))
        assert outputs["logits"].shape == (batch, length, 96)
        assert outputs["present.0.key"].shape == (batch, 4, past + length, 8)
