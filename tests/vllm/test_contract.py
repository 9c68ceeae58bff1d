"""What vLLM cannot load or runs slowly is said by ``explain``, before anything is compiled: from a config.json alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from compile_sparse.compiler.cli.main import run
from compile_sparse.compiler.planning import plan
from tests.vllm.registered import record

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, type[hf.PretrainedConfig], dict[str, Any]]] = {
    "plain": ("LlamaForCausalLM", hf.LlamaConfig, {}),
    # 6 query heads on 3 key-value heads; 400 = 16 * 25, which neither 32 nor 128 divides.
    "odd": (
        "LlamaForCausalLM",
        hf.LlamaConfig,
        {"hidden_size": 384, "intermediate_size": 400, "num_attention_heads": 6, "num_key_value_heads": 3},
    ),
    # 404 = 4 * 101: no kernel's multiple. Its 64 + 16 + 16 outputs of query, key and value are 96 together.
    "ragged": (
        "LlamaForCausalLM",
        hf.LlamaConfig,
        {"hidden_size": 64, "intermediate_size": 404, "num_key_value_heads": 1},
    ),
    # 32 + 8 + 8 = 48 joined outputs.
    "narrow": (
        "LlamaForCausalLM",
        hf.LlamaConfig,
        {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 1},
    ),
    "gemma2": ("Gemma2ForCausalLM", hf.Gemma2Config, {"num_key_value_heads": 4, "head_dim": 64}),
    "mixtral": ("MixtralForCausalLM", hf.MixtralConfig, {"num_key_value_heads": 4, "num_local_experts": 4}),
    "bert": ("BertModel", hf.BertConfig, {}),
}
Explained = tuple[int, dict[str, Any]]
Explain = Callable[..., Explained]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with the config of a model in ``MODELS`` and nothing else."""

    @cache
    def made(name: str) -> Path:
        architecture, config, sizes = MODELS[name]
        folder = tmp_path_factory.mktemp(name)
        config(**SIZES | sizes, architectures=[architecture]).save_pretrained(folder)
        return folder

    return made


@pytest.fixture(scope="module", autouse=True)
def captured_once() -> Iterator[None]:
    """Capture, the slow part, happens once per model; a program is never changed, so sharing it is sound."""
    programs: dict[Path, Any] = {}
    original = plan.capture

    def capture(folder: Any, **options: Any) -> Any:
        if folder.path not in programs:
            programs[folder.path] = original(folder, **options)
        return programs[folder.path]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "capture", capture)
        yield


@pytest.fixture(autouse=True)
def no_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILE_SPARSE_RUNTIMES", str(tmp_path / "runtimes"))


