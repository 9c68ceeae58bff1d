"""The model's module tree with fake parameters: shapes everywhere, values nowhere (but for computed buffers)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from compile_sparse.compiler.errors import UsageError

__all__ = ["build_skeleton", "new_fake_mode", "quiet_transformers"]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers reports every config it builds; here only our own messages are wanted."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def new_fake_mode() -> FakeTensorMode:
    """A fake mode that real buffers may meet (export turns them into constants)."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def build_skeleton(
    model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, mode: FakeTensorMode
) -> PreTrainedModel:
    """Instantiate ``model_class`` with fake CPU parameters and *real* non-persistent buffers.

    Non-persistent buffers (rotary frequencies, position ids) are not in a checkpoint; transformers recomputes them in
    ``_init_weights`` after loading, and so do we, module by module.

    Raises:
        UsageError: CS1003 when the class rejects the config's values.
    """
    with quiet_transformers():
        try:
            with torch.device("meta"):
                # The other implementations of experts choose rows by data (not exportable) or sort them (opaque to pruning).
                model = model_class._from_config(
                    copy.deepcopy(config), dtype=dtype, experts_implementation="batched_mm"
                ).eval()
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
            raise UsageError(
                "CS1003",
                f"{model_class.__name__} cannot be built from this config.",
                where="config.json",
                why=str(error).splitlines()[0] if str(error) else type(error).__name__,
                hint="Compare its sizes with those of the checkpoint.",
            ) from error
        for module in model.modules():
            names = [n for n in module._non_persistent_buffers_set if module._buffers.get(n) is not None]
            for name in names:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")  # type: ignore[arg-type]
            if names:
                model._init_weights(module)
    _make_fake(model, mode)
    return model


def _make_fake(model: PreTrainedModel, mode: FakeTensorMode) -> None:
    made: dict[int, torch.nn.Parameter] = {}  # tied parameters stay tied
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = torch.nn.Parameter(fake, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type == "meta":
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
