"""The GEMMs of a model: every distinct size once, with the rows that a workload gives it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.microbench.shapes import product_shapes
from compile_sparse.compiler.targets.workload import Workload
from tests.toys import ConvNet, toy_program

WORK = Workload(prompt=7, batch=3)


def counted(program, workload=WORK):
    shapes, left_out = product_shapes(program, workload)
    return {(s.outer, s.inner, s.rows, s.regime): s.layers for s in shapes}, left_out


def test_a_decoder_multiplies_tokens_and_prompts(captured):
    found, left_out = counted(captured("llama"))
    layers = {
        (64, 64): 4,
        (32, 64): 4,
        (88, 64): 4,
        (64, 88): 2,
        (96, 64): 1,
    }  # 2 layers: q o, k v, gate up, down; the head
    assert found == {
        (outer, inner, rows, regime): count
        for (outer, inner), count in layers.items()
        for rows, regime in ((3, "decode"), (21, "prompt"))
    }
    assert not left_out


def test_every_number_of_requests_decodes(captured):
    found, _ = counted(captured("llama"), Workload(prompt=5, concurrency=(2, 8)))
    assert {(rows, regime) for (_, _, rows, regime) in found} == {(2, "decode"), (8, "decode"), (10, "prompt")}


def test_weights_stored_input_first_have_the_same_sizes(captured):
    """GPT-2 stores [in, out] and flattens batch and tokens."""
    found, _ = counted(captured("gpt2"))
    assert found[192, 64, 21, "prompt"] == 2
    assert found[64, 88, 3, "decode"] == 2
    assert found[88, 64, 3, "decode"] == 2
    assert found[96, 64, 21, "prompt"] == 1


def test_equal_rows_are_measured_once(captured):
    found, _ = counted(captured("llama"), Workload(prompt=1, batch=4))
    assert {regime for (_, _, _, regime) in found} == {"decode"}
    assert found[32, 64, 4, "decode"] == 4


def test_a_vision_model_multiplies_patches(captured):
    found, left_out = counted(captured("vit_classifier"))
    assert found[88, 64, 3 * 17, "forward"] == 2
    assert found[5, 64, 3, "forward"] == 1, "the head sees one vector per image"
    assert [(skip.where, skip.code) for skip in left_out] == [("conv2d", "CS5421")]


def test_a_text_encoder_multiplies_its_tokens(captured):
    found, _ = counted(captured("bert_classifier"))
    assert found[64, 64, 21, "forward"] == 8
    assert found[3, 64, 3, "forward"] == 1


def test_experts_and_convolutions_are_said_to_be_left_out(captured):
    _, left_out = counted(captured("qwen3_moe"))
    assert any("mm" in skip.where and skip.code == "CS5421" for skip in left_out)
    _, left_out = counted(toy_program(ConvNet(), [torch.zeros(2, 3, 8, 8)]))
    assert sum(int(skip.why.split()[0]) for skip in left_out if "conv" in skip.where) == 6


@pytest.mark.parametrize("name", ["swin", "whisper_classifier", "t5_encoder"])
def test_sizes_of_other_encoders_are_numbers(captured, name):
    """Windows of patches, audio frames: every dynamic size is batch or tokens."""
    shapes, left_out = product_shapes(captured(name), WORK)
    assert shapes
    assert all(s.rows % 3 == 0 for s in shapes), "a multiple of the batch"
    assert "CS5420" not in {skip.code for skip in left_out}


def test_a_table_of_positions_is_multiplied_once(captured):
    """DeBERTa projects 2 x 8 relative positions, whatever the batch is."""
    found, _ = counted(captured("deberta"))
    assert {rows for (_, _, rows, _) in found} == {16, 21, 3}


def test_no_weights_are_needed(tmp_path: Path):
    config = hf.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    found, _ = counted(capture(open_folder(tmp_path), require_weights=False))
    assert found[96, 64, 3, "decode"] == 4
