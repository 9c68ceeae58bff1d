"""Every kind of model in every format its target has: parsed and built by TensorRT-RTX, and the same file run by ONNX Runtime.

Tolerance of the comparison with the program, which runs in torch in float32 on the same stored (16-bit) weights: every value
passes through about ``STEPS`` roundings to fp16 (unit roundoff 2^-11), whose errors add up like a random walk; with a factor of 4
for the largest of thousands of elements the bound is ``4 * sqrt(STEPS) * 2^-11`` of the outputs' spread. Coded activations
amplify that, because a value on the border of two codes may fall to the other one, up to where the two roundings have nothing in
common: the mean difference is held to sqrt(2) times what coding does to the program. That is loose, so the same forms are also
emitted in float32, where they must equal the program.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as hf

from compile_sparse.backends.tensorrt.backend import TensorRtBackend
from compile_sparse.backends.tensorrt.description import read_description
from compile_sparse.backends.tensorrt.run.reference_session import ReferenceRuntime
from compile_sparse.backends.tensorrt.sparsity.sparse_gate import check_sparsity
from compile_sparse.compiler.capture import capture_model
from compile_sparse.compiler.errors import ModelError, Refusal
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.float_activations import with_float_activations
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.compiler.verify.reference import sample_inputs
from compile_sparse.passes.quantize import Quantize
from tests.support.served_models import WIDE
from tests.tensorrt.conftest import Folder, FolderOf, ProgramOf, passed, settings_for

ROUNDOFF, STEPS = 2.0**-11, 64  # two layers: some thirty values one after the other, and as many in the cache
PROMPT, GENERATED = 8, 16


def _outputs(folder: Folder) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The program's output and the file's: of a whole sequence, and of a prompt followed by single tokens."""
    program, session = folder.program, ReferenceRuntime(folder.path, 1)
    if program.kind != "decoder":
        inputs = sample_inputs(program, 0, batch=2, length=32)
        expected = Executor(program).run({name: torch.from_numpy(value) for name, value in inputs.items()})
        found = session.run(inputs)
        return next(iter(expected.values())).numpy(), next(iter(found.values()))
    ids = torch.randint(3, WIDE.vocabulary, (2, PROMPT + GENERATED), generator=torch.Generator().manual_seed(0))
    expected = Executor(program).run(decoder_inputs(program, ids))["logits"].numpy()
    generation = session.generation(2, ids.shape[1])
    steps = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)]
    found = np.concatenate([generation.step(step.numpy()) for step in steps], axis=1)
    return expected, found.astype(np.float32)


def _spread(values: np.ndarray[Any, Any]) -> float:
    return float(values.std())


@pytest.mark.parametrize("name", [*WIDE.decoders, *WIDE.others])
def test_the_file_computes_the_program(folder_of: FolderOf, name: str) -> None:
    folder = folder_of(name)
    assert "parsed and built" in folder.lowered.form["engine"]
    expected, found = _outputs(folder)
    assert np.abs(found - expected).max() <= 4 * STEPS**0.5 * ROUNDOFF * _spread(expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "resnet"])
def test_bf16(folder_of: FolderOf, name: str) -> None:
    """ONNX Runtime has no such kernels on processors: it runs the graph with float32 in the place of bfloat16. What is left are
    constants that the program has in float32 (angles, batch norms): one rounding each, unit roundoff 2^-9, in each of two layers.
    """
    folder = folder_of(name, precision="bf16")
    assert "parsed and built" in folder.lowered.form["engine"]
    model = onnx.load(folder.path / "model.onnx", load_external_data=False)
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in kinds
    assert onnx.TensorProto.FLOAT16 not in kinds
    expected, found = _outputs(folder)
    assert np.abs(found - expected).max() <= 4 * 2**0.5 * 2.0**-9 * _spread(expected)


