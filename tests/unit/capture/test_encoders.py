"""Encoders of text, images and audio, alone or saved with their decoder, and what is refused with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers.models.whisper.modeling_whisper import WhisperDecoder, WhisperEncoder

from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.capture.fold import fold_constants
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.ir.edit import eliminate_dead_code, op_name
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.verify.reference import sample_inputs
from compile_sparse.testing.encoders import ENCODERS, t5_config, whisper_config
from compile_sparse.testing.models import build_model, example_inputs
from compile_sparse.testing.oracles import relative_error, tolerance
from tests.toys import Applied, toy_program

FromDisk = Callable[[str], Program]


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_equals_eager(from_disk: FromDisk, name: str) -> None:
    program, model = from_disk(name), build_model(name)
    verify_program(program)
    for batch, length in ((3, 7), (2, 5)):
        inputs = example_inputs(program, batch, length)
        with torch.no_grad():
            expected = model(**inputs)
        found = Executor(program).run(inputs)
        assert found.keys() == expected.keys()
        for (
            key,
            value,
        ) in found.items():  # the same kernels, which may sum in another order where memory is aligned otherwise
            assert relative_error(value, expected[key]) <= tolerance(program), key


@pytest.mark.parametrize(
    ("name", "kind", "role"),
    [
        ("t5_encoder", "encoder", "input_ids"),
        ("swin", "vision", "pixel_values"),
        ("whisper_encoder", "audio", "input_features"),
    ],
)
def test_kind_and_inputs(from_disk: FromDisk, name: str, kind: str, role: str) -> None:
    program = from_disk(name)
    assert program.kind == kind
    assert program.inputs[0].role == role
    given = sample_inputs(program, seed=0, batch=2, length=4)
    outputs = Executor(program).run({key: torch.from_numpy(value) for key, value in given.items()})
    assert all(value.shape[0] == 2 for value in outputs.values())


@pytest.mark.parametrize("name", ["vit", "swin", "convnext"])
def test_images_of_a_size_that_the_config_does_not_name(saved: Callable[[str], Path], name: str) -> None:
    """Positions of ViT and windows of Swin depend on it."""
    program, model = capture(open_folder(saved(name)), image_size=(24, 40)), build_model(name)
    pixels = torch.from_numpy(sample_inputs(program, seed=0, batch=3, length=1)["pixel_values"])
    assert pixels.shape == (3, 3, 24, 40)
    asked = {"interpolate_pos_encoding": True} if name == "vit" else {}
    with torch.no_grad():
        expected = model(pixel_values=pixels, **asked)
    found = Executor(program).run({"pixel_values": pixels})
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert relative_error(value, expected[key]) <= tolerance(program), key


def test_an_image_that_is_too_small(saved: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=r"CS2008(.|\n)*another size"):
        capture(open_folder(saved("vit")), image_size=(2, 40))


@pytest.mark.parametrize("head", [hf.LlamaModel, hf.LlamaForSequenceClassification])
def test_a_cache_without_a_language_model_head_is_refused(head: type[hf.PreTrainedModel], tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    head(hf.LlamaConfig(**sizes, pad_token_id=0)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"CS2007(.|\n)*key-value cache"):
        capture(open_folder(tmp_path))


def _relabel(folder: Path, architecture: str) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": [architecture]}))
    return folder


def _t5() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return hf.T5ForConditionalGeneration(t5_config()).eval()


def test_the_weights_of_an_encoder_decoder_serve_its_encoder(tmp_path: Path) -> None:
    model = _t5()
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        capture(open_folder(tmp_path))
    assert caught.value.code == "CS2007"
    assert "encoder-decoder" in caught.value.why
    assert "T5EncoderModel" in caught.value.hint  # as the hint says:
    program = capture(open_folder(_relabel(tmp_path, "T5EncoderModel")))
    inputs = example_inputs(program, 2, 6)
    with torch.no_grad():
        expected = model.encoder(**inputs).last_hidden_state
    assert torch.equal(Executor(program).run(inputs)["last_hidden_state"], expected)


@pytest.mark.parametrize("build", [_t5, lambda: hf.WhisperForConditionalGeneration(whisper_config()).eval()])
def test_an_encoder_saved_on_its_own(build: Callable[[], hf.PreTrainedModel], tmp_path: Path) -> None:
    encoder = build().get_encoder()
    encoder.save_pretrained(tmp_path)
    program = capture(open_folder(tmp_path))
    inputs = example_inputs(program, 2, 6)
    with torch.no_grad():
        expected = encoder(**inputs).last_hidden_state
    assert torch.equal(Executor(program).run(inputs)["last_hidden_state"], expected)


@pytest.mark.parametrize("model", [hf.WhisperModel, hf.WhisperForConditionalGeneration])
def test_an_audio_encoder_decoder_is_refused_with_the_way_out(model: type[hf.PreTrainedModel], tmp_path: Path) -> None:
    whisper_config(architectures=[model.__name__]).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        capture(open_folder(tmp_path), require_weights=False)
    assert caught.value.code == "CS2007"
    assert "get_encoder().save_pretrained" in caught.value.hint


def test_a_decoder_half_is_refused(tmp_path: Path) -> None:
    whisper_config(architectures=[WhisperDecoder.__name__]).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        capture(open_folder(tmp_path), require_weights=False)
    assert caught.value.code == "CS2007"
    assert "decoder without a language-model head" in caught.value.why


def test_a_model_of_two_inputs_is_refused_with_the_reason(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = hf.CLIPTextConfig(vocab_size=32, **small), hf.CLIPVisionConfig(image_size=8, patch_size=4, **small)
    config = hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    config.architectures = ["CLIPModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        capture(open_folder(tmp_path), require_weights=False)
    assert caught.value.code == "CS2008"
    assert "input_ids" in caught.value.where
    assert caught.value.why


@pytest.mark.parametrize("name", ["WhisperAttention", "WhisperConfig", "torch", "sdpa_attention_forward"])
def test_only_models_are_found_next_to_a_config(name: str, tmp_path: Path) -> None:
    whisper_config(architectures=[name]).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        open_folder(tmp_path)
    assert caught.value.code == "CS2002"


def test_audio_features_without_a_stated_length_are_refused(tmp_path: Path) -> None:
    config = hf.Speech2TextConfig(
        vocab_size=32,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    config.architectures = ["Speech2TextEncoder"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        capture(open_folder(tmp_path), require_weights=False)
    assert caught.value.code == "CS2007"
    assert "mel bins" in caught.value.why


def test_reasons_of_frozen_axes_are_readable(from_disk: FromDisk) -> None:
    def reasons(name: str) -> dict[str, str]:
        return {str(group.anchor): str(group.frozen[0]) for group in analyse(from_disk(name)).groups if group.frozen}

    whisper = reasons("whisper_encoder")
    assert "model input 'input_features' has a fixed shape" in whisper["conv1.weight[1]"]
    assert "model output 'last_hidden_state' has a fixed shape" in whisper["conv2.weight[0]"]
    assert "a convolution relates neighbouring positions" in whisper["conv1.weight[2]"]
    table = next(why for anchor, why in reasons("swin").items() if anchor.endswith("relative_position_bias_table[0]"))
    assert "addressed by a stored table of indices" in table
    assert "modeling_swin.py" in table


def test_the_class_of_a_part_is_found_by_its_name(tmp_path: Path) -> None:
    whisper_config(architectures=["WhisperEncoder"]).save_pretrained(tmp_path)
    assert open_folder(tmp_path).model_class is WhisperEncoder


def test_operators_with_several_outputs_are_folded_too() -> None:
    """Relative positions by ``meshgrid`` (BEiT): a stored table afterwards, not operators that nothing knows."""

    def positions(x: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.meshgrid(torch.arange(3), torch.arange(2), indexing="ij")
        return x + (rows * 10 + columns)

    x = torch.randn(3, 2)
    program = toy_program(Applied(positions), [x])
    folded = eliminate_dead_code(fold_constants(program))
    verify_program(folded)
    assert [op_name(node) for node in folded.graph.nodes if node.op == "call_function"] == ["add"]
    assert torch.equal(Executor(folded).run({"x0": x})["y0"], positions(x))
