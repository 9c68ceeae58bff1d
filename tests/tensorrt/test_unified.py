"""Our checkpoints have ModelOpt's names, types, shapes and configs, and mean exactly what the program computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch import fx

from compile_sparse.backends.checkpoint import modelopt_layout as layout
from compile_sparse.backends.checkpoint.modelopt import write_unified
from compile_sparse.backends.checkpoint.quantized_tensor import dequantized
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.edit import add_weight, op_name
from compile_sparse.compiler.ir.program import CODES, Binding, Program
from compile_sparse.compiler.ir.storage import cast_weights
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.passes.prune_channels import PruneChannels
from compile_sparse.passes.prune_layers import PruneLayers
from compile_sparse.passes.quantize_cache import QuantizeCache
from compile_sparse.testing.oracles import relative_error, tolerance
from tests.tensorrt.modelopt_decoding import decode
from tests.vllm.layouts import IDS, context, gpu, llama, quantized

EPS = torch.finfo(torch.float32).eps
RECORDED: Mapping[str, Any] = json.loads(
    (Path(__file__).parent / "recorded" / "modelopt_0.47.json").read_text(encoding="utf-8")
)["formats"]
SCHEME = {
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
    "W4A16_AWQ": "w4a16",
    "W8A8_SQ_PER_CHANNEL": "w8a8-static",
}
DEPTH = PruneLayers(fraction=0.5, criterion="deepest", compensation="none")


def per_tensor(program: Program, *, together: bool = True) -> Program:
    """A program whose fp8 weights have equal scales in all channels, and (``together``) in all layers."""
    _, coded = dequantized(program)
    peaks = {name: float(tensor.load().abs().max()) for name, tensor in coded.items()}
    changes = {}
    for name, tensor in coded.items():
        scale = (max(peaks.values()) if together else peaks[name]) / 448
        codes = (tensor.load() / scale).to(torch.float8_e4m3fn)
        changes[name + CODES] = ResidentTensor(codes)
        changes[name + ".scale"] = ResidentTensor(torch.full((tensor.shape[0],), scale))
    return replace(program, weights=program.weights.updated(changes))


def made(name: str) -> Program:
    """The program that is written in format ``name``."""
    if name == "plain":
        return cast_weights(llama(), torch.bfloat16)
    if name == "FP8":
        return per_tensor(quantized(llama(), "fp8-static"))
    return quantized(llama(), SCHEME.get(name, "nvfp4"))


def written(program: Program, folder: Path) -> tuple[dict[str, str], list[Diagnostic]]:
    folder.mkdir()
    return write_unified(program, folder, SilentProgress())


def read(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)


def content(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return found


def described(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Any]]:
    return {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in tensors.items()}


def disagreements(program: Program, folder: Path, algorithm: str | None) -> list[str]:
    """Linear layers that mean something else than in the program.

    Two products are rounded on either side (codes times scale; for fp4 by a divisor whose reciprocal is rounded as well).
    """
    tensors = read(folder)
    _, coded = dequantized(program)
    found = []
    for name, tensor in coded.items():
        wanted = tensor.load()
        meant = decode(name.removesuffix(".weight"), tensors, algorithm)
        if not bool(((meant - wanted).abs() <= 4 * EPS * wanted.abs()).all()):
            found.append(name)
    return found


@pytest.mark.parametrize("name", ["plain", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL"])
def test_names_types_shapes_and_configs_are_modelopts(name: str, tmp_path: Path) -> None:
    files, _ = written(made(name), tmp_path / "out")
    recorded = RECORDED[name]
    found = described(read(tmp_path / "out"))
    if (
        name == "W4A16_AWQ"
    ):  # ModelOpt has these where its search found factors; TensorRT-LLM needs them for lone layers
        ones = {key: found.pop(key) for key in list(found) if key.endswith("pre_quant_scale")}
        width = {"o_proj": 256, "down_proj": 384}
        assert {(key.split(".")[-2], *entry[1]) for key, entry in ones.items()} == set(width.items())
        assert all(bool((value == 1).all()) for key, value in read(tmp_path / "out").items() if key in ones)
    assert found == recorded["tensors"]
    config = content(tmp_path / "out", "config.json")
    assert config.get("quantization_config") == recorded["quantization_config"]
    assert config["dtype"] == recorded["dtype"]
    if recorded["hf_quant_config"]:
        assert content(tmp_path / "out", "hf_quant_config.json") == recorded["hf_quant_config"]
    else:
        assert "hf_quant_config.json" not in files


def test_the_decoder_reads_what_modelopt_wrote() -> None:
    """Half a step of each format at the largest value: e4m3 has 3 bits below the leading one, int4 goes to 7, int8 to 127."""
    half_steps = {"plain": 0, "FP8": 2**-4, "FP8_PER_CHANNEL_PER_TOKEN": 2**-4, "W4A16_AWQ": 0.5 / 7}
    for name, recorded in RECORDED.items():
        assert recorded["error"] <= half_steps.get(name, 0.5 / 127) * 1.01, name


def test_nvfp4_is_stored_as_vllms_loader_wants_it(tmp_path: Path) -> None:
    written(made("NVFP4"), tmp_path / "out")
    found, stem = read(tmp_path / "out"), "model.layers.1.mlp.down_proj."
    assert {name.removeprefix(stem): entry for name, entry in described(found).items() if name.startswith(stem)} == {
        "weight": ["uint8", [256, 192]],
        "weight_scale": ["float8_e4m3fn", [256, 24]],
        "weight_scale_2": ["float32", []],
        "input_scale": ["float32", []],
    }
    parts = dequantized(made("NVFP4"))[1]["model.layers.1.mlp.down_proj.weight"].parts
    for ours, theirs in (("input_scale", "input_scale"), ("global_scale", "weight_scale_2")):
        assert float(found[stem + theirs]) * float(parts[ours].load()) == pytest.approx(1, rel=2 * EPS)
    quantization = content(tmp_path / "out", "hf_quant_config.json")["quantization"]
    # vLLM refuses NVFP4 files without these three.
    assert {"group_size", "kv_cache_quant_algo", "exclude_modules"} <= quantization.keys()
    assert (quantization["quant_algo"], quantization["group_size"]) == ("NVFP4", 16)
    joined = [f"model.layers.0.self_attn.{part}_proj.weight_scale_2" for part in "qkv"]
    assert len({float(found[name]) for name in joined}) == 1, "readers keep one for joined layers"


@pytest.mark.parametrize("name", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL", "NVFP4"])
def test_weights_mean_what_they_mean_in_the_program(name: str, tmp_path: Path) -> None:
    program = made(name)
    written(program, tmp_path / "out")
    assert disagreements(program, tmp_path / "out", name) == []


def test_the_scheme_with_one_scale_per_weight_is_written(tmp_path: Path) -> None:
    program = quantized(llama(), "fp8-tensor")
    files, skips = written(program, tmp_path / "out")
    assert files and not [skip for skip in skips if skip.severity == "error"]
    assert described(read(tmp_path / "out")) == RECORDED["FP8"]["tensors"]
    assert disagreements(program, tmp_path / "out", "FP8") == []


def _first_two_exchanged(pack: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda codes: (pack(codes) >> 4) | (pack(codes) << 4)


@pytest.mark.parametrize(
    ("name", "attribute", "mutate"),
    [
        ("W4A16_AWQ", "_rows_packed", _first_two_exchanged),
        ("W4A16_AWQ", "_rows_packed", lambda pack: lambda codes: pack(codes.t()).reshape(codes.shape[0] // 2, -1)),
        ("NVFP4", "_columns_packed", _first_two_exchanged),
        ("FP8", "_one", lambda one: lambda stem, source: one(stem, source) * 1.001),
    ],
)
def test_a_wrong_layout_would_be_noticed(
    name: str, attribute: str, mutate: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = made(name)
    monkeypatch.setattr(layout, attribute, mutate(getattr(layout, attribute)))
    written(program, tmp_path / "out")
    assert len(disagreements(program, tmp_path / "out", name)) == len(dequantized(program)[1])


def logits(program: Program) -> torch.Tensor:
    return Executor(program).run(decoder_inputs(program, torch.tensor(IDS)))["logits"]


def test_transformers_computes_the_program(tmp_path: Path) -> None:
    program, _ = run_passes(llama(), [DEPTH, PruneChannels(fraction=1 / 3, compensation="none")], context())
    program = cast_weights(program, torch.bfloat16)
    files, skips = written(program, tmp_path / "out")
    assert set(files) == {path.name for path in (tmp_path / "out").iterdir()} and not skips
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.config.intermediate_size == 256 and model.config.num_hidden_layers == 1
    with torch.no_grad():
        found = model(torch.tensor(IDS)).logits
    assert relative_error(found, logits(program)) <= tolerance(program)


@pytest.mark.parametrize("name", ["FP8", "W4A16_AWQ"])
def test_transformers_computes_the_decoded_checkpoint(name: str, tmp_path: Path) -> None:
    """Our folder, decoded by ModelOpt's rules and put into the class, gives the program's logits without coded inputs."""
    program = made(name)
    written(program, tmp_path / "out")
    tensors = read(tmp_path / "out")
    described_config = content(tmp_path / "out", "config.json")
    described_config.pop("quantization_config")
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**described_config)).float().eval()
    state = {
        key: decode(key.removesuffix(".weight"), tensors, name)
        if f"{key.removesuffix('.weight')}.weight_scale" in tensors
        else tensors[key].float()
        for key in model.state_dict()
    }
    model.load_state_dict(state)
    plain, _ = dequantized(program)
    with torch.no_grad():
        found = model(torch.tensor(IDS)).logits
    assert relative_error(found, logits(plain)) <= tolerance(plain)


def refused(program: Program, folder: Path, code: str) -> Diagnostic:
    """The one reason; the folder is empty."""
    files, skips = written(program, folder)
    assert files == {} and list(folder.iterdir()) == []
    assert [skip.code for skip in skips] == [code]
    return skips[0]


def test_scales_that_differ_between_channels_are_not_made_one(tmp_path: Path) -> None:
    skip = refused(quantized(llama(), "fp8-static"), tmp_path / "out", "CS4602")
    assert "fp8-tensor" in skip.hint and skip.where.endswith("_proj")


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16-g32", "w4a16-channel", "w4a16-asym", "fp8-block"])
def test_schemes_that_modelopt_does_not_have(scheme: str, tmp_path: Path) -> None:
    assert refused(quantized(llama(), scheme), tmp_path / "out", "CS4602").hint


def test_joined_layers_of_different_scale_are_reported(tmp_path: Path) -> None:
    files, skips = written(per_tensor(quantized(llama(), "fp8-static"), together=False), tmp_path / "out")
    assert files and [skip.code for skip in skips] == ["CS2362"]
    assert skips[0].severity == "warning"
    assert written(made("FP8"), tmp_path / "same")[1] == []


@pytest.mark.parametrize(
    ("name", "codes"), [("W4A16_AWQ", ["CS2361"]), ("W8A8_SQ_PER_CHANNEL", ["CS2361"]), ("NVFP4", [])]
)
def test_formats_that_few_readers_have_are_said(name: str, codes: list[str], tmp_path: Path) -> None:
    assert [skip.code for skip in written(made(name), tmp_path / "out")[1]] == codes


def dequantizing_node(program: Program, module: str) -> fx.Node:
    """The node that gives the first weight whose name has ``module`` in it."""
    nodes = [node for node in program.graph.nodes if op_name(node) == "dequantize_weight"]
    return next(node for node in nodes if module in str(program.tensor_of(node.args[0])))


def with_coded_output(program: Program) -> Program:
    """The program with the output of one down projection coded, as sparse int8 engines want it."""
    edited = program.clone()
    weight = dequantizing_node(edited, "down_proj")
    node = next(iter(weight.users))
    bindings = dict(edited.bindings)
    source = ResidentTensor(torch.tensor([0.1]))
    scale = add_weight(edited, bindings, "output_scale", Binding("output_scale", "buffer"), source)
    users = list(node.users)
    with edited.graph.inserting_after(node):
        coded = edited.graph.call_function(torch.ops.compile_sparse.fake_quantize.default, (node, "int8-static", scale))
    coded.meta["val"] = node.meta["val"]
    for user in users:
        user.replace_input_with(node, coded)
    return replace(edited, bindings=bindings, weights=edited.weights.updated({"output_scale": source}))


def test_coded_outputs_and_caches_have_no_place(tmp_path: Path) -> None:
    skip = refused(with_coded_output(made("W8A8_SQ_PER_CHANNEL")), tmp_path / "out", "CS4603")
    assert "goes into add" in skip.why
    target = gpu().model_copy(update={"cache_formats": {"fp8": "somehow"}})
    cached = QuantizeCache().run(llama(), context(target)).program
    assert "cache" in refused(cached, tmp_path / "cache", "CS4603").why


def test_joined_layers_are_coded_together_or_not_at_all(tmp_path: Path) -> None:
    program = made("FP8_PER_CHANNEL_PER_TOKEN")
    edited = program.clone()
    _, coded = dequantized(program)
    node = dequantizing_node(edited, "k_proj")
    name = str(edited.tensor_of(node.args[0])).removesuffix(CODES)
    bindings, source = dict(edited.bindings), ResidentTensor(coded[name].load())
    linear = next(iter(node.users))
    linear.replace_input_with(node, add_weight(edited, bindings, "plain_k", Binding(name), source))
    linear.replace_input_with(linear.args[0], linear.args[0].args[0])
    edited.graph.erase_node(node)
    mixed = replace(edited, bindings=bindings, weights=edited.weights.updated({name: source}))
    assert "one matrix of both" in refused(mixed, tmp_path / "out", "CS4605").why


def test_layers_of_different_size_are_refused(tmp_path: Path) -> None:
    uneven = PruneChannels(fraction=1 / 3, allocation="global", compensation="none")
    target = gpu().model_copy(update={"alignment": 1})
    program, _ = run_passes(llama(), [uneven], context(target))
    assert refused(cast_weights(program, torch.bfloat16), tmp_path / "out", "CS4206").hint


def test_encoders_are_not_written(tiny_bert_program: Program, tmp_path: Path) -> None:
    refused(tiny_bert_program, tmp_path / "out", "CS4601")


def test_removed_layers_leave_no_names_behind(tmp_path: Path) -> None:
    shorter, _ = run_passes(llama(), [DEPTH], context())
    files, skips = written(quantized(shorter, "fp8"), tmp_path / "out")
    assert files and not skips
    assert not [name for name in read(tmp_path / "out") if ".layers.1." in name]
    excluded = content(tmp_path / "out", "hf_quant_config.json")["quantization"]["exclude_modules"]
    assert excluded == ["lm_head", "model.embed_tokens"]
