"""What a folder for vLLM holds, tensor by tensor, without vLLM: cache scales, mixtures of formats, experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from compile_sparse.backends.vllm.checkpoint import write
from compile_sparse.backends.vllm.sparse24 import LastCompressed, SparseTensor
from compile_sparse.backends.vllm.sparse24_layout import expand_24
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext
from compile_sparse.compiler.extension.run_settings import RunSettings
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import cast_weights
from compile_sparse.compiler.ir.weights import DerivedTensor
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.passes.mask import Sparsify
from compile_sparse.passes.prune_layers import PruneLayers
from compile_sparse.passes.quantize import Quantize
from compile_sparse.passes.quantize_cache import QuantizeCache

TARGET = find_target("vllm-cpu")
WINDOWS = tuple(tuple((7 * i + 3 * j) % 90 + 3 for j in range(16)) for i in range(4))
Captured = Callable[[str], Program]


def written(program: Program, passes: list[Pass], out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of the folder, and nothing else."""
    context = PassContext(TARGET, SilentProgress(), calibration=CalibrationStream(WINDOWS))
    for step in passes:
        program = step.run(program, context).program
    write(cast_weights(program, torch.bfloat16), TARGET, out, SilentProgress())
    with safe_open(out / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return json.loads((out / "config.json").read_text()), tensors


def ranges(program: Program, role: str) -> list[float]:
    """Largest magnitude of what each layer appends to its cache, on the windows."""
    from compile_sparse.compiler.execution.executor import Executor, decoder_inputs

    found = Executor(program).run(decoder_inputs(program, torch.tensor(WINDOWS)))
    return [float(found[o.name].abs().max()) for o in program.outputs if o.role == role]


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_scales_of_keys_and_values_lie_beside_their_projections(captured: Captured, name: str, tmp_path: Path) -> None:
    """In Phi-3 one weight makes query, key and value: two scales lie beside it."""
    program = captured(name)
    config, tensors = written(program, [QuantizeCache()], tmp_path)
    for kind, role in (("k_scale", "present_key"), ("v_scale", "present_value")):
        stored = [tensors[f"model.layers.{layer}.self_attn.{kind}"] for layer in range(2)]
        assert all(scale.shape == (1,) and scale.dtype == torch.float32 for scale in stored)
        expected = [peak / 448 for peak in ranges(program, role)]
        # The first layer does not depend on other caches; the second sees quantized ones.
        assert float(stored[0]) == pytest.approx(expected[0], rel=1e-5)
        assert float(stored[1]) == pytest.approx(expected[1], rel=0.2)
    assert config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    assert config["quantization_config"]["config_groups"] == {}
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_scales_follow_renumbered_layers_and_live_with_codes(captured: Captured, tmp_path: Path) -> None:
    passes: list[Pass] = [PruneLayers(fraction=0.5, criterion="deepest", compensation="none"), Quantize(scheme="w8a8")]
    config, tensors = written(captured("llama"), [*passes, QuantizeCache()], tmp_path)
    assert config["num_hidden_layers"] == 1
    assert {name for name in tensors if "k_scale" in name or "v_scale" in name} == {
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.self_attn.v_scale",
    }
    assert config["quantization_config"]["format"] == "int-quantized"
    assert "kv_cache_scheme" in config["quantization_config"]


def test_a_cache_whose_scales_vllm_would_not_find_is_refused(captured: Captured, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="CS4304") as caught:
        written(captured("gpt2"), [QuantizeCache()], tmp_path)
    assert "self_attn" in caught.value.why


def test_zeros_beside_cache_scales_are_stored_as_they_are(captured: Captured, tmp_path: Path) -> None:
    """vLLM takes one format per checkpoint: the scales need compressed-tensors, so the zeros stay in dense weights."""
    config, tensors = written(captured("llama"), [Sparsify(pattern="2:4"), QuantizeCache()], tmp_path)
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    assert float((weight == 0).float().mean()) == pytest.approx(0.5)
    assert not any("weight_values" in name for name in tensors)


def test_experts_are_stored_in_the_targets_precision(captured: Captured, tmp_path: Path) -> None:
    """transformers takes stacked experts apart when it writes; what it makes is stored like the rest."""
    _, tensors = written(captured("mixtral"), [], tmp_path)
    assert any("experts" in name for name in tensors)
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}


def test_sparse_weights_that_gpus_cannot_share_are_refused(captured: Captured, tmp_path: Path) -> None:
    program = Sparsify(pattern="2:4").run(captured("llama"), PassContext(TARGET, SilentProgress())).program
    goal = TARGET.model_copy(update={"device": "cuda"})
    with pytest.raises(Refusal, match="CS4308") as caught:  # 88 channels: 22 inputs of the down projection per GPU
        write(cast_weights(program, torch.bfloat16), goal, tmp_path, SilentProgress(), RunSettings(tensor_parallel=4))
    assert "88 inputs are no multiple of 32" in caught.value.why


def test_a_sparse_weight_is_read_and_compressed_once() -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0, 3.0, 4.0, 0.0, 0.0, 0.0]])
    loads = []
    source = DerivedTensor((1, 8), torch.float32, lambda: loads.append(None) or dense)
    parts = SparseTensor(source).encoded("layer", torch.float32, LastCompressed())
    values, indices = (parts[f"layer.weight_{name}"].load() for name in ("values", "indices"))
    assert torch.equal(expand_24(values, indices), dense)
    assert len(loads) == 1
