"""Sizes that are left can be split over the target's GPUs, in parts as aligned as the whole is on one."""

from __future__ import annotations

from typing import Any

import pytest

from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.extension.run_settings import RunSettings
from compile_sparse.compiler.ir.program import Program
from compile_sparse.passes.prune_channels import PruneChannels
from compile_sparse.passes.prune_heads import PruneHeads
from tests.support.contexts import context as any_context

HEAD = 8  # elements; the tiny Llama has 8 query heads, 4 key heads and 88 channels


def context(gpus: int, alignment: int = 1, **options: Any) -> PassContext:
    changes = {"alignment": alignment, "device": "cuda"}
    return any_context(changes=changes, settings=RunSettings(tensor_parallel=gpus), **options)


def channels(program: Program) -> set[int]:
    return {program.weights[f"model.layers.{i}.mlp.down_proj.weight"].shape[1] for i in range(2)}


def heads(program: Program) -> set[tuple[int, int]]:
    """Query and key heads of every layer."""
    name = "model.layers.{}.self_attn.{}_proj.weight"
    return {tuple(program.weights[name.format(i, part)].shape[0] // HEAD for part in "qk") for i in range(2)}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("gpus", "alignment", "fraction", "left"),
    [
        (1, 8, 0.4, 56),  # 52.8 wanted
        (2, 8, 0.4, 48),  # multiples of 16
        (4, 8, 0.4, 64),  # of 32
        (4, 1, 0.4, 52),  # of 4
        (3, 1, 0.4, 54),  # of 3
    ],
)
def test_channels_are_multiples_of_the_alignment_on_every_gpu(
    tiny_llama_program: Program, gpus: int, alignment: int, fraction: float, left: int
) -> None:
    result = PruneChannels(fraction=fraction).run(tiny_llama_program, context(gpus, alignment))
    assert left % (gpus * alignment) == 0
    assert channels(result.program) == {left}


@pytest.mark.parametrize(("gpus", "left"), [(1, 80), (2, 64)])
def test_every_gpu_holds_whole_groups_of_a_later_quantization(
    tiny_llama_program: Program, gpus: int, left: int
) -> None:
    """74.8 of 88 channels are wanted, in groups of 16: 5 groups on one GPU, 2 on each of two."""
    result = PruneChannels(fraction=0.15).run(tiny_llama_program, context(gpus, contraction_multiple=16))
    assert channels(result.program) == {left}


def test_channels_that_cannot_be_split_are_refused(tiny_llama_program: Program) -> None:
    with pytest.raises(ModelError) as caught:
        PruneChannels(fraction=0.25).run(tiny_llama_program, context(4, 32))
    assert caught.value.code == "CS2105"
    assert "no multiple of 128 is below 88" in caught.value.why


@pytest.mark.parametrize(("gpus", "left"), [(1, 3), (2, 2)])
def test_key_heads_can_be_dealt_out(tiny_llama_program: Program, gpus: int, left: int) -> None:
    """Three of four are wanted; two GPUs take two or none."""
    result = PruneHeads(fraction=0.25).run(tiny_llama_program, context(gpus))
    assert heads(result.program) == {(2 * left, left)}


def test_key_heads_that_cannot_be_dealt_out_are_refused(tiny_llama_program: Program) -> None:
    with pytest.raises(ModelError) as caught:
        PruneHeads(fraction=0.25).run(tiny_llama_program, context(4))
    assert caught.value.code == "CS2105"
    assert "on each of 4 GPUs" in caught.value.why
    assert "no multiple of 4 is below 4" in caught.value.why
    assert "fewer GPUs" in (caught.value.hint or "")


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_query_heads_are_counted_over_all_key_heads(tiny_llama_program: Program, gpus: int) -> None:
    """One of the two query heads of each of four key heads goes: four are left, which two and four GPUs share alike."""
    result = PruneHeads(fraction=0.5, unit="query").run(tiny_llama_program, context(gpus))
    assert heads(result.program) == {(4, 4)}


def test_query_heads_that_cannot_be_dealt_out_are_refused(tiny_llama_program: Program) -> None:
    """Four are left at most, and eight GPUs have none of half a head."""
    with pytest.raises(ModelError) as caught:
        PruneHeads(fraction=0.5, unit="query").run(tiny_llama_program, context(8))
    assert caught.value.code == "CS2105"
