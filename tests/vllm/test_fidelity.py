"""What vLLM computes from our checkpoints is what the program means; wrong checkpoints that load are noticed.

All models are loaded into one process, as verification does. Without AVX-512 vLLM has no kernel for 4-bit weights: there a
stand-in computes that one product (``emulated_kernel``), on what vLLM's own loader made of the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import safe_open

from compile_sparse.backends.checkpoint import compressed_tensors
from compile_sparse.backends.vllm.backend import VllmBackend
from compile_sparse.compiler.artifact.report import Fidelity
from compile_sparse.compiler.capture import capture_model
from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.extension.pass_contract import Pass
from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.compiler.ir.weights import DerivedTensor
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.environments import RuntimeRecord
from compile_sparse.compiler.runtimes.messages import Benchmark
from compile_sparse.compiler.verify.fidelity import check_fidelity
from compile_sparse.compiler.verify.layers import check_layers, observed_calls
from compile_sparse.compiler.verify.verdict import wrong_model
from compile_sparse.passes.low_rank import LowRank
from compile_sparse.passes.mask import Sparsify
from compile_sparse.passes.prune_channels import PruneChannels
from compile_sparse.passes.prune_heads import PruneHeads
from compile_sparse.passes.prune_layers import PruneLayers
from compile_sparse.passes.quantize import Quantize
from tests.random_weights import randomised
from tests.vllm.conftest import small_config
from tests.vllm.emulated_kernel import write_plugin
from tests.vllm.lowering import artifact, here, load, text

QUIET = SilentProgress()
GLOBAL = PruneChannels(fraction=0.25, allocation="global", compensation="none")


@pytest.fixture(scope="module")
def program() -> Program:
    return capture_model(randomised(hf.LlamaForCausalLM(small_config())))


@pytest.fixture(scope="module")
def worker(runtime: RuntimeRecord, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    command = VllmBackend().worker_command(here())
    plugin = write_plugin(tmp_path_factory.mktemp("plugin"))
    with Worker([*command, str(plugin)]) as started:
        yield started


@pytest.fixture(scope="module")
def dense(worker: Worker, program: Program, tmp_path_factory: pytest.TempPathFactory) -> Fidelity:
    """The dense model's, in vLLM's precision on this machine."""
    folder = tmp_path_factory.mktemp("dense")
    lowered, _ = artifact(program, [], folder)
    found = judge(worker, "dense", folder, lowered)
    assert is_right(found), found
    assert found.layers is not None
    assert found.layers.checked == 7 * program.config["num_hidden_layers"]
    return found


def eight_bit(runtime: RuntimeRecord, scheme: str = "") -> Quantize:
    """8-bit weights and activations that are exact here: 7-bit codes where vLLM's int8 kernel overflows with 8."""
    chosen = scheme or ("w8a8" if "w8a8" in here().schemes else "fp8")
    reduced = chosen.startswith("w8a8") and bool(runtime.facts.get("int8_saturates"))
    return Quantize(scheme=chosen, reduce_range=reduced)  # type: ignore[arg-type]


def skip_unless_run(scheme: str) -> None:
    """The target of the registered vLLM decides which schemes exist."""
    if scheme not in here().schemes:
        pytest.skip(f"{here().name} does not run {scheme}")


def judge(worker: Worker, name: str, folder: Path, meant: Program) -> Fidelity:
    """What verification finds of a folder that ``meant`` should have been lowered to."""
    load(worker, name, folder)
    found = check_fidelity(worker, name, folder, QUIET)
    goal = here()
    seen = VllmBackend().observation(meant, goal, folder / "model", folder, DEFAULT_SETTINGS)
    seen, calls = observed_calls(seen, text=text(int(meant.config["vocab_size"])), seed=0)
    layers = check_layers(worker, name, seen, calls, precision=goal.baseline_precision, seed=0, progress=QUIET)
    return found.model_copy(update={"layers": layers})


def is_right(found: Fidelity) -> bool:
    return not wrong_model({"fidelity": found.model_dump()}, quantized=True)


WEIGHT_ONLY = [name for name, scheme in SCHEMES.items() if not scheme.activations]
ACTIVATIONS = [name for name, scheme in SCHEMES.items() if scheme.activations]


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_weight_only_schemes(worker: Worker, program: Program, scheme: str, tmp_path: Path) -> None:
    skip_unless_run(scheme)
    done, _ = artifact(program, [Quantize(scheme=scheme)], tmp_path)  # type: ignore[arg-type]
    found = judge(worker, scheme, tmp_path, done)
    assert is_right(found), found


