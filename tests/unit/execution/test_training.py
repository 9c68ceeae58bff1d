"""Training a program: gradients of the original model, a fine-tune after pruning, masks, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.errors import ModelError, UsageError
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.execution.training import ProgramModule, language_loss
from compile_sparse.compiler.ir.program import Program, SparsityMask
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.testing.models import build_model, example_inputs
from tests.toys import toy_program

IDS = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(1))

Captured = Callable[[str], Program]


def loss_of(module: ProgramModule, program: Program) -> torch.Tensor:
    inputs = decoder_inputs(program, IDS)
    return language_loss(program, module(inputs), inputs)


def train(module: ProgramModule, program: Program, steps: int, **options: float) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(module, program).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_loss_and_gradients_are_the_original_models(captured: Captured, name: str) -> None:
    model, program = build_model(name), captured(name)
    module = ProgramModule(program)
    loss = loss_of(module, program)
    loss.backward()
    wanted = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    parameters = dict(model.named_parameters())  # tied tensors once
    assert len(parameters) == len(list(module.parameters()))
    for key, parameter in parameters.items():
        # float32 sums of 44 tokens in another order: a few units in the last place of the largest gradient.
        gradient = module.tensor(key).grad
        assert gradient is not None and parameter.grad is not None, key
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5 * float(parameter.grad.abs().max()))


def test_parameter_names_map_back(captured: Captured) -> None:
    program = captured("gpt2")
    module = ProgramModule(program)
    named = dict(module.named_parameters())
    assert named.keys() == module.parameter_names.keys()
    for registered, tensor in module.parameter_names.items():
        assert torch.equal(named[registered], program.weights.load(tensor))
    assert module.tensor("transformer.wte.weight") is module.tensor("lm_head.weight")


def pruned(program: Program, fraction: float = 0.5) -> Program:
    analysis = analyse(program)
    keep = {}
    for group in analysis.prunable("channels"):
        keep[group.anchor] = torch.arange(group.size) >= fraction * group.size
    return rewrite(program, analysis, keep)


def test_a_short_fine_tune_repairs_a_pruned_model(tiny_llama_program: Program) -> None:
    program = pruned(tiny_llama_program)
    before = {name: source.load().clone() for name, source in program.weights.items()}
    module = ProgramModule(program)
    damaged = float(loss_of(module, program).detach())
    train(module, program, steps=20, lr=1e-2)
    repaired = float(loss_of(module, program).detach())
    assert repaired < 0.5 * damaged
    # The way back: the plain interpreter on the written weights gives the trained model's answers, bit for bit.
    trained = module.program()
    inputs = decoder_inputs(program, IDS)
    with torch.no_grad():
        wanted = module(inputs)
    outputs = Executor(trained).run(inputs)
    assert all(torch.equal(outputs[key], wanted[key]) for key in wanted)
    assert all(torch.equal(program.weights.load(name), value) for name, value in before.items())
    assert not torch.equal(trained.weights.load("lm_head.weight"), before["lm_head.weight"])


def test_trained_weights_keep_their_dtype_and_later_training_does_not_reach_them(tiny_llama_program: Program) -> None:
    halves = {n: ResidentTensor(s.load().bfloat16()) for n, s in tiny_llama_program.weights.items() if "norm" in n}
    module = ProgramModule(replace(tiny_llama_program, weights=tiny_llama_program.weights.updated(halves))).float()
    written = module.program()
    assert written.weights["model.norm.weight"].dtype == torch.bfloat16
    assert written.weights["lm_head.weight"].dtype == torch.float32
    before = written.weights.load("lm_head.weight").clone()
    with torch.no_grad():
        module.tensor("lm_head.weight").add_(1.0)
    assert torch.equal(written.weights.load("lm_head.weight"), before)


def test_masked_zeros_stay_and_the_rest_trains(tiny_llama_program: Program) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = tiny_llama_program.weights.load(name).clone()
    weight[:, ::2] = 0
    program = replace(
        tiny_llama_program,
        weights=tiny_llama_program.weights.updated({name: ResidentTensor(weight)}),
        masks={name: SparsityMask("2:4", 1, 0.5)},
    )
    module = ProgramModule(program)
    with torch.no_grad():  # even values forced into the zeros do not reach the graph
        parameter = module.tensor(name)
        parameter[:, 0] = 7.0
    train(module, program, steps=3, lr=1e-2, weight_decay=0.1)
    trained = module.program().weights.load(name)
    assert not trained[:, ::2].any()
    assert not torch.isclose(trained[:, 1::2], weight[:, 1::2], rtol=0, atol=1e-4).any(1).all()
    gradient = module.tensor(name).grad
    assert gradient is not None and not gradient[:, ::2].any() and gradient[:, 1::2].any()


def test_only_what_is_named_is_trained(captured: Captured) -> None:
    program = captured("llama_tied")
    module = ProgramModule(program, trainable=["model.embed_tokens.weight"])  # the alias of the bound lm_head.weight
    assert list(module.parameter_names.values()) == ["lm_head.weight"]
    loss_of(module, program).backward()
    assert module.tensor("model.norm.weight").grad is None


def test_what_cannot_be_trained_is_refused_by_name(tiny_llama_program: Program) -> None:
    with pytest.raises(UsageError) as caught:
        ProgramModule(tiny_llama_program, trainable=["model.rotary_emb.inv_freq"])
    assert caught.value.code == "CS1124"
    assert "inv_freq" in caught.value.what


def test_observed_values_take_hooks(tiny_llama_program: Program) -> None:
    """Gradient at a linear's output: summed over tokens it is the bias gradient, and here the outer product is dL/dW."""
    node = next(n for n in tiny_llama_program.graph.nodes if "linear" in n.name)
    source = node.args[0].name
    tensor = tiny_llama_program.tensor_of(node.args[1])
    assert tensor is not None
    seen: dict[str, torch.Tensor] = {}
    module = ProgramModule(tiny_llama_program)
    inputs = decoder_inputs(tiny_llama_program, IDS)
    observe = {
        node.name: lambda value: value.register_hook(lambda g: seen.update(gradient=g)) and None,
        source: lambda value: seen.update(input=value.detach()),
    }
    language_loss(tiny_llama_program, module(inputs, observe), inputs).backward()
    product = seen["gradient"].flatten(0, 1).T @ seen["input"].flatten(0, 1)
    torch.testing.assert_close(module.tensor(tensor).grad, product, rtol=1e-4, atol=1e-6)


