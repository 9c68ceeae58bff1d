"""Sample inputs for export: which inputs the model takes, which axes are dynamic, what the outputs are called.

The sample tensors are real, not fake: decomposing a program exported from fake inputs corrupts the heap in torch 2.13. They are
tiny. The forward passes that reveal cache and output shapes run in the fake mode.

Sizes of the sample are all different and at least 2, because export turns an axis of size 1, or two axes of equal size, into a
constant or into one symbol.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

from compile_sparse.compiler.capture.folder import is_causal
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.ir.program import Input, ModelKind, Output

__all__ = ["Sample", "input_shape", "sample_for", "stretch_positions"]

BATCH, QUERY, PAST = 2, 3, 5
DYNAMIC = torch.export.Dim.DYNAMIC  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Sample:
    """What ``torch.export`` needs, and the meaning of each flat input and output.

    Attributes:
        kind: decoder, encoder (of text), vision or audio.
        kwargs: keyword arguments of ``forward``.
        dynamic_shapes: per keyword.
        inputs: in flat order, ``placeholder`` still empty.
        outputs: in flat order.
    """

    kind: ModelKind
    kwargs: dict[str, Any]
    dynamic_shapes: dict[str, Any]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]


def sample_for(model: PreTrainedModel, mode: FakeTensorMode, image_size: tuple[int, int] | None = None) -> Sample:
    """Build the sample for a fake ``model``.

    What a model is follows from its forward and its main input: the configs of encoder-decoders also belong to encoders.

    Raises:
        ModelError: CS2007 when the model is of a kind that is not supported, CS2008 when it rejects the sample.
    """
    config, accepted = model.config, inspect.signature(model.forward).parameters
    if "decoder_input_ids" in accepted:
        raise _unsupported(type(model), "it is an encoder-decoder model", _encoder_hint(config))
    if is_causal(type(model)) and not config.is_encoder_decoder:
        return _decoder(model, mode)
    if "encoder_hidden_states" in accepted and _is_decoder_half(model):
        raise _unsupported(type(model), "it is a decoder without a language-model head")
    if model.main_input_name == "pixel_values":
        return _vision(model, config, mode, image_size)
    if model.main_input_name == "input_ids":
        return _encoder(model, mode)
    if model.main_input_name == "input_features":
        return _audio(model, config, mode)
    raise _unsupported(type(model), f"its main input is {model.main_input_name!r}")


def _is_decoder_half(model: PreTrainedModel) -> bool:
    """T5's stacks know which half they are; other classes with cross-attention are decoders when their config has any."""
    config = model.config
    return bool(getattr(model, "is_decoder", config.is_encoder_decoder or getattr(config, "is_decoder", False)))


def _unsupported(model_class: type, why: str, hint: str = "") -> ModelError:
    return ModelError(
        "CS2007",
        f"{model_class.__name__} is not a kind of model that can be captured.",
        where="config.json, architectures",
        why=f"Decoders and encoders of text, images and audio features are supported; {why}.",
        hint=hint or "Compile the encoder or the decoder on its own.",
    )


def _encoder_hint(config: PretrainedConfig) -> str:
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        name = MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)].__name__
        return (
            f"To compile the encoder, write [\"{name}\"] as 'architectures' in config.json: it reads the same weights."
        )
    return "To compile the encoder, save it on its own: model.get_encoder().save_pretrained(FOLDER)."


def _decoder(model: PreTrainedModel, mode: FakeTensorMode) -> Sample:
    accepted = inspect.signature(model.forward).parameters
    with mode, torch.no_grad():
        # A cache built without a config keeps every layer at full length; sliding windows then live in the mask, which
        # exports with dynamic sizes where a windowed cache would not.
        cache = DynamicCache()
        model(input_ids=torch.ones(BATCH, PAST, dtype=torch.long), past_key_values=cache, use_cache=True)
    kwargs: dict[str, Any] = {
        "input_ids": torch.ones(BATCH, QUERY, dtype=torch.long),
        "attention_mask": torch.ones(BATCH, PAST + QUERY, dtype=torch.long),
    }
    if "position_ids" in accepted:
        kwargs["position_ids"] = torch.zeros(BATCH, QUERY, dtype=torch.long)
    layers = len(cache.layers)
    if not layers:
        raise _unsupported(type(model), "it keeps no key-value cache")
    dynamic: dict[str, Any] = {name: {0: DYNAMIC, 1: DYNAMIC} for name in kwargs}
    kwargs["past_key_values"] = _real(cache)
    dynamic["past_key_values"] = [{0: DYNAMIC, 2: DYNAMIC}] * (2 * layers)
    inputs = [Input("", name, name) for name in kwargs if name != "past_key_values"]  # type: ignore[arg-type]
    outputs = [Output("logits", "logits")]
    for layer in range(layers):
        for part in ("key", "value"):
            inputs.append(Input("", f"past_key_values.{layer}.{part}", f"past_{part}", layer))  # type: ignore[arg-type]
            outputs.append(Output(f"present.{layer}.{part}", f"present_{part}", layer))  # type: ignore[arg-type]
    return Sample("decoder", kwargs | {"use_cache": True}, dynamic, tuple(inputs), tuple(outputs))


