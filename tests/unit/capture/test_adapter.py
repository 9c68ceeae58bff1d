"""LoRA adapter folders: merged into their base exactly as the formula says, or refused with what is in the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.capture.stored import stored_tensors
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.verify.class_outputs import class_arguments, program_inputs
from compile_sparse.testing.models import build_model

PREFIX = "base_model.model."
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("base") / name
            build_model(name).save_pretrained(made[name])
        return made[name]

    return base


def low_rank(path: str, weight: torch.Tensor, rank: int = 4, *, transposed: bool = False) -> Tensors:
    """Both parts for a weight ``[out, in]``; ``transposed``: it is stored ``[in, out]``."""
    out, into = reversed(weight.shape) if transposed else weight.shape
    draw = torch.Generator().manual_seed(len(path))
    down, up = torch.randn(rank, into, generator=draw), torch.randn(out, rank, generator=draw)
    return {f"{PREFIX}{path}.lora_A.weight": down, f"{PREFIX}{path}.lora_B.weight": up}


def write(folder: Path, base: Path | str, tensors: Tensors, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none", "use_dora": False}
    config |= {"base_model_name_or_path": str(base), "target_modules": ["q_proj"], "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return folder


def merged(folder: Path) -> Tensors:
    return {name: source.load() for name, source in stored_tensors(open_folder(folder), torch.float32).items()}


def delta(tensors: Tensors, path: str, scale: float) -> torch.Tensor:
    return tensors[f"{PREFIX}{path}.lora_B.weight"] @ tensors[f"{PREFIX}{path}.lora_A.weight"] * scale


@pytest.mark.parametrize(
    ("settings", "ranks", "scales"),
    [
        ({}, (4, 4), (2.0, 2.0)),
        ({"use_rslora": True}, (4, 4), (4.0, 4.0)),
        ({"rank_pattern": {"down_proj": 2}, "use_rslora": True}, (4, 2), (4.0, 8 / math.sqrt(2))),
        ({"alpha_pattern": {r"layers\.1\.mlp\.down_proj": 16, "proj": 1}}, (4, 4), (2.0, 4.0)),
        ({"fan_in_fan_out": True}, (4, 4), (2.0, 2.0)),  # peft goes by the layer's class too
    ],
)
def test_low_rank_changes_are_added(
    base_of: Callable[[str], Path], tmp_path: Path, settings: dict[str, Any], ranks: Any, scales: Any
) -> None:
    base = base_of("llama")
    before = load_file(base / "model.safetensors")
    tensors = low_rank(Q, before[f"{Q}.weight"], ranks[0]) | low_rank(DOWN, before[f"{DOWN}.weight"], ranks[1])
    after = merged(write(tmp_path, base, tensors, **settings))
    expected = {
        path: before[f"{path}.weight"] + delta(tensors, path, s) for path, s in zip((Q, DOWN), scales, strict=True)
    }
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, expected.get(name.removesuffix(".weight"), before[name])), name


def test_the_program_computes_what_transformers_does_with_the_merged_weights(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of("llama")
    before = load_file(base / "model.safetensors")
    tensors = low_rank(Q, before[f"{Q}.weight"])
    opened = open_folder(write(tmp_path / "adapter", base, tensors))
    program = capture(opened)
    model = hf.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    inputs = program_inputs(program)
    with torch.no_grad():
        dense = model(**class_arguments(program, inputs)).logits
        model.get_parameter(f"{Q}.weight").add_(delta(tensors, Q, 2.0))
        right = model(**class_arguments(program, inputs)).logits
    found = Executor(program).run(inputs)["logits"]
    assert torch.allclose(found, right, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dense, right, rtol=1e-2, atol=1e-2)
    assert opened.name == "adapter"
    assert opened.digest() != open_folder(base).digest()


def test_a_layer_that_stores_its_weight_transposed_gets_a_transposed_change(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base, path = base_of("gpt2"), "transformer.h.0.attn.c_proj"
    before = load_file(base / "model.safetensors")
    tensors = low_rank(path, before[f"{path}.weight"], transposed=True)
    after = merged(write(tmp_path, base, tensors, fan_in_fan_out=True))
    assert torch.equal(after[f"{path}.weight"], before[f"{path}.weight"] + delta(tensors, path, 2.0).t())


def test_an_embedding_and_a_head_trained_whole(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base, path = base_of("llama"), "model.embed_tokens"
    before = load_file(base / "model.safetensors")
    rows, width = before[f"{path}.weight"].shape
    down, up = torch.randn(4, rows), torch.randn(width, 4)
    head = torch.randn(before["lm_head.weight"].shape)
    tensors = {f"{PREFIX}{path}.lora_embedding_A": down, f"{PREFIX}{path}.lora_embedding_B": up}
    tensors[f"{PREFIX}lm_head.weight"] = head
    after = merged(write(tmp_path, base, tensors, modules_to_save=["lm_head"]))
    assert torch.allclose(after[f"{path}.weight"], before[f"{path}.weight"] + 2.0 * (up @ down).t(), atol=1e-5)
    assert torch.equal(after["lm_head.weight"], head)


def test_a_head_trained_whole_is_no_longer_the_embedding(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base = base_of("llama_tied")
    shape = load_file(base / "model.safetensors")["model.embed_tokens.weight"].shape
    program = capture(open_folder(write(tmp_path, base, {f"{PREFIX}lm_head.weight": torch.randn(shape)})))
    assert program.aliases == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"some_new_idea": 3}, "some_new_idea"),
        ({"r": 8}, "rank"),
    ],
)
def test_anything_but_plain_lora_is_refused_by_name(
    base_of: Callable[[str], Path], tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    base = base_of("llama")
    tensors = low_rank(Q, load_file(base / "model.safetensors")[f"{Q}.weight"])
    with pytest.raises(ModelError) as caught:
        merged(write(tmp_path, base, tensors, **settings))
    assert (caught.value.code, caught.value.exit_code) == ("CS2015", 4)
    assert said in f"{caught.value.where} {caught.value.why}"


@pytest.mark.parametrize("name", ["model.layers.9.self_attn.q_proj", "model.norm", "model.layers.0.self_attn.k_proj"])
def test_an_adapter_of_another_model_is_refused(base_of: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    base = base_of("llama")
    tensors = low_rank(name, load_file(base / "model.safetensors")[f"{Q}.weight"])
    with pytest.raises(ModelError) as caught:
        merged(write(tmp_path, base, tensors))
    assert caught.value.code == "CS2015"
    assert name in caught.value.where


@pytest.mark.parametrize("part", ["lora_magnitude_vector", "lora_A.bias", "base_layer.weight"])
def test_tensors_that_plain_lora_does_not_have_are_refused(
    base_of: Callable[[str], Path], tmp_path: Path, part: str
) -> None:
    base = base_of("llama")
    tensors = low_rank(Q, load_file(base / "model.safetensors")[f"{Q}.weight"])
    with pytest.raises(ModelError, match="CS2015"):
        merged(write(tmp_path, base, {**tensors, f"{PREFIX}{Q}.{part}": torch.ones(4)}))


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_folder(folder)
    assert caught.value.code == "CS2015"
    return f"{caught.value.what} {caught.value.why}"


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    said = refused(write(tmp_path, "/nowhere/llama", {"x": torch.ones(1)}))
    assert "adapter" in said
    assert "'/nowhere/llama'" in said


def test_an_adapter_without_a_base_or_in_a_pickle_or_beside_a_model(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = write(tmp_path, base_of("llama"), {"x": torch.ones(1)})
    (folder / "model.safetensors").write_bytes(b"")
    assert "a whole model" in refused(folder)
    (folder / "model.safetensors").unlink()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "pickle" in refused(folder)
    assert "names no base" in refused(write(folder, "", {"x": torch.ones(1)}))
    assert "names no base" in refused(write(folder, folder, {"x": torch.ones(1)}))
    (folder / "adapter_config.json").write_text("[")
    assert "cannot be read" in refused(folder)
