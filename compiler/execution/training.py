"""Train a program: the same graph as ``torch.nn.Module``, with parameters and gradients.

Recovery after pruning, first-order criteria and Fisher statistics all differentiate the graph that will be shipped, not the
model it came from. Unlike ``Executor`` a module holds every weight in memory, trained ones as copies, and backward needs the
activations of the whole batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from compile_sparse.compiler.errors import ModelError, UsageError
from compile_sparse.compiler.execution.executor import Observer, interpret_graph
from compile_sparse.compiler.ir.liveness import last_uses
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import ResidentTensor, TensorSource

__all__ = ["ProgramModule", "language_loss"]

IGNORED = -100
"""Target of positions that do not count, as in ``torch.nn.functional.cross_entropy``."""


class ProgramModule(torch.nn.Module):
    """A program whose floating-point parameters are ``torch.nn.Parameter``: any optimizer trains it.

    A stored tensor is one Parameter however many nodes read it, so tied weights share gradients. Its registered name is the
    stored name with ``/`` for ``.`` (``torch`` forbids dots); ``parameter_names`` maps back and ``tensor`` looks up.

    Zeros of tensors with a sparsity annotation survive training: the graph reads ``p * mask``, ``mask`` being one where the
    stored value was not zero. Gradients of the zeros vanish, so optimizers leave them at zero too.

    Args:
        program: what to train. It is not changed.
        trainable: names of the stored tensors to train; every floating-point parameter when omitted. The others are buffers.

    Raises:
        ModelError: CS2401 when an operator of the graph has no derivative (quantized or raised programs), CS2001 when the
            program has no weights.
        UsageError: CS1124 when ``trainable`` names something that cannot be trained.
    """

    def __init__(self, program: Program, *, trainable: Collection[str] | None = None) -> None:
        super().__init__()
        _refuse_without_derivative(program)
        bound = {binding.tensor: binding.kind for binding in program.bindings.values()}
        eligible = {
            name
            for name, kind in bound.items()
            if kind == "parameter" and program.weights[name].dtype.is_floating_point
        }
        chosen = eligible if trainable is None else {program.aliases.get(name, name) for name in trainable}
        if not chosen <= eligible:
            raise UsageError(
                "CS1124",
                f"{min(chosen - eligible)!r} cannot be trained.",
                why="It is not a floating-point parameter that the graph reads.",
                hint="Name stored tensors, such as model.layers.0.mlp.up_proj.weight.",
            )
        self._program = program
        self._dead_after = last_uses(program.graph)
        self.parameter_names: dict[str, str] = {}
        for name in bound:
            value = program.weights.load(name)
            if name not in chosen:
                self.register_buffer(_attribute(name), value, persistent=False)
                continue
            self.parameter_names[_attribute(name)] = name
            # A copy: optimizers write in place, and a store's tensors may be memory-mapped or shared.
            self.register_parameter(_attribute(name), torch.nn.Parameter(value.detach().clone()))
            if name in program.masks:
                self.register_buffer(_attribute(name) + "/mask", (value != 0).to(value.dtype), persistent=False)

    def tensor(self, name: str) -> torch.Tensor:
        """Parameter or buffer by the name it is stored under (either name of a tied one)."""
        return getattr(self, _attribute(self._program.aliases.get(name, name)))

    def forward(
        self, inputs: Mapping[str, torch.Tensor], observe: Mapping[str, Observer] | None = None
    ) -> dict[str, torch.Tensor]:
        """Outputs by name, attached to the parameters.

        Args:
            inputs: every model input by its public name (``decoder_inputs`` makes them).
            observe: graph node name -> callback that receives the node's value, part of the autograd graph:
                ``value.register_hook`` and ``value.retain_grad`` work where the value depends on a parameter.
        """
        return interpret_graph(self._program, inputs, self._value, observe, dead_after=self._dead_after)

    def program(self) -> Program:
        """The program with the parameters' present values, in the dtypes they were stored in.

        Raises:
            ModelError: CS2402 when training has diverged.
        """
        weights = self._program.weights
        changes: dict[str, TensorSource] = {}
        for name in self.parameter_names.values():
            value = self._value(name).detach().to("cpu", weights[name].dtype)
            if not bool(value.isfinite().all()):
                raise ModelError(
                    "CS2402",
                    "A trained parameter is not finite.",
                    where=name,
                    why="Training diverged, or a value does not fit the dtype the parameter is stored in.",
                    hint="Lower the learning rate.",
                )
            changes[name] = ResidentTensor(value.clone())
        changes |= {
            alias: changes[bound]
            for alias, bound in self._program.aliases.items()
            if alias in weights and bound in changes
        }
        return replace(self._program, weights=weights.updated(changes))

    def _value(self, name: str) -> torch.Tensor:
        attribute = _attribute(name)
        mask = self._buffers.get(attribute + "/mask")
        value: torch.Tensor = getattr(self, attribute)
        return value if mask is None else value * mask


def _attribute(name: str) -> str:
    """Never the name of a Python attribute, and never the same for two tensors."""
    return "/" + name.replace(".", "/")


def _refuse_without_derivative(program: Program) -> None:
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "compile_sparse":
            raise ModelError(
                "CS2401",
                "This program cannot be trained.",
                where=node.name,
                why=f"The operator {node.target} has no derivative: it rounds, or names one runtime kernel.",
                hint="Train before quantizing and lowering.",
            )


def language_loss(
    program: Program, outputs: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """What a program is trained and differentiated on.

    Decoders: mean cross-entropy of the next token, nats per token; positions that ``attention_mask`` excludes do not count.
    Other models come without labels, so this is an energy: the mean square of each floating-point output, averaged over the
    outputs. Its gradient says what the outputs depend on, not what is right; do not train on it.

    Args:
        program: what made ``outputs``.
        outputs, inputs: by public name; ``logits [B, S, V]``, ``input_ids [B, S]``.

    Raises:
        UsageError: CS1125 when no token has a successor.
    """
    by_role = {entry.role: inputs[entry.name] for entry in program.inputs if entry.name in inputs}
    logits = next((outputs[output.name] for output in program.outputs if output.role == "logits"), None)
    if logits is None or "input_ids" not in by_role:
        energies = [value.float().square().mean() for value in outputs.values() if value.is_floating_point()]
        return torch.stack(energies).mean()
    ids = by_role["input_ids"]
    targets = ids.roll(-1, dims=1)
    if "attention_mask" in by_role:
        seen = by_role["attention_mask"][:, -ids.shape[1] :]
        targets = targets.masked_fill(seen.roll(-1, dims=1) * seen == 0, IGNORED)
    targets = targets.index_fill(1, torch.tensor(ids.shape[1] - 1, device=ids.device), IGNORED)
    if not bool((targets != IGNORED).any()):
        raise UsageError("CS1125", "No token has a successor to predict.", why=f"input_ids is {list(ids.shape)}.")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