@pytest.fixture
def explain(folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> Explain:
    """Exit code and plan of one command line."""

    def call(model: str, target: str, *options: str) -> Explained:
        code = run(["explain", str(folder_of(model)), "--target", target, *options, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


def refusals(explained: Explained) -> list[dict[str, str]]:
    """All of them; the exit code says that there are some."""
    code, found = explained
    assert code == (4 if found["refusals"] else 0)
    return found["refusals"]


def refusal(explained: Explained, code: str) -> dict[str, str]:
    """The only one."""
    (found,) = refusals(explained)
    assert found["code"] == code
    return found


def notes(explained: Explained) -> list[dict[str, str]]:
    """What runs, but not as one would wish."""
    assert refusals(explained) == []
    return explained[1]["runtime"]


@pytest.mark.parametrize(
    ("target", "scheme"),
    [
        ("vllm-cpu", "w8a8"),
        ("vllm-cpu", "w4a16"),
        ("vllm-a100", "w8a8-static"),
        ("vllm-a10", "w8a16"),
        ("vllm-l4", "fp8"),
        ("vllm-h100", "w4a16-asym"),
        ("vllm-h200", "fp8-block"),
        ("vllm-b200", "nvfp4"),
    ],
)
def test_sizes_that_fit_are_neither_refused_nor_remarked_on(explain: Explain, target: str, scheme: str) -> None:
    assert notes(explain("plain", target, "--quantize", scheme)) == []


@pytest.mark.parametrize(
    ("target", "scheme", "why", "hint"),
    [
        ("vllm-cpu", "w8a16", "uint8b128", ""),
        ("vllm-cpu", "fp8", "AMX", ""),
        ("vllm-cpu", "nvfp4", "Blackwell", ""),
        ("vllm-a100", "fp8", "weights alone", "w8a8"),
        ("vllm-a10", "fp8-static", "8.9 is the first", "w8a8"),
        ("vllm-l4", "fp8-block", "start at compute capability 9.0", "fp8"),
        ("vllm-h100", "nvfp4", "weights alone", "fp8 or w8a8"),
        ("vllm-b200", "w8a8", "Int8 not supported on SM100", "fp8"),
    ],
)
def test_a_scheme_that_the_hardware_does_not_have_is_refused(
    explain: Explain, target: str, scheme: str, why: str, hint: str
) -> None:
    found = refusal(explain("plain", target, "--quantize", scheme), "CS4102")
    assert why in found["why"]
    assert hint in found["why"]


@pytest.mark.parametrize(("target", "other"), [("vllm-cpu", "w8a8"), ("vllm-h100", "fp8")])
def test_sparsity_2_4_is_refused_with_what_else_there_is(explain: Explain, target: str, other: str) -> None:
    found = refusal(explain("plain", target, "--sparsity", "2:4"), "CS4103")
    assert "removed its 2:4 kernels in 2026" in found["why"]
    for alternative in ("--prune channels", other, "TensorRT"):
        assert alternative in found["hint"]
    assert refusals(explain("plain", target, "--sparsity", "2:4", "--allow-useless")) == []


@pytest.mark.parametrize(
    ("target", "hint"), [("vllm-cpu", "--quantize w8a8,"), ("vllm-b200", "--quantize w4a16-channel or fp8,")]
)
def test_groups_that_do_not_divide(explain: Explain, target: str, hint: str) -> None:
    found = refusals(explain("odd", target, "--quantize", "w4a16"))
    groups = next(diagnostic for diagnostic in found if diagnostic["code"] == "CS4301")
    assert groups["where"].endswith("down_proj.weight")
    assert "400 inputs (3.125 groups)" in groups["why"]
    assert hint in groups["hint"]


def test_blocks_that_do_not_divide(explain: Explain) -> None:
    found = refusals(explain("odd", "vllm-h100", "--quantize", "fp8-block"))
    assert {diagnostic["code"] for diagnostic in found} == {"CS4302"}
    assert any("400x384" in diagnostic["why"] for diagnostic in found)


def test_the_cpu_kernel_takes_multiples_of_32(explain: Explain) -> None:
    found = refusal(explain("odd", "vllm-cpu", "--quantize", "w4a16-channel"), "CS4303")
    assert "multiples of 32; this layer is 384x400" in found["why"]
    assert "w8a8" in found["hint"]
    assert notes(explain("odd", "vllm-cpu", "--quantize", "w8a8")) == []


def test_it_is_the_joined_outputs_that_count(explain: Explain) -> None:
    found = refusal(explain("narrow", "vllm-cpu", "--quantize", "w4a16-g32"), "CS4303")
    assert "48x32 (3 joined)" in found["why"]
    # 64 + 16 + 16 outputs pass although 16 is no multiple of 32; what is refused is the 404 of the other layers.
    found_ragged = refusals(explain("ragged", "vllm-cpu", "--quantize", "w4a16-channel"))
    assert all("q_proj" not in diagnostic["where"] for diagnostic in found_ragged)


def test_codes_that_do_not_fill_an_integer(explain: Explain) -> None:
    found = refusal(explain("ragged", "vllm-b200", "--quantize", "w4a16-channel"), "CS4303")
    assert "packed 8 to an integer" in found["why"]
    assert "64x404" in found["why"]
    assert "--quantize fp8" in found["hint"]


@pytest.mark.parametrize(
    ("model", "target", "scheme", "parts"),
    [
        ("odd", "vllm-h100", "w4a16-channel", ("Marlin", "384x400", "padded")),
        ("ragged", "vllm-a100", "w8a8", ("CUTLASS", "64x404", "Triton")),
        ("ragged", "vllm-l4", "fp8", ("fp8 kernel (CUTLASS)", "multiples of 16", "padded")),
    ],
)
def test_sizes_that_a_gpu_kernel_was_not_written_for_are_noted(
    explain: Explain, model: str, target: str, scheme: str, parts: tuple[str, ...]
) -> None:
    found = notes(explain(model, target, "--quantize", scheme))
    assert {diagnostic["code"] for diagnostic in found} == {"CS2331"}
    text = " ".join(diagnostic["why"] for diagnostic in found)
    for part in parts:
        assert part in text


def test_heads_that_do_not_divide_the_width_take_the_plugin(explain: Explain) -> None:
    # 3 of 4 heads remain; 3 does not divide 256.
    pruned = explain("plain", "vllm-cpu", "--prune", "heads=0.25")
    assert notes(pruned) == []
    assert pruned[1]["passes"][0]["achieved"]["heads"]["sizes"] == [3]
    found = refusal(explain("gemma2", "vllm-cpu", "--prune", "heads=0.25"), "CS4309")
    assert "LlamaForCausalLM" in found["why"]
    assert "ort-cpu" in found["hint"]


def test_pruned_sizes_are_split_evenly(explain: Explain) -> None:
    # On a grid of 2 * 128 a quarter of 512 cannot go; half can.
    pruned = explain("plain", "vllm-h100", "--prune", "channels=0.5", "--tensor-parallel", "2", "--quantize", "w4a16")
    assert notes(pruned) == []
    assert pruned[1]["passes"][0]["achieved"]["channels"]["sizes"] == [256]


def test_heads_and_channels_are_split_over_gpus(explain: Explain) -> None:
    assert notes(explain("plain", "vllm-h100", "--tensor-parallel", "2")) == []
    found = refusals(explain("plain", "vllm-h100", "--tensor-parallel", "3"))
    assert {diagnostic["code"] for diagnostic in found} == {"CS4308"}
    text = " ".join(diagnostic["why"] for diagnostic in found)
    for part in ("4 key-value heads", "4 query heads cannot", "512 channels"):
        assert part in text
    # Without quantization, too: 400 channels are not split over 3.
    (only,) = refusals(explain("odd", "vllm-h100", "--tensor-parallel", "3"))
    assert "400 channels" in only["why"]
    # 3 key-value heads are neither split over 2 nor repeated on them; one is repeated.
    (keys,) = refusals(explain("odd", "vllm-h100", "--tensor-parallel", "2"))
    assert "3 key-value heads can neither" in keys["why"]
    assert refusals(explain("ragged", "vllm-h100", "--tensor-parallel", "4")) == []


def test_every_gpu_holds_whole_groups_and_blocks(explain: Explain) -> None:
    found = refusal(explain("plain", "vllm-h100", "--tensor-parallel", "4", "--quantize", "w4a16"), "CS4301")
    # 512 / 4 channels are one group; the 256 inputs of the output projection are 64 each. The width is never split.
    assert found["where"].endswith("o_proj.weight")
    assert "64 of its 256 inputs" in found["why"]
    blocks = refusals(explain("plain", "vllm-h100", "--tensor-parallel", "4", "--quantize", "fp8-block"))
    assert {diagnostic["code"] for diagnostic in blocks} == {"CS4302"}
    assert "over 4 GPUs" in blocks[0]["why"]
    assert notes(explain("plain", "vllm-h100", "--tensor-parallel", "4", "--quantize", "fp8")) == []


def test_a_target_without_gpus_is_not_split_over_them(explain: Explain) -> None:
    code, error = explain("plain", "vllm-cpu", "--tensor-parallel", "2")
    assert (code, error["error"]["code"]) == (2, "CS1042")


def test_other_kinds_of_models_are_refused(explain: Explain) -> None:
    assert "encoder" in refusal(explain("bert", "vllm-cpu"), "CS4306")["why"]


def test_experts_are_not_quantized(explain: Explain) -> None:
    found = refusals(explain("mixtral", "vllm-h100", "--quantize", "fp8"))
    assert [diagnostic["code"] for diagnostic in found] == ["CS4307"]
    assert refusals(explain("mixtral", "vllm-h100")) == []
    split = refusals(explain("mixtral", "vllm-h100", "--tensor-parallel", "3"))
    assert any(
        diagnostic["where"].endswith("experts.gate_up_proj") and "512 channels" in diagnostic["why"]
        for diagnostic in split
    )


def test_an_architecture_that_the_registered_vllm_does_not_have(explain: Explain) -> None:
    record({"architectures": ["Gemma2ForCausalLM", "MixtralForCausalLM", "LlamaModel"]})
    found = refusal(explain("plain", "vllm-cpu"), "CS4305")
    assert found["where"] == "architectures: LlamaForCausalLM"
    assert "vLLM 0.32.0 has 3 model classes, and not this one" in found["why"]
    assert "nearest" in found["hint"]
    assert refusals(explain("gemma2", "vllm-cpu")) == []


def test_what_was_measured_to_be_slow_is_said_for_the_processor_here(explain: Explain) -> None:
    record({"isa": "avx512"})
    (four,) = notes(explain("plain", "vllm-cpu", "--quantize", "w4a16"))
    assert (four["code"], "slower than bf16" in four["why"], "w8a8" in four["hint"]) == ("CS2332", True, True)
    assert notes(explain("plain", "vllm-cpu", "--quantize", "w8a8")) == []
    record({"isa": "avx2"})
    (eight,) = notes(explain("plain", "vllm-cpu", "--quantize", "w8a8"))
    assert (eight["code"], "slower for decoding" in eight["why"]) == ("CS2332", True)
    record({"isa": "amx"})
    assert notes(explain("plain", "vllm-cpu", "--quantize", "w4a16")) == []
    assert notes(explain("plain", "vllm-a100", "--quantize", "w8a8")) == []
