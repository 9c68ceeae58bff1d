"""From tensors in memory to tensors on disk, as ``save_pretrained`` would write them, one at a time.

transformers renames on save and takes fused tensors apart (experts). Its own table decides; here it is applied to names and meta
tensors first, and to values only when a tensor is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.ir.weights import DerivedTensor, LastComputed, TensorSource

__all__ = ["on_disk"]


@dataclass(frozen=True)
class _Conversion:
    """One entry of transformers' table applied to the tensors it joins or splits.

    Attributes:
        target: name the table gives the result before it is expanded.
        converter: the reversed entry.
        parts: pattern -> in-memory name of the tensor that matched it.
    """

    target: str
    converter: WeightConverter
    parts: Mapping[str, str]

    def __call__(self, model: PreTrainedModel, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = deepcopy(self.converter)
        for pattern, name in self.parts.items():
            converter.add_tensor(self.target, name, pattern, values[name])
        found = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


def on_disk(model: PreTrainedModel, sources: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Sources by the names of the checkpoint, in the order they should be written.

    Memory while writing: one tensor, or one fused tensor and its pieces.

    Args:
        model: on the meta device, of the sizes of ``sources``.
        sources: by state-dict name; tied tensors under any or all of their names.

    Raises:
        Refusal: CS4204 when transformers cannot undo a conversion for these sizes.
    """
    state = {name: value for name, value in model.state_dict().items() if name in sources}
    for pattern in model._keys_to_ignore_on_save or ():
        state.pop(pattern, None)
    state = remove_tied_weights_from_state_dict(state, model)
    # As transformers does for a model that was made, not loaded: neither older spellings nor a prefix come back.
    table = [t for t in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(t, PrefixChange)]
    reverse = [entry.reverse_transform() for entry in table[::-1]]
    renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    result: dict[str, TensorSource] = {}
    parts: dict[str, dict[str, str]] = {}
    for name in sorted(state, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, reverse=True)
        if pattern is None:
            result[target] = sources[name]
        else:
            parts.setdefault(target, {})[pattern] = name
    last: LastComputed[dict[str, torch.Tensor]] = LastComputed()
    for target, names in parts.items():
        conversion = _Conversion(target, by_pattern[next(iter(names))], names)
        shapes = {
            name: torch.empty(sources[name].shape, dtype=sources[name].dtype, device="meta") for name in names.values()
        }
        for name, value in _tried(conversion, model, shapes).items():
            result[name] = DerivedTensor(
                tuple(value.shape), value.dtype, _Piece(conversion, name, model, sources, last)
            )
    return result


@dataclass(frozen=True)
class _Piece:
    """One tensor of a conversion, computed on load. The pieces of one fused tensor are written one after the other."""

    conversion: _Conversion
    name: str
    model: PreTrainedModel
    sources: Mapping[str, TensorSource]
    last: LastComputed[dict[str, torch.Tensor]]

    def __call__(self) -> torch.Tensor:
        return self.last.get(self.conversion.target, self._converted)[self.name]

    def _converted(self) -> dict[str, torch.Tensor]:
        return self.conversion(self.model, {part: self.sources[part].load() for part in self.conversion.parts.values()})


def _tried(conversion: _Conversion, model: PreTrainedModel, shapes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    try:
        return conversion(model, shapes)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        raise Refusal(
            "CS4204",
            "A tensor cannot be brought into the form of the checkpoint.",
            where=next(iter(conversion.parts.values())),
            why=f"transformers' own conversion for {type(model).__name__} fails on these sizes: {error}",
            hint="Compile for ort-cpu, or prune without this kind.",
        ) from error