def test_the_loss_skips_what_the_mask_excludes(tiny_llama_program: Program) -> None:
    module = ProgramModule(tiny_llama_program)
    mask = torch.ones_like(IDS)
    mask[:, 8:] = 0
    padded = decoder_inputs(tiny_llama_program, IDS, attention_mask=mask)
    short = decoder_inputs(tiny_llama_program, IDS[:, :8])
    losses = [language_loss(tiny_llama_program, module(feed), feed) for feed in (padded, short)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_one_token_has_no_loss(tiny_llama_program: Program) -> None:
    inputs = decoder_inputs(tiny_llama_program, IDS[:, :1])
    with pytest.raises(UsageError) as caught:
        language_loss(tiny_llama_program, ProgramModule(tiny_llama_program)(inputs), inputs)
    assert caught.value.code == "CS1125"


def test_without_labels_the_loss_is_the_outputs_energy(tiny_bert_program: Program) -> None:
    module, inputs = ProgramModule(tiny_bert_program), example_inputs(tiny_bert_program, 2, 5)
    outputs = module(inputs)
    wanted = torch.stack([value.square().mean() for value in outputs.values()]).mean()
    torch.testing.assert_close(language_loss(tiny_bert_program, outputs, inputs), wanted)
    wanted.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.compile_sparse.rms_norm(x, self.weight, 1e-6)


def test_operators_without_a_derivative_are_refused() -> None:
    with pytest.raises(ModelError) as caught:
        ProgramModule(toy_program(Normed(), [torch.ones(2, 8)]))
    assert caught.value.code == "CS2401"
    assert caught.value.where == "rms_norm"


def test_diverged_weights_are_not_written(tiny_llama_program: Program) -> None:
    module = ProgramModule(tiny_llama_program)
    with torch.no_grad():
        module.tensor("lm_head.weight")[0, 0] = torch.inf
    with pytest.raises(ModelError) as caught:
        module.program()
    assert caught.value.code == "CS2402"
    assert caught.value.where == "lm_head.weight"
