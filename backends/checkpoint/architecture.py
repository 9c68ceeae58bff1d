"""The Hugging Face class of a program, and the shapes its tensors have under a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compile_sparse.compiler.capture.folder import find_model_class
from compile_sparse.compiler.capture.skeleton import build_skeleton, quiet_transformers
from compile_sparse.compiler.errors import CompileSparseError, Refusal

__all__ = ["Architecture", "Invalid", "Path", "architecture_of", "assigned", "changed"]

Path = tuple[str | int, ...]
"""Where a field is in the config: ``("hidden_size",)``, ``("text_config", "hidden_size")`` or ``("hidden_sizes", 2)``."""

_ABOUT_THE_FILE = {"_name_or_path", "transformers_version", "auto_map"}
_REJECTIONS = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ZeroDivisionError)


class Invalid(Exception):
    """The class rejects a config."""


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers and a config it was built from.

    Attributes:
        model_class: named by ``architectures``.
        config: plain data for the config class, without what describes a file rather than a model.
    """

    model_class: type[PreTrainedModel]
    config: Mapping[str, Any]

    def parsed(self, config: Mapping[str, Any]) -> PretrainedConfig:
        """``config`` as the config class reads it.

        Raises:
            Invalid: it has values the class rejects.
        """
        try:
            with quiet_transformers():
                return CONFIG_MAPPING[str(self.config["model_type"])].from_dict(dict(config))
        except (*_REJECTIONS, StrictDataclassError) as error:
            raise Invalid(str(error)) from error

    def on_meta(self, config: PretrainedConfig) -> PreTrainedModel:
        """The model without storage. Raises Invalid."""
        try:
            with quiet_transformers(), torch.device("meta"):
                return self.model_class._from_config(config).eval()
        except _REJECTIONS as error:
            raise Invalid(str(error)) from error

    def skeleton(self, config: PretrainedConfig, mode: FakeTensorMode) -> PreTrainedModel:
        """The model with fake parameters in float32 and computed buffers. Raises Invalid."""
        try:
            return build_skeleton(self.model_class, config, torch.float32, mode)
        except (*_REJECTIONS, CompileSparseError) as error:
            raise Invalid(str(error)) from error

    def shapes(self, config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the state dict. Raises Invalid."""
        return {name: tuple(value.shape) for name, value in self.on_meta(config).state_dict().items()}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a program's config names.

    Raises:
        Refusal: CS4201 when it names none that transformers has.
    """
    names, kind = config.get("architectures") or [None], config.get("model_type")
    plain = {key: value for key, value in config.items() if key not in _ABOUT_THE_FILE}
    found = None
    if kind in CONFIG_MAPPING:
        with quiet_transformers():
            found = find_model_class(CONFIG_MAPPING[kind].from_dict(plain), str(names[0]))
    if found is None:
        raise Refusal(
            "CS4201",
            "This program did not come from a class of transformers.",
            where=f"architectures: {names[0]}",
            why="A Hugging Face folder is written in the conventions of the class that reads it.",
            hint="Compile for ort-cpu, which needs no class.",
        )
    return Architecture(found, plain)


def changed(config: Mapping[str, Any], changes: Mapping[Path, Any]) -> dict[str, Any]:
    """A copy of ``config`` with fields set."""
    result: Any = dict(config)
    for path, value in changes.items():
        inner = result
        for step in path[:-1]:
            inner[step] = inner[step].copy() if isinstance(inner[step], dict) else list(inner[step])
            inner = inner[step]
        inner[path[-1]] = value
    return result


def assigned(config: PretrainedConfig, fields: Mapping[Path, Any]) -> PretrainedConfig:
    """``config`` with fields set one by one, which the config's own validation does not see."""
    for path, value in fields.items():
        inner: Any = config
        for place, step in enumerate(path[:-1]):
            if isinstance(path[place + 1], int):
                setattr(inner, str(step), list(getattr(inner, str(step))))
            inner = getattr(inner, str(step))
        if isinstance(path[-1], int):
            inner[path[-1]] = value
        else:
            setattr(inner, path[-1], value)
    return config
