"""The rewriting engine and its proof: laziness, refusals, and what the re-propagation catches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.errors import CompileSparseError, ModelError
from compile_sparse.compiler.ir.fake_propagation import propagate_fake_tensors
from compile_sparse.compiler.ir.program import Program, SparsityMask
from compile_sparse.compiler.ir.sizes import shape_of
from compile_sparse.compiler.ir.weights import DerivedTensor, TensorSource, WeightStore
from tests.unit.axes.test_models import random_keep


class Counted:
    """A source that counts loads."""

    def __init__(self, source: TensorSource) -> None:
        self.source, self.loads = source, 0
        self.shape, self.dtype = source.shape, source.dtype

    def load(self) -> torch.Tensor:
        self.loads += 1
        return self.source.load()


def test_weights_are_read_only_when_loaded(tiny_llama_program: Program) -> None:
    counted = {name: Counted(source) for name, source in tiny_llama_program.weights.items()}
    program = replace(tiny_llama_program, weights=WeightStore(counted))
    analysis = analyse(program)
    keep = {**random_keep(analysis, "channels", 0), **random_keep(analysis, "width", 0)}
    pruned = rewrite(program, analysis, keep)
    assert sum(source.loads for source in counted.values()) == 0
    name = "model.layers.0.mlp.down_proj.weight"
    assert isinstance(pruned.weights[name], DerivedTensor)
    assert pruned.weights.load(name).shape == (48, 66)
    assert counted[name].loads == 1  # two dimensions, one source


def test_tables_that_do_not_fit_are_refused(tiny_llama_program: Program) -> None:
    analysis = analyse(tiny_llama_program)
    group = analysis.prunable("channels")[0]
    for table in (torch.ones(7, dtype=torch.bool), torch.zeros(88, dtype=torch.bool), torch.ones(88)):
        with pytest.raises(ModelError) as caught:
            rewrite(tiny_llama_program, analysis, {group.anchor: table})
        assert caught.value.code == "CS2106"


def test_a_rotary_pair_cannot_depend_on_the_head(tiny_llama_program: Program) -> None:
    analysis = analyse(tiny_llama_program)
    pairs = next(g for g in analysis.prunable("head_dim") if "qk_dim" in g.roles)
    heads = next(g for g in analysis.prunable("heads") if g.size == 4)
    table = torch.tensor([[True, True, False, True]] * 4)
    with pytest.raises(ModelError) as caught:
        rewrite(tiny_llama_program, analysis, {pairs.anchor: (heads.anchor, table)})
    assert caught.value.code == "CS2106"
    assert "without its outer axis" in caught.value.why


def test_masked_tensors_are_refused(tiny_llama_program: Program) -> None:
    mask = {"model.layers.0.mlp.down_proj.weight": SparsityMask("2:4", 1, 0.5)}
    program = replace(tiny_llama_program, masks=mask)
    analysis = analyse(program)
    with pytest.raises(ModelError) as caught:
        rewrite(program, analysis, random_keep(analysis, "channels", 0))
    assert caught.value.code == "CS2108"


def test_repropagation_changes_nothing_on_a_sound_program(tiny_llama_program: Program) -> None:
    clone = tiny_llama_program.clone()
    before = {n.name: shape_of(n.meta["val"]) for n in clone.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    propagate_fake_tensors(clone, before)


def test_repropagation_names_the_node_that_does_not_fit(tiny_llama_program: Program) -> None:
    clone = tiny_llama_program.clone()
    node = next(n for n in clone.graph.nodes if n.target is torch.ops.aten.linear.default)
    with pytest.raises(CompileSparseError) as caught:
        propagate_fake_tensors(clone, {node.name: [1, 2, 3]})
    assert caught.value.code == "CS2190"
    assert node.name in caught.value.where
    weight = node.args[1]
    assert isinstance(weight, torch.fx.Node)
    node.args = (node.args[0], next(n for n in clone.graph.nodes if n.name.endswith("inv_freq")))
    with pytest.raises(CompileSparseError) as caught:
        propagate_fake_tensors(clone)
    assert node.name in caught.value.where
