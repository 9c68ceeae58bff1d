"""``quantization_config`` of compressed-tensors (0.17), which llm-compressor and others write."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from compile_sparse.compiler.capture.quantized.reading import misfit, parsed, unread

__all__ = ["CONFIG", "Arguments", "Config", "Group", "read_config"]

CONFIG = "config.json, quantization_config"
FORMATS = {
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mixed-precision", "dense"),
}
_LONGEST_PATTERN = 256


class Arguments(BaseModel):
    """Of weights or activations; keys that change nothing here (observers) are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_bits: int = Field(default=8, ge=1, le=16)
    type: Literal["int", "float"] = "int"
    strategy: Literal["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"] | None = None
    group_size: int | None = Field(default=None, ge=-1)
    block_structure: tuple[int, int] | None = None
    symmetric: bool = True
    dynamic: bool | Literal["local"] = False
    actorder: bool | str | None = None

    @field_validator("block_structure", mode="before")
    @classmethod
    def _old_spelling(cls, value: Any) -> Any:
        return value.split("x") if isinstance(value, str) else value

    @property
    def granularity(self) -> str:
        """The strategy, inferred from the group size as compressed-tensors does."""
        if self.strategy:
            return self.strategy
        return "tensor" if not self.group_size else "group" if self.group_size > 0 else "channel"


class Group(BaseModel):
    """How the layers that ``targets`` name are quantized."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    targets: tuple[str, ...] = ()
    weights: Arguments | None = None
    input_activations: Arguments | None = None
    output_activations: Arguments | None = None
    format: str | None = None


class Config(BaseModel):
    """The whole, without what is said elsewhere (which layers are ignored: they have no codes)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    config_groups: dict[str, Group]
    format: str = "dense"
    kv_cache_scheme: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None

    def group_of(self, module: str) -> Group:
        """The group of a module that has codes: the only one, or the one that names it best.

        Raises:
            ModelError: CS2021, no group is for it.
        """
        groups = list(self.config_groups.values())
        if len(groups) == 1:
            return groups[0]
        for matches in (_is_name, _is_pattern, _is_class):
            found = next((group for group in groups for target in group.targets if matches(target, module)), None)
            if found is not None:
                return found
        raise misfit(module, "It has codes, and none of the config's groups is for it.")


def _is_name(target: str, module: str) -> bool:
    return target == module


def _is_pattern(target: str, module: str) -> bool:
    if not target.startswith("re:") or len(target) > _LONGEST_PATTERN:
        return False
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error as error:
        raise misfit(CONFIG, f"{target!r} is no regular expression: {error}.") from error


def _is_class(target: str, module: str) -> bool:
    return target == "Linear"


def read_config(raw: Any) -> Config:
    """The config, when it describes a form that is read.

    Raises:
        ModelError: CS2020 for another form, CS2021 for a config that is not one.
    """
    config = parsed(Config, raw, CONFIG)
    for form in (config.format, *(group.format for group in config.config_groups.values())):
        if form is not None and form not in FORMATS:
            raise unread(
                f"The compressed-tensors format {form!r} is not read by this version.",
                where=CONFIG,
                why=f"It reads {', '.join(sorted(FORMATS))}.",
            )
    sparse = (config.sparsity_config or {}).get("format", "dense")
    if sparse != "dense":
        why = "The zeros are left out of the file in a layout of their own."
        raise unread(f"The sparse format {sparse!r} is not read by this version.", where=CONFIG, why=why)
    if config.transform_config and config.transform_config.get("config_groups"):
        why = "Its activations are rotated when the model runs (transform_config), which the model's class does not do."
        raise unread("Checkpoints with transforms are not read by this version.", where=CONFIG, why=why)
    return config
