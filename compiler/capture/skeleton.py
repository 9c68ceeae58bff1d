"""The model's module tree with fake parameters: shapes everywhere, values nowhere (but for computed buffers)."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from compile_sparse.compiler.capture.config_file import rejected, rejections
from compile_sparse.compiler.errors import ModelError

__all__ = ["build_on_meta", "build_skeleton", "named_key", "new_fake_mode", "quiet_transformers", "untie"]


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


def build_on_meta(
    model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, *, experts: str
) -> PreTrainedModel:
    """Instantiate ``model_class`` on the meta device, in evaluation mode.

    Args:
        experts: how transformers computes experts.

    Raises:
        ModelError: CS2014 when the class rejects the config's values.
    """
    try:
        with torch.device("meta"):
            return model_class._from_config(copy.deepcopy(config), dtype=dtype, experts_implementation=experts).eval()
    except rejections() as error:
        raise rejected(error, "config.json") from error


def named_key(model_class: type[PreTrainedModel], config: PretrainedConfig, error: ModelError) -> ModelError:
    """The error of ``build_on_meta`` with the key that is to blame; builds the model once per key to find it."""
    cause = error.__cause__ or error
    build = lambda plain: model_class._from_config(type(config).from_dict(plain))  # noqa: E731
    with quiet_transformers(), torch.device("meta"):
        return rejected(cause, "config.json", config.to_dict(), build)


def build_skeleton(
    model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, mode: FakeTensorMode
) -> PreTrainedModel:
    """Instantiate ``model_class`` with fake CPU parameters and *real* non-persistent buffers.

    Non-persistent buffers (rotary frequencies, position ids) are not in a checkpoint; transformers recomputes them in
    ``_init_weights`` after loading, and so do we, module by module.

    Raises:
        ModelError: CS2014 when the class rejects the config's values.
    """
    with quiet_transformers():
        # The other implementations of experts choose rows by data (not exportable) or sort them (opaque to pruning).
        model = build_on_meta(model_class, config, dtype, experts="batched_mm")
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


def untie(model: PreTrainedModel, config: PretrainedConfig, names: Collection[str], mode: FakeTensorMode) -> None:
    """Give each of ``names``, tied parameters of a skeleton, a placeholder of its own.

    Args:
        model: a skeleton made in ``mode``; its config no longer says that it is tied.
        config: another that is to say so.
        names: state-dict names.
    """
    with mode:
        for name in names:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            tied = module._parameters[leaf]
            assert tied is not None
            fake = torch.empty(tied.shape, dtype=tied.dtype)
            module._parameters[leaf] = torch.nn.Parameter(fake, requires_grad=False)
    for top in (model.config, config):
        for each in (top, *(getattr(top, key) for key in top.sub_configs)):
            if getattr(each, "tie_word_embeddings", False):
                each.tie_word_embeddings = False
