"""Structural pruning that cannot be done, as people ask for it: exit 4, the numbers, nothing written. And one that can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from compile_sparse.compiler.capture import ModelFolder, capture
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.pipeline import compilation
from compile_sparse.compiler.planning import plan
from tests.shell import shell

LAYERS, HIDDEN, MLP, HEADS, HEAD = 2, 8, 24, 2, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama whose two heads of four can only go together on a target aligned to eight."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=32,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_capture() -> Iterator[None]:
    """Programs are values, and capturing is the slow part."""
    known: dict[Path, Program] = {}

    def remembered(folder: ModelFolder, **options: Any) -> Program:
        if folder.path not in known:
            known[folder.path] = capture(folder, **options | {"require_weights": True})
        return known[folder.path]

    with pytest.MonkeyPatch.context() as patch:
        for module in (compilation, plan):
            patch.setattr(module, "capture", remembered)
        yield


REFUSED = [
    pytest.param(
        "ort-cpu", ("--prune", "channels=0.25"), "CS2105",
        ("24 positions", "alignment is 32", "no multiple of 32 is below 24"), id="no-aligned-width",
    ),
    pytest.param(
        "null", ("--prune", "width=0.5"), "CS2105", ("8 positions", "no multiple of 8 is below 8"), id="no-aligned-hidden",
    ),
    pytest.param(
        "null", ("--prune", "heads=0.5"), "CS2105",
        ("2 positions (4 elements each)", "multiples of 2", "no multiple of 2 is below 2"), id="heads-only-together",
    ),
    pytest.param(
        "null", ("--recipe", "query.yaml"), "CS2104", ("no attention heads that can be grouped",), id="heads-without-groups",
    ),
    pytest.param(
        "null", ("--prune", "layers=0.9", "--criterion", "deepest"), "CS2113",
        ("removes all blocks", "0.9 of 2 blocks is 1.8", "Ask for 0.5 or less"), id="every-layer",
    ),
    pytest.param(
        "null", ("--prune", "layers=0.1", "--criterion", "deepest"), "CS2112",
        ("0.1 of 2 blocks is 0.2", "which removes 1 of 2"), id="less-than-a-layer",
    ),
    pytest.param("null", ("--prune", "experts=0.5"), "CS2104", ("no mixture-of-experts layers",), id="no-experts"),
    pytest.param("null", ("--prune", "conv=0.5"), "CS2104", ("no convolutions",), id="no-convolutions"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in a folder of their own, where the recipes lie."""
    monkeypatch.chdir(tmp_path)
    heads = "{prune-heads: {fraction: 0.25, unit: %s}}"
    Path("query.yaml").write_text(f"passes: [{heads % 'query'}]")
    Path("both.yaml").write_text(f"passes: [{heads % 'group'}, {heads % 'query'}]")


def files() -> list[str]:
    return sorted(path.name for path in Path.cwd().iterdir())


@pytest.mark.parametrize(("target", "words", "code", "parts"), REFUSED)
def test_what_cannot_be_pruned_exits_4_with_the_arithmetic(
    model: Path, target: str, words: tuple[str, ...], code: str, parts: tuple[str, ...]
) -> None:
    before = files()
    found = shell(model, "--target", target, *words, "--no-verify", "--out", "out")
    assert (found.code, found.data["error"]["code"]) == (4, code), found.errors
    for part in parts:
        assert part in found.errors, part
    assert files() == before

    planned = shell("explain", model, "--target", target, *words)
    (refusal,) = planned.data["refusals"]
    assert (planned.code, refusal["code"]) == (4, code)
    for part in parts:
        assert part in f"{refusal['why']} {refusal['hint']}", part
    assert planned.data["parameters"]["compiled"] == planned.data["parameters"]["baseline"]
    assert files() == before


@pytest.mark.parametrize("command", ["compile", "explain"])
def test_contradicting_kinds_exit_4_with_the_arithmetic(model: Path, command: str) -> None:
    before = files()
    found = shell(command, model, "--target", "null", "--recipe", "both.yaml")
    assert (found.code, found.data["error"]["code"]) == (4, "CS4105")
    for part in ("unit: group", "unit: query", "1 - 0.75 x 0.75 = 0.4375 in all, not 0.5", "fraction 0.4375, or 0.5"):
        assert part in found.errors, part
    assert files() == before


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (("--prune", "channels=0.5", "--criterion", "deepest"), "CS1007", ("prune-channels accepts: obs, magnitude",)),
        (("--prune", "layers=0.5", "--allocation", "global"), "CS1006", ("prune-layers: no such option",)),
        (("--prune", "layers=0.5", "--criterion", "ablation"), "CS1121", ("criterion: deepest",)),
    ],
)
def test_options_that_do_not_fit_the_passes_exit_2(
    model: Path, words: tuple[str, ...], code: str, parts: tuple[str, ...]
) -> None:
    before = files()
    found = shell(model, "--target", "null", *words, "--no-verify")
    assert (found.code, found.data["error"]["code"]) == (2, code)
    for part in parts:
        assert part in found.errors, part
    assert files() == before


def test_the_plan_of_uniform_channels_is_what_the_artifact_has(model: Path) -> None:
    words = (model, "--target", "null", "--prune", "channels=0.25")
    planned = shell("explain", *words).data
    made = shell(*words, "--no-verify", "--out", "out").data
    removed = LAYERS * 3 * HIDDEN * 8  # 24 channels become 16, in three matrices
    assert planned["parameters"] == made["model"]["parameters"]
    assert planned["parameters"]["baseline"] - planned["parameters"]["compiled"] == removed
    (channels,) = (group for group in planned["groups"] if group["kind"] == "channels")
    assert (channels["count"], channels["size"], channels["parameters"]) == (LAYERS, MLP, LAYERS * 3 * HIDDEN * MLP)
    decode = planned["gain"]["decode"]
    assert decode["baseline"] - decode["compiled"] == 4 * removed
    assert decode["at_most"] == pytest.approx(decode["baseline"] / decode["compiled"])


def test_a_plan_says_that_global_sizes_are_not_known(model: Path) -> None:
    words = ("explain", model, "--target", "null", "--prune", "channels=0.25")
    equal, ranked = (shell(*words, "--allocation", kind).data for kind in ("uniform", "global"))
    assert ranked["parameters"] == equal["parameters"]
    ((note,),) = (section["notes"] for section in ranked["passes"])
    assert "which a plan does not read; equal sizes are shown" in note
    assert not any("equal sizes are shown" in note for section in equal["passes"] for note in section["notes"])