@pytest.mark.parametrize(
    ("name", "scheme"), list(itertools.product(["llama", "qwen2", "gpt2", "bert", "vit"], ["w8a8-static", "w4a16"]))
)
def test_quantized_files_compute_the_program(folder_of: FolderOf, name: str, scheme: str) -> None:
    folder = folder_of(name, scheme=scheme)
    assert "parsed and built" in folder.lowered.form["engine"]
    _require_close(folder, coded=scheme == "w8a8-static")


def _require_close(folder: Folder, *, coded: bool) -> None:
    """Within rounding; with coded activations see above."""
    expected, found = _outputs(folder)
    difference = np.abs(found - expected)
    if not coded:
        assert difference.max() <= 4 * STEPS**0.5 * ROUNDOFF * _spread(expected)
        return
    plain = Folder(folder.path, folder.lowered, with_float_activations(folder.program))
    effect = np.abs(_program_output(plain) - expected).mean()
    assert effect > 0, "the model shows what coding does"
    assert difference.mean() <= 2**0.5 * effect + STEPS**0.5 * ROUNDOFF * _spread(expected)


def _program_output(folder: Folder) -> np.ndarray[Any, Any]:
    program = folder.program
    if program.kind != "decoder":
        inputs = sample_inputs(program, 0, batch=2, length=32)
        return next(iter(Executor(program).run({k: torch.from_numpy(v) for k, v in inputs.items()}).values())).numpy()
    ids = torch.randint(3, WIDE.vocabulary, (2, PROMPT + GENERATED), generator=torch.Generator().manual_seed(0))
    return Executor(program).run(decoder_inputs(program, ids))["logits"].numpy()


@pytest.mark.parametrize(
    ("name", "target", "scheme", "sparsity"),
    [
        ("llama", "trt-l4", "w8a8-static", "2:4"),
        ("llama", "trt-l4", "fp8-static", ""),
        ("gpt2", "trt-l4", "fp8-tensor", ""),
        ("gpt2", "trt-l4", "w8a8-static", ""),
        ("bert", "trt-l4", "w4a16", "2:4"),
        ("gpt2", "trt-l4", "w4a16-g32", ""),
    ],
)
def test_codes_and_scales_are_exact(
    program_of: ProgramOf, tmp_path: Path, name: str, target: str, scheme: str, sparsity: str
) -> None:
    """In float32 nothing is left but the order of sums: 1e-4 of the spread for most values. A value that the order of sums moves
    over the border of two codes shows in what reads it, hence the median.
    """
    goal = find_target(target)
    exact = replace(settings_for(goal, engine="none"), precision="fp32")
    program = passed(program_of(name), goal, scheme, sparsity, exact)
    folder = Folder(tmp_path, TensorRtBackend().lower(program, goal, tmp_path, SilentProgress(), exact), program)
    expected, found = _outputs(folder)
    assert np.median(np.abs(found - expected)) <= 1e-4 * _spread(expected)


def test_a_network_without_anything_to_quantize_is_refused(folder_of: FolderOf) -> None:
    """Convolutions stay as they are, and the only linear layer makes the logits."""
    with pytest.raises(ModelError, match="nothing to quantize") as caught:
        folder_of("resnet", scheme="w8a8-static")
    assert "logits" in caught.value.why


@pytest.mark.parametrize("scheme", ["fp8-static", "fp8-tensor"])
def test_fp8_builds_where_the_gpu_has_it(folder_of: FolderOf, scheme: str) -> None:
    folder = folder_of("llama", "trt-l4", scheme)
    assert "built" in folder.lowered.form["engine"]
    assert "8.9" in folder.lowered.form["engine"]
    _require_close(folder, coded=True)


@pytest.mark.parametrize("target", ["trt-a100", "trt-a10"])
def test_fp8_is_refused_elsewhere(folder_of: FolderOf, target: str) -> None:
    with pytest.raises(Refusal, match="cannot run fp8-tensor") as caught:
        folder_of("llama", target, "fp8-tensor")
    assert caught.value.code == "CS4102"


