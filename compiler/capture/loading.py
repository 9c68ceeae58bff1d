"""The model as transformers itself loads it: its own class, its own loader, one tensor at a time.

``bind`` answers which stored tensor is which parameter for the compiler; this asks transformers. Its loader
(``core_model_loading.convert_and_load_state_dict_in_model``) first runs on the meta device, which costs no memory and says what
is missing and what is unused. Then it runs again for each tensor that is asked for, on the stored tensors that belong to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from compile_sparse.compiler.capture.skeleton import build_on_meta, quiet_transformers
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["LoadedClass", "load_class"]


@dataclass(frozen=True)
class LoadedClass:
    """A transformers model without values, and the values transformers would give it.

    Attributes:
        model: on the meta device, tied as transformers ties it; buffers that no checkpoint holds are computed.
        sources: by state-dict name; of tied names at least one.
        unused: stored tensors, by their name in memory, that the model has no place for and that transformers does not expect to
            find either (``UNEXPECTED`` in its report).
    """

    model: PreTrainedModel
    sources: Mapping[str, TensorSource]
    unused: tuple[str, ...]


def load_class(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    checkpoint: Mapping[str, TensorSource],
    dtype: torch.dtype,
) -> LoadedClass:
    """Let transformers load ``checkpoint``, without values.

    Args:
        model_class, config: of the folder.
        checkpoint: by the names of the files.
        dtype: of the parameters.

    Raises:
        ModelError: CS2005 when transformers misses a tensor, which it would fill with random values, or has another shape for it.
    """
    with _quiet():
        # One expert after the other, each with its own slice of the weights: the other forms need a multiple of their memory.
        loader = _Loader(build_on_meta(model_class, config, dtype, experts="eager"), checkpoint, dtype)
        unused = loader.settle()
    return LoadedClass(loader.model, loader.sources(), unused)


class _Loader:
    def __init__(self, model: PreTrainedModel, checkpoint: Mapping[str, TensorSource], dtype: torch.dtype) -> None:
        self.model, self._checkpoint, self._dtype = model, checkpoint, dtype
        self._targets: dict[str, list[str]] = {}
        # Kept for all runs: a group of renamings is switched on by the first of its names.
        self._transforms = get_model_conversion_mapping(model)

    def settle(self) -> tuple[str, ...]:
        """Run on all tensors without values, tie and compute buffers as ``from_pretrained`` does; the unused ones."""
        model = self.model
        empty = {
            name: torch.empty(source.shape, dtype=source.dtype, device="meta")
            for name, source in self._checkpoint.items()
        }
        info = self._run(empty, "meta")
        model.mark_tied_weights_as_initialized(info)
        model._move_missing_keys_from_meta_to_device(set(), None, None, None)  # type: ignore[arg-type]
        model._initialize_missing_keys(False)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
        wrong = [
            f"{name} is {list(found)}, the class has {list(wanted)}" for name, found, wanted in info.mismatched_keys
        ]
        wrong += [f"missing: {name}" for name in info.missing_keys]
        wrong += [f"not converted: {name}" for name in info.conversion_errors]
        if wrong:
            raise ModelError(
                "CS2005",
                "The config and the weights disagree.",
                where=type(model).__name__,
                why=f"transformers would fill with random values what it cannot load: {'; '.join(sorted(wrong)[:3])}.",
                hint="Use the config.json that was saved with these weights.",
            )
        return tuple(sorted(info.unexpected_keys))

    def sources(self) -> dict[str, TensorSource]:
        """One per state-dict name that stored tensors belong to."""
        state = self.model.state_dict()
        renamings = [each for each in self._transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in self._transforms if isinstance(each, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        stored: dict[str, list[str]] = {}
        self._targets.clear()
        for key in self._checkpoint:
            name, pattern = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            if name not in state and key in state:
                name, pattern = key, None
            patterns = by_pattern[pattern].target_patterns if pattern is not None else [""]
            self._targets[key] = [each for part in patterns if (each := name.replace(patterns[0], part)) in state]
            for target in self._targets[key]:
                stored.setdefault(target, []).append(key)
        return {name: _Loaded(self, name, tuple(stored[name]), state[name]) for name in state if name in stored}

    def load(self, name: str, keys: tuple[str, ...]) -> torch.Tensor:
        """The value transformers gives the parameter or buffer ``name`` when it loads the stored tensors ``keys``."""
        made = {each for key in keys for each in self._targets[key]}  # several, where a stored tensor is split
        before = {each: self.model.get_parameter_or_buffer(each) for each in made}
        with _quiet():
            self._run({key: _Slice(self._checkpoint[key]) for key in keys}, "cpu")
        value = self.model.get_parameter_or_buffer(name).detach()
        for each, placeholder in before.items():
            path, _, leaf = each.rpartition(".")
            setattr(self.model.get_submodule(path), leaf, placeholder)
        return value

    def _run(self, state: Mapping[str, Any], device: str) -> Any:
        config = LoadStateDictConfig(
            dtype=self._dtype, weight_mapping=self._transforms, device_map={"": torch.device(device)}
        )
        return convert_and_load_state_dict_in_model(self.model, dict(state), config)[0]


@dataclass(frozen=True)
class _Loaded:
    loader: _Loader
    name: str
    keys: tuple[str, ...]
    like: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.like.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def load(self) -> torch.Tensor:
        return self.loader.load(self.name, self.keys)


@dataclass(frozen=True)
class _Slice:
    """Reads when it is indexed, as a slice of a safetensors file does."""

    source: TensorSource

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.source.load()


@contextmanager
def _quiet() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with quiet_transformers():
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
