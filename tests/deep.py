"""Deeper variants of the tiny models, and the same model without one of its blocks: the oracle of depth pruning."""

from __future__ import annotations

import copy
from collections.abc import Collection
from functools import cache

import torch
import transformers as hf

from compile_sparse.compiler.capture import capture_model
from compile_sparse.compiler.ir.program import Program
from compile_sparse.testing.models import build_model

__all__ = ["DEPTH", "deep_model", "deep_program", "without_blocks"]

DEPTH = 4
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers")


@cache
def deep_model(name: str) -> hf.PreTrainedModel:
    """The model of ``compile_sparse.testing.models`` with ``DEPTH`` random blocks, the same weights every time."""
    shallow = build_model(name)
    settings = shallow.config.to_dict()
    for key in _DEPTH_KEYS:
        if key in settings:
            settings[key] = DEPTH
    for key in [key for key, value in settings.items() if key.startswith("layer_types") or value is None]:
        del settings[key]  # derived from the depth
    model = type(shallow)(type(shallow.config)(**settings))
    model.load_state_dict(shallow.state_dict(), strict=False)
    stack = _stack(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for index, block in enumerate(stack):
            for (_, parameter), (_, drawn) in zip(
                block.named_parameters(), _stack(shallow)[index % 2].named_parameters(), strict=True
            ):
                parameter.copy_(drawn + 0.02 * torch.randn(drawn.shape, generator=generator))
    return model.eval()


@cache
def deep_program(name: str) -> Program:
    """``deep_model``, captured."""
    return capture_model(deep_model(name))


def without_blocks(name: str, removed: Collection[int]) -> hf.PreTrainedModel:
    """A smaller model of the same class, built from its own config, with the weights of the blocks that are left."""
    full = deep_model(name)
    kept = [index for index in range(DEPTH) if index not in removed]
    config = copy.deepcopy(full.config)
    for key, value in vars(config).items():
        if key in _DEPTH_KEYS:
            setattr(config, key, len(kept))
        elif isinstance(value, list) and len(value) == DEPTH:
            setattr(config, key, [value[index] for index in kept])
    small = type(full)(config).eval()
    prefix = next(path for path, module in full.named_modules() if module is _stack(full))
    state = {}
    for key, value in full.state_dict().items():
        if key.startswith(prefix + "."):
            index, rest = key[len(prefix) + 1 :].split(".", 1)
            if int(index) in kept:
                state[f"{prefix}.{kept.index(int(index))}.{rest}"] = value
        else:
            state[key] = value
    small.load_state_dict(state)
    return small


def _stack(model: hf.PreTrainedModel) -> torch.nn.ModuleList:
    depth = next(getattr(model.config, key) for key in _DEPTH_KEYS if isinstance(getattr(model.config, key, None), int))
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)