def test_nvfp4_builds_on_blackwell_only(folder_of: FolderOf) -> None:
    for name in ("llama", "gpt2"):
        folder = folder_of(name, "trt-rtx5090", "nvfp4")
        assert "parsed and built" in folder.lowered.form["engine"]
        assert folder.lowered.form["NVFP4 weights"] > 0
    with pytest.raises(Refusal, match="cannot run nvfp4"):
        folder_of("llama", "trt-l4", "nvfp4")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nvfp4_codes_mean_the_programs_weights(folder_of: FolderOf, name: str) -> None:
    """Nothing here runs these products, so the bytes are decoded by the format's definition: e2m1 times e4m3 times a scale."""
    folder = folder_of(name, "trt-rtx5090", "nvfp4")
    graph = onnx.load(folder.path / "model.onnx").graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    checked = 0
    for node in folder.program.graph.nodes:
        if op_name(node) != "dequantize_nvfp4":
            continue
        codes, scale, divisor, *rest = node.args
        axis = rest[0] if rest else 1
        parts = [folder.program.weights.load(folder.program.tensor_of(part)) for part in (codes, scale, divisor)]
        expected = torch.ops.compile_sparse.dequantize_nvfp4(*parts, axis).numpy()
        expected = expected.T if axis == 1 else expected
        tensor = stored[f"{folder.program.tensor_of(codes)}.inner_first"]
        (reader,) = (n for n in graph.node if tensor.name in n.input)
        raw = np.frombuffer(tensor.raw_data, np.uint8)
        nibbles = np.stack([raw & 15, raw >> 4], 1).reshape(tuple(tensor.dims))
        values = np.where(nibbles < 8, 1, -1) * magnitudes[nibbles & 7]
        blocks, whole = (stored[name] for name in makers[reader.input[1]].input)
        eighths = torch.frombuffer(bytearray(blocks.raw_data), dtype=torch.uint8).view(torch.float8_e4m3fn)
        scales = eighths.float().numpy().reshape(tuple(blocks.dims)) * np.frombuffer(whole.raw_data, np.float32)
        # One more rounding than the program's division: two units of float32.
        np.testing.assert_allclose(values * np.repeat(scales, 16, axis=0), expected, rtol=2.0**-22)
        checked += 1
    assert checked == {"llama": 14, "gpt2": 8}[name]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("llama", ""),
        ("llama", "w8a8-static"),
        ("llama", "w4a16"),
        ("gpt2", "w8a8-static"),
        ("bert", ""),
        ("vit", "w4a16"),
    ],
)
def test_zeros_survive_in_every_intended_layer(folder_of: FolderOf, name: str, scheme: str) -> None:
    folder = folder_of(name, scheme=scheme, sparsity="2:4")
    section = folder.lowered.sparsity
    assert section is not None
    assert section["intended"] == len(section["in_graph"]["layers"]) >= 8
    assert {layer["state"] for layer in section["in_graph"]["layers"]} == {"2:4"}
    assert section["profiles"] is None
    assert "not installed" in section["unverified"] or "no GPU" in section["unverified"]
    intended = {layer["node"] for layer in section["in_graph"]["layers"]}
    rows = {row.node: row for row in check_sparsity(folder.path / "model.onnx")}
    assert all(rows[node].state == "2:4" for node in intended)
    notes = [skip for skip in folder.lowered.diagnostics if skip.code == "CS2371"]
    assert bool(notes) == (scheme == "w4a16"), "int4 has no sparse kernels, and that is said"
    if name == "llama":  # keys and values are 128 wide: too small to pay
        small = [node for node in rows if "k_proj" in node or "v_proj" in node]
        assert len(small) == 4
        assert not intended.intersection(small)
    assert all(row.state != "2:4" for node, row in rows.items() if node not in intended)
    description = read_description(folder.path)
    assert description.sparsity is not None
    assert {entry.node for entry in description.sparsity.intended} == intended