@pytest.mark.parametrize("scheme", ACTIVATIONS)
def test_coded_activations_after_pruning(
    worker: Worker, program: Program, runtime: RuntimeRecord, scheme: str, tmp_path: Path
) -> None:
    skip_unless_run(scheme)
    passes: list[Pass] = [PruneChannels(fraction=0.25), eight_bit(runtime, scheme)]
    done, lowered = artifact(program, passes, tmp_path)
    assert lowered.form["config"] == {"intermediate_size": 384}
    found = judge(worker, scheme, tmp_path, done)
    assert is_right(found), found
    assert found.logprob_bound < 0.5  # type: ignore[operator]


NOT_UNIFORM: dict[str, list[Pass]] = {
    "widths": [GLOBAL],
    "heads that do not divide the width": [PruneHeads(fraction=0.25, unit="query", compensation="none")],
    "widths, skipped branches": [
        GLOBAL,
        PruneLayers(fraction=0.25, unit="mlp", criterion="block-influence", compensation="none"),
    ],
}


@pytest.mark.parametrize("kind", NOT_UNIFORM)
def test_layers_of_different_size(
    worker: Worker, program: Program, runtime: RuntimeRecord, kind: str, tmp_path: Path
) -> None:
    passes = NOT_UNIFORM[kind]
    if kind.startswith("heads"):
        config = small_config(hidden_size=512, num_attention_heads=8, num_hidden_layers=2)
        program = capture_model(randomised(hf.LlamaForCausalLM(config)))
    done, lowered = artifact(program, [*passes, eight_bit(runtime)], tmp_path)
    assert lowered.form["plugin"] == "vllm_plugin"
    found = judge(worker, kind, tmp_path, done)
    assert is_right(found), found


def test_low_rank_layers(worker: Worker, program: Program, tmp_path: Path) -> None:
    """Experimental: two factors per layer through our plugin; some projections of a fused layer stay whole."""
    ranked = LowRank(fraction=0.3, criterion="loss", allocation="global", compensation="none")
    done, lowered = artifact(program, [ranked], tmp_path)
    assert lowered.form["weights"] == "factors, experimental"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"][0] == "CompileSparseLlamaForCausalLM"
    ranks = config["quantization_config"]["ranks"]
    stored = {name: source.shape[0] for name, source in done.weights.items() if name.endswith(".inner.weight")}
    assert ranks == {name.removesuffix(".inner.weight"): rank for name, rank in stored.items()}
    assert is_right(judge(worker, "low rank", tmp_path, done))


def test_two_of_four(worker: Worker, program: Program, tmp_path: Path) -> None:
    """Experimental: values and positions in the file, dense products in vLLM."""
    done, lowered = artifact(program, [Sparsify(pattern="2:4")], tmp_path)
    assert lowered.form["weights"] == "2:4 values and positions, experimental"
    assert is_right(judge(worker, "2:4", tmp_path, done))
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        values = file.get_slice("model.layers.0.mlp.up_proj.weight_values")
        places = file.get_slice("model.layers.0.mlp.up_proj.weight_indices")
        assert (values.get_shape(), values.get_dtype()) == ([512, 128], "BF16")
        assert (places.get_shape(), places.get_dtype()) == ([512, 32], "U8")


FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "mistral": lambda: hf.MistralForCausalLM(_as(hf.MistralConfig, sliding_window=16)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(_as(hf.Qwen2Config)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(_as(hf.Qwen3Config)),
}


def _as(config: type[hf.PretrainedConfig], **changes: object) -> hf.PretrainedConfig:
    sizes = small_config(num_hidden_layers=2).to_dict()
    kept = {key: sizes[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    kept |= {key: sizes[key] for key in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")}
    return config(**kept, head_dim=64, bos_token_id=1, eos_token_id=2, **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(worker: Worker, family: str, tmp_path: Path) -> None:
    """Uneven widths, one branch gone; attention with a window, with biases, with normalised heads."""
    model = capture_model(randomised(FAMILIES[family]()))
    done, lowered = artifact(model, [GLOBAL], tmp_path)
    assert lowered.form["plugin"] == "vllm_plugin"
    found = judge(worker, family, tmp_path, done)
    assert is_right(found), found


def _swapped_nibbles(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    honest = _HONEST(codes, bits, dim).to(torch.int64) & 0xFFFFFFFF
    wrong = ((honest >> 4) & 0x0F0F0F0F) | ((honest & 0x0F0F0F0F) << 4)
    return torch.where(wrong >= 2**31, wrong - 2**32, wrong).to(torch.int32)


_HONEST = compressed_tensors.pack_codes


def test_swapped_nibbles_load_and_are_rejected(
    worker: Worker, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed_tensors, "pack_codes", _swapped_nibbles)
    done, _ = artifact(program, [Quantize(scheme="w4a16-g32")], tmp_path)
    found = judge(worker, "swapped nibbles", tmp_path, done)
    assert not is_right(found)
    assert found.layers is not None
    assert len(found.layers.wrong) == found.layers.checked
    assert found.mean_abs_logprob_diff > 10 * found.logprob_bound  # type: ignore[operator]


def _wrong_axis(program: Program) -> Program:
    """Scales in the order of groups first: the same numbers and shape, read along the other axis."""
    changes = {}
    for name, source in program.weights.items():
        if name.endswith(".scale"):

            def turned(source: object = source) -> torch.Tensor:
                value = source.load()  # type: ignore[attr-defined]
                return value.t().contiguous().view(value.shape)

            changes[name] = DerivedTensor(tuple(source.shape), source.dtype, turned)
    return replace(program, weights=program.weights.updated(changes))


def test_scales_along_the_wrong_axis_load_and_are_rejected(worker: Worker, program: Program, tmp_path: Path) -> None:
    done, _ = artifact(program, [Quantize(scheme="w4a16-g32")], tmp_path, change=_wrong_axis)
    found = judge(worker, "wrong axis", tmp_path, done)
    assert not is_right(found)
    assert found.mean_abs_logprob_diff > 10 * found.logprob_bound  # type: ignore[operator]


def test_overflowing_int8_products_are_noticed(
    worker: Worker, program: Program, runtime: RuntimeRecord, tmp_path: Path
) -> None:
    """Without 8-bit dot products vLLM's int8 kernel adds in 16 bits: the check after loading has to see it."""
    if "w8a8" not in here().schemes:
        pytest.skip(f"{here().name} has no w8a8")
    done, _ = artifact(program, [Quantize(scheme="w8a8")], tmp_path)
    said = VllmBackend().cannot_run(tmp_path / "model", here())
    found = judge(worker, "eight bits", tmp_path, done)
    if runtime.facts.get("int8_saturates"):
        assert "overflows" in said
        assert not is_right(found)
    else:
        assert said == ""
        assert is_right(found), found


def test_speed_of_everything_in_turns(
    worker: Worker, dense: Fidelity, program: Program, runtime: RuntimeRecord, tmp_path: Path
) -> None:
    """Dense, pruned and quantized, 4 bits, layers of different size: every form generates, and is timed in the same rounds."""
    passes: dict[str, list[Pass]] = {
        "pruned": [PruneChannels(fraction=0.25), eight_bit(runtime)],
        "four bits": [Quantize(scheme="w4a16")],
        "uneven": [GLOBAL],
    }
    for name, steps in passes.items():
        artifact(program, steps, tmp_path / name)
        load(worker, name, tmp_path / name)
    request = Benchmark(["dense", *passes], prompt_tokens=16, output_tokens=6, rounds=2, vocab=320, batch=2)
    rounds = worker.call(request).rounds
    for name, times in rounds.items():
        assert len(times) == 2, name
        for measured in times:
            assert measured.prefill_s > 0
            assert measured.decode_s >= 6 * min(measured.token_s) * 0.99
            assert len(measured.ttft_s) == len(measured.token_s) == 2


def test_a_model_that_needs_the_plugin_says_so_without_it(worker: Worker, program: Program, tmp_path: Path) -> None:
    done, lowered = artifact(program, [GLOBAL], tmp_path)
    # What a stranger's artifact brings is not run by us, with or without our own plugin on the path.
    code = tmp_path / "model" / lowered.form["plugin"] / "compile_sparse_vllm" / "__init__.py"
    code.write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n" + code.read_text())
    command = list(VllmBackend().worker_command(here()))[:-1]  # the last word is the plugin's folder
    with Worker(command) as bare, pytest.raises(EnvironmentFailure) as caught:
        load(bare, "without", tmp_path)
    assert "CompileSparseLlamaForCausalLM" in caught.value.why
    assert "add this model's folder vllm_plugin to PYTHONPATH" in caught.value.why
    assert judge(worker, "with a stranger's plugin", tmp_path, done).top1_agreement == 1.0
    assert not (tmp_path / "canary").exists()


def test_a_folder_that_is_no_model(worker: Worker, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(EnvironmentFailure, match="CS5204") as caught:
        load(worker, "nothing", tmp_path)
    assert "no config.json" in caught.value.why
