"""Quantized checkpoints that are not read: each is refused by the name of its method, none as damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.quantization_config import QuantizationMethod

from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.errors import ModelError

CopyOf = Callable[[str], Path]
READ = {"compressed-tensors", "gptq", "awq", "fp8", "mxfp4"}
OTHERS = sorted({method.value for method in QuantizationMethod} - READ)


def describe(folder: Path, file: str = "config.json", **keys: Any) -> Path:
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **keys}))
    return folder


def refused(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        capture(open_folder(folder))
    assert caught.value.exit_code == 4
    assert "damaged" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("method", [*OTHERS, "a-method-of-tomorrow"])
def test_every_other_method_is_named(copy_of: CopyOf, method: str) -> None:
    error = refused(describe(copy_of("bert"), quantization_config={"quant_method": method}))
    assert error.code == "CS2020"
    assert method.replace("-", "").replace("_", "") in error.what.lower().replace("-", "").replace("_", "").replace(
        " ", ""
    )
    assert "dequantize" in error.hint


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "does not name"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}}, "mix settings"),
        ({"quant_method": "awq", "version": "gemv"}, "'gemv'"),
        ({"quant_method": "awq", "bits": 8}, "8 bits"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {}}, "'marlin-24'"),
        ({"config_groups": {}, "format": "mxfp4-pack-quantized"}, "'mxfp4-pack-quantized'"),
        (
            {"config_groups": {}, "format": "dense", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "'sparse-24-bitmask'",
        ),
        ({"config_groups": {}, "format": "dense", "transform_config": {"config_groups": {"R1": {}}}}, "transforms"),
    ],
)
def test_every_other_form_is_named(copy_of: CopyOf, described: dict[str, Any], said: str) -> None:
    error = refused(describe(copy_of("bert"), quantization_config=described))
    assert error.code == "CS2020"
    assert said in error.what


@pytest.mark.parametrize("where", ["compression_config", "text_config"])
def test_it_is_seen_wherever_writers_put_it(copy_of: CopyOf, where: str) -> None:
    found = {"quant_method": "hqq"}
    folder = describe(copy_of("bert"), **{where: found if where != "text_config" else {"quantization_config": found}})
    assert "HQQ" in refused(folder).what


@pytest.mark.parametrize(
    ("file", "keys", "said"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "W4A8_MXFP4_FP8"}}, "W4A8_MXFP4_FP8"),
        ("quantize_config.json", {"bits": 3, "group_size": 128}, "3 bits"),
        ("quant_config.json", {"w_bit": 3, "q_group_size": 128, "zero_point": True}, "3 bits"),
    ],
)
def test_it_is_seen_beside_the_config(copy_of: CopyOf, file: str, keys: dict[str, Any], said: str) -> None:
    assert said in refused(describe(copy_of("bert"), file, **keys)).what


@pytest.mark.parametrize("raw", ["fp8", 7, ["gptq"]])
def test_a_description_that_is_none_is_no_crash(copy_of: CopyOf, raw: Any) -> None:
    assert refused(describe(copy_of("bert"), quantization_config=raw)).code == "CS2021"


@pytest.mark.parametrize(
    "value", ["x", {"quant_method": "gptq", "bits": 5}, {"quant_method": "awq", "group_size": "a"}]
)
def test_a_setting_that_cannot_be_is_named(copy_of: CopyOf, value: Any) -> None:
    assert refused(describe(copy_of("bert"), quantization_config=value)).code == "CS2021"


def test_codes_that_nothing_describes_are_refused(copy_of: CopyOf) -> None:
    folder = copy_of("bert")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors")
    error = refused(folder)
    assert (error.code, error.where) == ("CS2020", name)


def test_a_description_without_codes_is_a_plain_model(copy_of: CopyOf) -> None:
    folder = describe(copy_of("bert"), quantization_config={"quant_method": "gptq", "bits": 4})
    program = capture(open_folder(folder))
    assert "quantization_config" not in program.config
    assert not program.source.said