def test_sparse_int8_layers_have_int8_outputs(folder_of: FolderOf) -> None:
    """The kernel is chosen only when the product gives int8: QuantizeLinear must follow it."""
    folder = folder_of("llama", scheme="w8a8-static", sparsity="2:4")
    graph = onnx.load(folder.path / "model.onnx", load_external_data=False).graph
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    description = read_description(folder.path)
    assert description.sparsity is not None
    intended = {entry.node for entry in description.sparsity.intended}
    outputs = [node.output[0] for node in graph.node if node.name in intended]
    assert len(outputs) == 10
    assert all(readers[name] == {"QuantizeLinear"} for name in outputs)
    _require_close(folder, coded=True)


def test_a_lost_zero_stops_the_compilation(program_of: Any, tmp_path: Path) -> None:
    """A pass that fills a masked position is found in the written file, whatever the annotation says."""
    target = find_target("trt-a100")
    program = passed(program_of("llama"), target, "", "2:4")
    name = "model.layers.1.mlp.up_proj.weight"
    value = program.weights.load(name).clone()
    value[7, 4:8] = 1.0
    broken = replace(program, weights=program.weights.updated({name: ResidentTensor(value)}))
    with pytest.raises(Refusal, match=r"up_proj") as caught:
        TensorRtBackend().lower(broken, target, tmp_path, SilentProgress())
    assert caught.value.code == "CS4501"


def test_the_interface_is_described(folder_of: FolderOf) -> None:
    folder = folder_of("llama")
    description = read_description(folder.path)
    shapes = {value.name: (value.dtype, value.shape) for value in (*description.inputs, *description.outputs)}
    assert shapes["input_ids"] == ("int64", ("batch", "sequence"))
    assert shapes["write_indices"] == ("int64", ("batch",))
    assert shapes["past_key_values.0.key"] == ("float16", ("batch", 2, 128, 64)) == shapes["present.0.key"]
    assert description.aliases["present.1.value"] == "past_key_values.1.value"
    assert len(description.aliases) == 4
    prefill, decode = description.profiles
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 128), (8, 128))
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (8, 1))


def test_nodes_are_named_after_modules(folder_of: FolderOf) -> None:
    graph = onnx.load(folder_of("llama").path / "model.onnx", load_external_data=False).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    products = [node.name.split("/")[0] for node in graph.node if node.op_type == "MatMul"]
    assert "model.layers.1.mlp.down_proj" in products
    assert all(products), "every product says where it comes from"
    attention = [node.name for node in graph.node if node.op_type == "Attention"]
    assert all("self_attn" in name for name in attention)


def test_only_attention_without_a_kernel_may_be_decomposed(folder_of: FolderOf) -> None:
    text = json.dumps(
        [str(a) for n in onnx.load(folder_of("llama").path / "model.onnx").graph.node for a in n.attribute]
    )
    assert "TRT_" not in text


def test_layers_that_groups_do_not_divide_stay_in_floating_point() -> None:
    target = find_target("trt-a100")
    program = capture_model(hf_llama(192))
    context = PassContext(target=target, progress=SilentProgress())
    result = Quantize(scheme="w4a16").run(program, context)
    left = [skip for skip in result.diagnostics if skip.code == "CS2209"]
    assert {skip.where.rsplit(".", 2)[1] for skip in left} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
    }
    assert all("192 inputs" in skip.why for skip in left)
    assert result.achieved["linears"] == 1


def hf_llama(width: int) -> hf.PreTrainedModel:
    config = hf.LlamaConfig(
        hidden_size=width, intermediate_size=256, num_hidden_layers=1, num_attention_heads=3, vocab_size=WIDE.vocabulary
    )
    return hf.LlamaForCausalLM(config).eval()
