"""A target whose cache must keep its shape freezes the heads, and only what touches the cache."""

from __future__ import annotations

from compile_sparse.compiler.axes.analysis import Analysis, analyse, changeable_roles
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.targets.target import find_target


def test_a_fixed_cache_freezes_key_value_heads_but_not_channels(tiny_llama_program: Program) -> None:
    free = find_target("ort-cpu")
    fixed = free.model_copy(update={"cache_may_change": False})
    loose = analyse(tiny_llama_program, interface_may_change=changeable_roles(free))
    strict = analyse(tiny_llama_program, interface_may_change=changeable_roles(fixed))

    def of_keys(analysis: Analysis) -> list[Group]:
        return [g for g in analysis.prunable("heads") if any("k_proj" in tensor for tensor, _ in g.members)]

    assert of_keys(loose)
    assert not of_keys(strict)
    assert len(strict.prunable("heads")) < len(loose.prunable("heads"))
    assert len(strict.prunable("channels")) == len(loose.prunable("channels"))