def _real(cache: DynamicCache) -> DynamicCache:
    """The same cache with zeros for values."""
    real = DynamicCache()
    for index, layer in enumerate(cache.layers):
        key, value = (torch.zeros(tuple(t.shape), dtype=t.dtype) for t in (layer.keys, layer.values))
        real.update(key, value, index)
    return real


def _encoder(model: PreTrainedModel, mode: FakeTensorMode) -> Sample:
    accepted = inspect.signature(model.forward).parameters
    names = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in accepted]
    kwargs = {n: torch.ones(BATCH, PAST, dtype=torch.long) for n in names}
    dynamic = {name: {0: DYNAMIC, 1: DYNAMIC} for name in names}
    return _plain("encoder", model, mode, kwargs, dynamic)


def _vision(
    model: PreTrainedModel, config: PretrainedConfig, mode: FakeTensorMode, image_size: tuple[int, int] | None
) -> Sample:
    _, shape = input_shape(type(model), config, image_size)
    stretch_positions(model, image_size)
    pixels = {"pixel_values": torch.zeros(BATCH, *shape)}
    return _plain("vision", model, mode, pixels, {"pixel_values": {0: DYNAMIC}})


def stretch_positions(model: PreTrainedModel, image_size: tuple[int, int] | None) -> None:
    """Have ``model`` stretch its table of positions where images are not of the config's size and its class can.

    It is asked once and for all: export would make an input of the flag.
    """
    own, shape = (input_shape(type(model), model.config, size)[1] for size in (None, image_size))
    if shape != own and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        model.forward = partial(model.forward, interpolate_pos_encoding=True)  # type: ignore[method-assign]


def input_shape(
    model_class: type, config: PretrainedConfig, image_size: tuple[int, int] | None = None
) -> tuple[str, tuple[int, ...]]:
    """Name of the main input of a model of images or audio features, and the shape of one sample, which is fixed at capture:
    position tables and windows depend on it.

    Images are ``[channels, height, width]``, of the given height and width or the config's, features ``[mel bins, frames]`` with
    two frames per position, as Whisper has them.

    Raises:
        ModelError: CS2007 when the config does not say.
    """
    if getattr(model_class, "main_input_name", "") == "pixel_values":
        size: Any = image_size or getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return "pixel_values", (getattr(config, "num_channels", 3), height, width)
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if not isinstance(bins, int) or not isinstance(positions, int):
        why = "its config does not say how many mel bins and positions its input features have"
        raise _unsupported(model_class, why)
    return "input_features", (bins, 2 * positions)


def _audio(model: PreTrainedModel, config: PretrainedConfig, mode: FakeTensorMode) -> Sample:
    _, shape = input_shape(type(model), config)
    kwargs = {"input_features": torch.zeros(BATCH, *shape)}
    return _plain("audio", model, mode, kwargs, {"input_features": {0: DYNAMIC}})


def _plain(
    kind: ModelKind,
    model: PreTrainedModel,
    mode: FakeTensorMode,
    kwargs: dict[str, Any],
    dynamic: dict[str, Any],
) -> Sample:
    try:
        with mode, torch.no_grad():
            # Static shapes: a forward may compute with them, or keep them (Swin's window size).
            given = {name: mode.from_tensor(value, static_shapes=True) for name, value in kwargs.items()}
            result = model(**given)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
        raise ModelError(
            "CS2008",
            f"{type(model).__name__} cannot be run on its main input alone.",
            where=", ".join(f"{name} {list(value.shape)}" for name, value in kwargs.items()),
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            hint="Use the encoder or the decoder of the model on its own, or another size of its input.",
        ) from error
    if any(isinstance(value, Cache) for value in result.values()):
        raise _unsupported(type(model), "it keeps a key-value cache and has no language-model head")
    outputs: list[Output] = []
    for name, value in result.items():
        leaves = pytree.tree_leaves(value)
        role = "logits" if name == "logits" else "hidden"
        outputs += [
            Output(name if len(leaves) == 1 else f"{name}.{i}", role)  # type: ignore[arg-type]
            for i in range(len(leaves))
        ]
    inputs = tuple(Input("", name, name) for name in kwargs)  # type: ignore[arg-type]
    return Sample(kind, kwargs, dynamic, inputs, tuple(outputs))
