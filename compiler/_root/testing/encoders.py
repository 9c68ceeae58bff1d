"""Tiny random encoders of text, images and audio, headless and with a classification head. See ``testing.models``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from transformers.models.whisper.modeling_whisper import WhisperEncoder

__all__ = ["ENCODERS", "t5_config", "whisper_config"]

_SIZE = 32  # of images
_BERT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def t5_config() -> hf.T5Config:
    # Heads times head size is not the width: the two must not be mixed up.
    return hf.T5Config(
        vocab_size=96, d_model=64, d_kv=6, d_ff=88, num_layers=2, num_heads=8, feed_forward_proj="gated-gelu"
    )


def whisper_config(**changes: Any) -> hf.WhisperConfig:
    return hf.WhisperConfig(
        vocab_size=96,
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=8,
        encoder_ffn_dim=88,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=40,
        num_mel_bins=10,
        max_source_positions=18,
        max_target_positions=16,
        num_labels=5,
        classifier_proj_size=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **changes,
    )


def _modernbert() -> hf.ModernBertConfig:
    # Layer 0 sees everything, layer 1 a window of 2 tokens on either side.
    return hf.ModernBertConfig(
        **_BERT, local_attention=4, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    )


def _deberta() -> hf.DebertaV2Config:
    # Heads are folded into the batch; both kinds of relative position attention, in buckets.
    sizes = {**_BERT, "hidden_size": 48, "num_attention_heads": 4, "num_labels": 3}
    return hf.DebertaV2Config(**sizes, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8)


def _distilbert() -> hf.DistilBertConfig:
    return hf.DistilBertConfig(
        vocab_size=96, max_position_embeddings=64, n_layers=2, n_heads=8, dim=64, hidden_dim=88, num_labels=3
    )


def _vit() -> hf.ViTConfig:
    sizes = {
        key: _BERT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    return hf.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)


def _swin() -> hf.SwinConfig:
    # Windows of 3 on an 8 x 8 grid: padded to 9, and shifted in the second block.
    return hf.SwinConfig(
        image_size=_SIZE, patch_size=4, embed_dim=24, depths=[2, 1], num_heads=[3, 6], window_size=3, num_labels=5
    )


def _convnext() -> hf.ConvNextConfig:
    return hf.ConvNextConfig(
        image_size=_SIZE, patch_size=2, num_stages=2, hidden_sizes=[12, 20], depths=[2, 1], num_labels=5
    )


def _resnet(layer_type: str) -> hf.ResNetConfig:
    return hf.ResNetConfig(
        embedding_size=12,
        hidden_sizes=[16, 24] if layer_type == "basic" else [32, 48],
        depths=[2, 1],
        layer_type=layer_type,
        image_size=_SIZE,
        num_labels=5,
    )


def _efficientnet() -> hf.EfficientNetConfig:
    # Depthwise convolution, squeeze and excitation; the second stage has a residual block.
    return hf.EfficientNetConfig(
        image_size=_SIZE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        depth_divisor=4,
        kernel_sizes=[3, 5],
        in_channels=[32, 8],
        out_channels=[8, 12],
        strides=[1, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 3],
        hidden_dim=1280,  # always 1280 times the width coefficient
        num_labels=5,
    )


ENCODERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**_BERT)),
    "bert_classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_BERT, num_labels=3)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(_distilbert()),
    "deberta": lambda: hf.DebertaV2ForSequenceClassification(_deberta()),
    "modernbert": lambda: hf.ModernBertModel(_modernbert()),
    "t5_encoder": lambda: hf.T5EncoderModel(t5_config()),
    "whisper_encoder": lambda: WhisperEncoder(whisper_config()),
    "whisper_classifier": lambda: hf.WhisperForAudioClassification(whisper_config()),
    "vit": lambda: hf.ViTModel(_vit()),
    "vit_classifier": lambda: hf.ViTForImageClassification(_vit()),
    "swin": lambda: hf.SwinForImageClassification(_swin()),
    "convnext": lambda: hf.ConvNextForImageClassification(_convnext()),
    "resnet": lambda: hf.ResNetForImageClassification(_resnet("bottleneck")),
    "resnet_basic": lambda: hf.ResNetModel(_resnet("basic")),
    "efficientnet": lambda: hf.EfficientNetForImageClassification(_efficientnet()),
}
