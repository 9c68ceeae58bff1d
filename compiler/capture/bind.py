"""Match the checkpoint's tensors with the model's parameters by name and shape, assembling those stored in pieces."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from compile_sparse.compiler.capture.assemble import CannotAssemble, assembled
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.ir.weights import AbsentTensor, TensorSource

__all__ = ["bind_weights", "different_ties", "renamed"]

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def different_ties(model: PreTrainedModel, stored: Mapping[str, TensorSource]) -> list[str]:
    """Names that the config ties to another although the checkpoint has other values for them; transformers does not tie these.

    Fine-tuning leaves such folders: the head was trained, and the config still says that it is the embedding. Both tensors are
    read and compared only where the checkpoint has both.

    Source: ``PreTrainedModel.tie_weights``. Of the names that one tensor stands for, the first that is stored leads: the one that
    the others are tied to, else the first in the class's order.

    Args:
        model: a skeleton.
        stored: the checkpoint under the names of memory, see ``renamed``.
    """
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(target)
    different: list[str] = []
    for names in groups.values():
        leader, *others = [name for name in names if name in stored] or [""]
        different += [name for name in others if not _equal(stored[leader], stored[name])]
    return different


def _equal(one: TensorSource, other: TensorSource) -> bool:
    if one.shape != other.shape:  # said by bind_weights, with what the config implies
        return True
    return torch.equal(one.load(), other.load())


def bind_weights(model: PreTrainedModel, checkpoint: Mapping[str, TensorSource] | None) -> dict[str, TensorSource]:
    """A source for every state-dict name of ``model``; shapes only when ``checkpoint`` is None.

    Args:
        model: a skeleton, without the ties that do not hold (``different_ties``).
        checkpoint: under the names of memory, see ``renamed``.

    A tied tensor may be stored under any one of its names.

    Raises:
        ModelError: CS2005 when a tensor is missing or has another shape than the config implies.
    """
    wanted = model.state_dict(keep_vars=True)
    if checkpoint is None:
        return {name: AbsentTensor(tuple(value.shape), value.dtype, name) for name, value in wanted.items()}
    tied: dict[int, list[str]] = {}
    for name, value in wanted.items():
        tied.setdefault(id(value), []).append(name)
    sources: dict[str, TensorSource] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for name, value in wanted.items():
        found = next((checkpoint[n] for n in [name, *tied[id(value)]] if n in checkpoint), None)
        if found is None:
            missing.append(name)
        elif found.shape != tuple(value.shape):
            wrong.append(f"{name} is {list(found.shape)}, the config implies {list(value.shape)}")
        else:
            sources[name] = found
    surplus = _unexpected(checkpoint, wanted)
    if missing or wrong or surplus:
        why = [f"{_few(wrong)}."] if wrong else []
        why += [f"The checkpoint has more layers than the config: {_few(surplus)}."] if surplus else []
        why += [f"Missing: {_few(missing)}."] if missing else []
        raise ModelError(
            "CS2005",
            "The config and the weights disagree.",
            where=type(model).__name__,
            why=" ".join(why),
            hint="Use the config.json that was saved with these weights.",
        )
    return sources


def _unexpected(found: Mapping[str, TensorSource], wanted: Mapping[str, object]) -> list[str]:
    """Stored tensors that differ from the model's only in a layer number: the config says fewer layers.

    Other surplus tensors (a head that this model class does not have) are as harmless here as in transformers.
    """
    shapes = {NUMBER.sub("#", name) for name in wanted}
    return sorted(name for name in found if name not in wanted and NUMBER.sub("#", name) in shapes)


def _few(items: list[str]) -> str:
    return "; ".join(items[:3]) + (f"; and {len(items) - 3} more" if len(items) > 3 else "")


def renamed(model: PreTrainedModel, checkpoint: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """The checkpoint under the names and in the form the model uses in memory.

    transformers renames on load and save (older spellings, the base model's prefix), and its own table of renamings is used here.
    Tensors that are stored in pieces (fused experts) are assembled when they are loaded, see ``capture.assemble``.

    Raises:
        ModelError: CS2009 when pieces cannot be put together.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    found: dict[str, TensorSource] = {}
    pieces: dict[str, dict[str, list[str]]] = {}
    # transformers' own order: experts by number, and a group of renamings is switched on by the first of its names.
    for name in sorted(checkpoint, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:  # stored as in memory already
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if pattern is None:
            found[target] = checkpoint[name]
        else:
            pieces.setdefault(target, {}).setdefault(pattern, []).append(name)
    wanted = {name: tuple(value.shape) for name, value in state.items()}
    for target, names in pieces.items():
        sources = {pattern: [checkpoint[name] for name in stored] for pattern, stored in names.items()}
        converter = by_pattern[next(iter(names))]
        try:
            found.update(assembled(converter, target, sources, wanted))
        except CannotAssemble as reason:
            raise ModelError(
                "CS2009",
                "The checkpoint stores a tensor in pieces that cannot be put together.",
                where=next(iter(names.values()))[0],
                why=f"transformers assembles {target!r} from several stored tensors when it loads this model type; {reason}.",
                hint="Load and save the model once with transformers, without its original format.",
            ) from reason
    return found
