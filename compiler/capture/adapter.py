"""LoRA adapters, as peft saves them: found, checked, and merged into the base model's weights when these are loaded.

What is merged is what peft's ``merge_and_unload`` computes: ``W + s B A``, ``s = alpha / r`` (``alpha / sqrt(r)`` for rslora),
transposed where the layer stores ``[in, out]``; modules that were trained whole (``modules_to_save``) are replaced.
Source: ``peft.tuners.lora`` (``LoraConfig``, ``Linear.get_delta_weight``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compile_sparse.compiler.capture.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from compile_sparse.compiler.capture.safetensors_reader import read_checkpoint
from compile_sparse.compiler.capture.skeleton import build_on_meta, quiet_transformers
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.files.inside import require_inside
from compile_sparse.compiler.ir.weights import DerivedTensor, TensorSource

__all__ = ["merged"]

PREFIX = "base_model.model."
_PART = re.compile(r"(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.weight)?")
_WITHOUT_EFFECT = frozenset(
    {
        *(
            "peft_type",
            "task_type",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
            "auto_mapping",
            "peft_version",
        ),
        *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "use_rslora"),
        *("modules_to_save", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias", "layers_to_transform"),
        *("layers_pattern", "runtime_config", "megatron_core", "qalora_group_size", "eva_config"),
    }
)
"""Keys that are read here, that the stored tensors show, or that mattered in training only."""
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin training that leave the base model as it is."""


def merged(
    adapter: Path,
    base: Mapping[str, TensorSource],
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
) -> dict[str, TensorSource]:
    """The base model's stored tensors with the adapter's changes.

    Args:
        adapter: its folder.
        base: by stored name.
        model_class, config: of the base.
        dtype: of what is merged.

    Raises:
        ModelError: CS2015 when the adapter is of another kind, or belongs to another model.
    """
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    _refuse_other_kinds(settings)
    stored = read_checkpoint([require_inside(adapter, adapter / ADAPTER_WEIGHTS)], dtype)
    with quiet_transformers():
        model = build_on_meta(model_class, config, dtype, experts="eager")
    modules = dict(model.named_modules())
    result = dict(base)
    for path, parts in _by_module(stored, base).items():
        if isinstance(parts, str):
            result[path] = stored[parts]
            continue
        name = f"{path}.weight"
        if name not in base:
            _no(name, "the base model stores no such tensor")
        transposed = _transposed(path, modules.get(path), parts, bool(getattr(config, "tie_word_embeddings", False)))
        result[name] = _with_delta(name, base[name], parts, _scale(settings, path, parts), transposed)
    return result


def _no(where: str, why: str) -> NoReturn:
    raise ModelError(
        "CS2015",
        "This adapter cannot be merged.",
        where=where,
        why=f"{why[0].upper()}{why[1:]}.",
        hint="Merge it with peft (merge_and_unload), save the result with save_pretrained, and compile that folder.",
    )


def _refuse_other_kinds(settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        _no(f"{ADAPTER_CONFIG}, peft_type", f"its kind is {settings.get('peft_type')!r}; LoRA is supported")
    if settings.get("bias", "none") != "none":
        _no(f"{ADAPTER_CONFIG}, bias", f"it also trained biases (bias: {settings['bias']!r})")
    if settings.get("init_lora_weights") not in _STARTS:
        _no(
            f"{ADAPTER_CONFIG}, init_lora_weights",
            f"training began with {settings['init_lora_weights']!r}, which changes the base model too",
        )
    for key, value in settings.items():
        if key not in _WITHOUT_EFFECT and value:
            _no(f"{ADAPTER_CONFIG}, {key}", f"{key} is {json.dumps(value)[:60]}; plain LoRA is supported")


def _by_module(
    stored: Mapping[str, TensorSource], base: Mapping[str, TensorSource]
) -> dict[str, dict[str, TensorSource] | str]:
    """Path of a module -> its low-rank parts; name of a stored tensor -> the adapter's tensor that replaces it."""
    found: dict[str, dict[str, TensorSource] | str] = {}
    for key, source in stored.items():
        if not key.startswith(PREFIX):
            _no(key, f"the adapter's tensors are expected under {PREFIX!r}")
        name = key.removeprefix(PREFIX)
        if match := _PART.fullmatch(name):
            parts = found.setdefault(match["path"], {})
            assert isinstance(parts, dict)
            parts[match["part"]] = source
        elif "lora_" in name or ".base_layer." in name:
            _no(key, "plain LoRA has no such tensor")
        else:
            found[name.replace(".modules_to_save.", ".")] = key
    return found


def _transposed(path: str, module: torch.nn.Module | None, parts: Mapping[str, TensorSource], tied: bool) -> bool:
    """Whether the layer stores its weight as ``[in, out]``: by its class, as peft decides whatever ``fan_in_fan_out`` says."""
    if parts.keys() == {"lora_A", "lora_B"} and isinstance(module, (torch.nn.Linear, Conv1D)):
        return isinstance(module, Conv1D)
    if parts.keys() == {"lora_embedding_A", "lora_embedding_B"} and isinstance(module, torch.nn.Embedding):
        if tied:
            _no(path, "the embedding is also the head, and only the embedding was trained")
        return True
    kind = "no module" if module is None else type(module).__name__
    _no(path, f"{' and '.join(sorted(parts))} do not fit {kind}")


def _scale(settings: Mapping[str, Any], path: str, parts: Mapping[str, TensorSource]) -> float:
    rank = _for_module(settings.get("rank_pattern"), path, settings.get("r", 8))
    alpha = _for_module(settings.get("alpha_pattern"), path, settings.get("lora_alpha", 8))
    first = next(source for name, source in parts.items() if name.endswith("_A"))
    if first.shape[0] != rank or not rank:
        _no(path, f"its rank is {first.shape[0]}, the settings say {rank}")
    return float(alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank)


def _for_module(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first pattern that the path ends with (``peft.utils.other.get_pattern_key``)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _with_delta(
    name: str, base: TensorSource, parts: Mapping[str, TensorSource], scale: float, transposed: bool
) -> TensorSource:
    down, up = (next(source for part, source in parts.items() if part.endswith(end)) for end in ("_A", "_B"))
    shape = (up.shape[0], down.shape[-1])
    if (shape[::-1] if transposed else shape) != tuple(base.shape) or up.shape[-1] != down.shape[0]:
        _no(name, f"a change of {list(shape)} does not fit {list(base.shape)}: the adapter belongs to another model")

    def compute() -> torch.Tensor:
        delta = up.load() @ down.load()
        return base.load() + (delta.t() if transposed else delta) * scale

    return DerivedTensor(tuple(base.shape), base.dtype, compute)
