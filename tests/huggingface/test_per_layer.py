"""``per_layer_config``: an independent loader builds each layer from the file and gets the program's outputs.

transformers' own classes do not build such layers, so the loader below does, from what the file says and nothing else.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from compile_sparse.backends.checkpoint.checkpoint import write_checkpoint
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.residual.branches import find_blocks
from compile_sparse.compiler.residual.remove import drop_branches
from tests.huggingface.emitting import outputs, pruned, tolerance


class Nothing(torch.nn.Module):
    """A branch that adds nothing."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        nothing = torch.zeros_like(hidden_states)
        return nothing if self.parts == 1 else (nothing, None)


def load_layer_by_layer(folder: Path) -> hf.PreTrainedModel:
    """A Llama whose layers have the sizes that the file gives each of them."""
    described = json.loads((folder / "config.json").read_text())
    overrides = described.pop("per_layer_config")
    assert described.pop("allow_global_per_layer_attribute_access") is True
    config = hf.LlamaConfig.from_dict(described)
    model = hf.LlamaForCausalLM(config)
    for number, own in overrides.items():
        layer_config = copy.copy(config)
        for name, value in own.items():
            setattr(layer_config, name, value)
        layer = hf.models.llama.modeling_llama.LlamaDecoderLayer(layer_config, int(number))
        for part in own.get("skip", ()):
            setattr(layer, part, Nothing(2 if part == "self_attn" else 1))
        model.model.layers[int(number)] = layer
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not unexpected
    skipped = {f"model.layers.{int(n)}." for n, own in overrides.items() if own.get("skip")}
    assert all(any(name.startswith(layer) and "norm" in name for layer in skipped) for name in missing), missing
    return model.eval()


def matches(program: Program, folder: Path) -> None:
    expected, found = outputs(program, load_layer_by_layer(folder))
    assert float((expected["logits"] - found["logits"]).abs().max()) <= tolerance(expected["logits"])


def stated(folder: Path) -> dict[str, dict[str, object]]:
    found = json.loads((folder / "config.json").read_text())
    hf.AutoConfig.from_pretrained(folder)  # transformers accepts the file
    return dict(found["per_layer_config"])


def test_channels_of_one_layer(tiny_llama_program: Program, tmp_path: Path) -> None:
    program = pruned(tiny_llama_program, ("channels", 88, 66), only=1)
    written = write_checkpoint(program, tmp_path, SilentProgress(), per_layer=True)
    assert written.per_layer == {1: {"intermediate_size": 66}}
    assert stated(tmp_path) == {"1": {"intermediate_size": 66}}
    matches(program, tmp_path)


def test_heads_that_do_not_divide_the_width(tiny_llama_program: Program, tmp_path: Path) -> None:
    # The config of Llama refuses 6 heads at width 64, as a global value.
    program = pruned(tiny_llama_program, ("heads", 4, 3))
    write_checkpoint(program, tmp_path, SilentProgress(), per_layer=True)
    own = {"num_attention_heads": 6, "num_key_value_heads": 3}
    assert stated(tmp_path) == {"0": own, "1": own}
    matches(program, tmp_path)


@pytest.mark.parametrize(("branch", "name"), [(0, "self_attn"), (1, "mlp")])
def test_a_branch_left_out(branch: int, name: str, tiny_llama_program: Program, tmp_path: Path) -> None:
    program = drop_branches(tiny_llama_program, [find_blocks(tiny_llama_program)[0].branches[branch]]).program
    program = pruned(program, ("width", 64, 48))
    write_checkpoint(program, tmp_path, SilentProgress(), per_layer=True)
    assert stated(tmp_path) == {"0": {"skip": [name]}}
    matches(program, tmp_path)


def test_a_uniform_program_needs_no_overrides(captured: Callable[[str], Program], tmp_path: Path) -> None:
    written = write_checkpoint(
        pruned(captured("llama"), ("channels", 88, 66)), tmp_path, SilentProgress(), per_layer=True
    )
    assert not written.per_layer
    assert "per_layer_config" not in json.loads((tmp_path / "config.json").read_text())
