"""The captured program computes what the Hugging Face model computes, and has the form the IR promises."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.capture.fold import fold_constants
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.edit import eliminate_dead_code, op_name, schema_arguments
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.ir.weights import AbsentTensor, ResidentTensor
from compile_sparse.testing.models import build_model, example_inputs
from tests.toys import toy_program

FromDisk = Callable[[str], Program]
IDS = torch.tensor([[5, 17, 40, 8, 33, 2, 71], [9, 3, 3, 60, 1, 1, 88]])


def tolerance(expected: torch.Tensor, width: int = 88, depth: int = 9) -> float:
    """Two orders of summing ``width`` float32 terms differ by about eps * sqrt(width); ``depth`` GEMMs in a row add up."""
    return float(torch.finfo(torch.float32).eps * width**0.5 * depth * expected.abs().max())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decoder_equals_eager_bit_for_bit_with_and_without_a_cache(from_disk: FromDisk, name: str) -> None:
    program, model = from_disk(name), build_model(name)
    executor, state, past = Executor(program), None, None
    for ids in (IDS[:, :4], IDS[:, 4:6], IDS[:, 6:]):
        given = decoder_inputs(program, ids, past=state)
        state = executor.run(given)
        with torch.no_grad():
            expected = model(
                input_ids=ids, attention_mask=given["attention_mask"], past_key_values=past, use_cache=True
            )
        past = expected.past_key_values
        assert torch.equal(state["logits"], expected.logits)
        for layer in range(2):
            assert torch.equal(state[f"present.{layer}.key"], past.layers[layer].keys)
            assert torch.equal(state[f"present.{layer}.value"], past.layers[layer].values)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "phi", "gptj", "mixtral"])
def test_a_decoder_equals_eager_whatever_its_cache_is(captured: Callable[[str], Program], name: str) -> None:
    """Windows shorter than the past, parallel attention, interleaved rotation, experts; eager keeps a windowed cache."""
    program, model = captured(name), build_model(name)
    model.set_experts_implementation("batched_mm")
    executor, state, past = Executor(program), None, None
    for ids in (IDS[:, :5], IDS[:, 5:6], IDS[:, 6:]):
        state = executor.run(decoder_inputs(program, ids, past=state))
        with torch.no_grad():
            expected = model(input_ids=ids, past_key_values=past, use_cache=True)
        past, logits = expected.past_key_values, expected.logits
        torch.testing.assert_close(state["logits"], logits, rtol=0, atol=tolerance(logits))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("split", [1, 4, 6])
def test_prefill_and_cached_steps_equal_the_full_forward(from_disk: FromDisk, name: str, split: int) -> None:
    program = from_disk(name)
    executor = Executor(program)
    whole = executor.run(decoder_inputs(program, IDS))
    state = executor.run(decoder_inputs(program, IDS[:, :split]))
    rows = [state["logits"]]
    for position in range(split, IDS.shape[1]):
        state = executor.run(decoder_inputs(program, IDS[:, position : position + 1], past=state))
        rows.append(state["logits"])
    logits = whole["logits"]
    torch.testing.assert_close(torch.cat(rows, 1), logits, rtol=0, atol=tolerance(logits))
    for entry in (key for key in whole if key.startswith("present.")):
        torch.testing.assert_close(state[entry], whole[entry], rtol=0, atol=tolerance(whole[entry]))


def test_padding_is_masked(from_disk: FromDisk) -> None:
    """Left padding changes nothing at the real positions, so the attention mask is wired to every layer."""
    program = from_disk("gpt2")
    executor, mask = Executor(program), torch.ones_like(IDS)
    mask[:, :3] = 0
    given = decoder_inputs(program, IDS, attention_mask=mask) | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    padded = executor.run(given)["logits"][:, 3:]
    alone = executor.run(decoder_inputs(program, IDS[:, 3:]))["logits"]
    torch.testing.assert_close(padded, alone, rtol=0, atol=tolerance(alone))


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_an_encoder_equals_eager_bit_for_bit(from_disk: FromDisk, name: str) -> None:
    program, model = from_disk(name), build_model(name)
    inputs = example_inputs(program, batch=3, length=7)
    with torch.no_grad():
        expected = model(**inputs)
    found = Executor(program).run(inputs)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_the_form_the_ir_promises(from_disk: FromDisk, name: str) -> None:
    program = from_disk(name)
    verify_program(program)
    names = [op_name(node) for node in program.graph.nodes if node.op == "call_function"]
    assert not {"view", "_unsafe_view", "clone", "contiguous", "alias", "detach", "dropout"} & set(names)
    assert not [n for n in names if "assert" in n]
    attention = [node for node in program.graph.nodes if op_name(node) == "scaled_dot_product_attention"]
    assert len(attention) == 2
    width = 64 // 8
    assert all(schema_arguments(node)["scale"] == pytest.approx(width**-0.5) for node in attention)
    assert not any(isinstance(value, torch.Tensor) for value in vars(program.graph_module).values())


def test_tied_weights_are_stored_once_and_found(from_disk: FromDisk, saved: Callable[[str], Path]) -> None:
    with safe_open(saved("gpt2") / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a mapping
    program = from_disk("gpt2")
    tied = {"transformer.wte.weight", "lm_head.weight"}
    bound = [b.tensor for b in program.bindings.values() if b.tensor in tied]
    assert len(bound) == 1
    assert program.aliases == {next(iter(tied - set(bound))): bound[0]}
    assert program.parameter_count() == sum(p.numel() for p in build_model("gpt2").parameters())


def test_a_config_alone_gives_shapes_and_no_values(saved: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved("bert") / "config.json").read_bytes())
    program = capture(open_folder(tmp_path), require_weights=False)
    parameters = [b.tensor for b in program.bindings.values() if b.kind == "parameter"]
    assert parameters
    assert all(isinstance(program.weights[name], AbsentTensor) for name in parameters)
    assert not program.weights.has_values
    with pytest.raises(ModelError) as caught:
        program.weights.load(parameters[0])
    assert caught.value.code == "CS2001"
    assert caught.value.where == parameters[0]


class _Table(torch.nn.Module):
    """Adds a table that depends on a buffer alone to a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.arange(6.0))
        self.project = torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = (self.steps * 0.5).cos() + torch.arange(6)
        out = self.project(x) + table
        assert isinstance(out, torch.Tensor)
        return out


def test_what_depends_on_no_input_is_folded_once() -> None:
    module, x = _Table(), torch.randn(2, 6)
    program = toy_program(module, [x])
    expected = Executor(program).run({"x0": x})["y0"]
    assert "cos" in {op_name(node) for node in program.graph.nodes}
    folded = eliminate_dead_code(fold_constants(program))
    verify_program(folded)
    assert [op_name(n) for n in folded.graph.nodes if n.op == "call_function"] == ["linear", "add"]
    (table,) = [name for name in folded.weights if name.startswith("folded")]
    assert torch.equal(folded.weights.load(table), (module.steps * 0.5).cos() + torch.arange(6))
    assert torch.equal(Executor(folded).run({"x0": x})["y0"], expected)
    # A trained weight is not a constant, however little it depends on.
    assert isinstance(folded.weights["project.weight"], ResidentTensor)


def test_many_captures_in_one_process_do_not_crash() -> None:
    """Exporting from fake inputs corrupts the heap of some torch versions after a few captures."""
    script = """
import gc, torch, transformers as hf
from compile_sparse.compiler.capture import capture_model
sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
for count in range(4):
    program = capture_model(hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval())
    del program
    gc.collect()
print("captured", count + 1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "captured 4\n"
