"""The measuring process of transformers: its models, for the operations of ``backends.worker``."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils import _pytree as pytree

from compile_sparse.backends.worker.errors import RequestError
from compile_sparse.backends.worker.model import Array, Tokens
from compile_sparse.backends.worker.models import ModelWorker
from compile_sparse.backends.worker.serve import serve
from compile_sparse.compiler.runtimes.messages import Load, Loaded, Runtime
from compile_sparse.compiler.runtimes.wire import Report

__all__ = ["TransformersWorker", "main"]


class Model:
    """One loaded folder, as its own class in the precision of its weights.

    Nothing is fetched and no code of the folder is run.
    """

    outputs = ()
    share_buffer = False

    def __init__(self, folder: str, threads: int, device: str) -> None:
        config = Path(folder) / "config.json"
        if not config.is_file():
            raise RequestError(f"there is no config.json in {folder}")
        if device != "cpu":
            raise RequestError(f"unknown device {device!r}; known: cpu")
        torch.set_num_threads(threads)
        described = json.loads(config.read_text(encoding="utf-8"))
        self.module, report = _model_class(described).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        self.module.eval()
        self.missing = sorted(report["missing_keys"])
        for problem in ("unexpected_keys", "mismatched_keys", "error_msgs"):
            if report.get(problem):
                raise RequestError(f"{problem} while loading: {sorted(map(str, report[problem]))[:3]}")
        self.inputs = list(inspect.signature(self.module.forward).parameters)
        self.decoder = self.module.can_generate() and not self.module.config.is_encoder_decoder

    def generation(self, batch: int, capacity: int) -> Generation:
        """See ``worker.model``."""
        if not self.decoder:
            raise RequestError("this operation needs a decoder with a key-value cache")
        return Generation(self.module)

    @contextmanager
    def watch(self, values: Collection[str]) -> Iterator[Mapping[str, Array]]:
        """Outputs of the modules with these paths."""
        latest: dict[str, Array] = {}

        def keep(name: str, module: torch.nn.Module, arguments: object, output: object) -> None:
            if isinstance(output, torch.Tensor):
                latest[name] = output.detach().float().numpy().copy()  # modules may work in place

        modules = dict(self.module.named_modules())
        with ExitStack() as hooks:
            for name in set(values) & modules.keys():
                hooks.callback(modules[name].register_forward_hook(partial(keep, name)).remove)
            yield latest

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One call; tuples are spread over ``name.0``, ``name.1``, ..."""
        surplus = [name for name in feeds if name not in self.inputs]
        if surplus:
            raise RequestError(f"the model takes no {', '.join(surplus)}")
        with torch.inference_mode():
            result = self.module(**{name: self._given(value) for name, value in feeds.items()})
        found = {}
        for name, value in result.items():
            leaves = pytree.tree_leaves(value)
            for place, leaf in enumerate(leaves):
                found[name if len(leaves) == 1 else f"{name}.{place}"] = leaf.float().numpy()
        return found

    def _given(self, value: Array) -> torch.Tensor:
        """An input; images and audio in the type that the model computes in."""
        found = torch.from_numpy(value)
        return found.to(self.module.dtype) if found.is_floating_point() else found


def _model_class(config: Mapping[str, Any]) -> type[Any]:
    """transformers' own class that the config names; parts of a model are found next to its other classes."""
    names = config.get("architectures") or [None]
    found = getattr(transformers, str(names[0]), None)
    if found is None and config.get("model_type") in transformers.CONFIG_MAPPING:
        package = transformers.CONFIG_MAPPING[config["model_type"]].__module__.rpartition(".")[0]
        modeling = importlib.import_module(f"{package}.modeling_{package.rpartition('.')[2]}")
        found = getattr(modeling, str(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise RequestError(f"transformers {transformers.__version__} has no model class {names[0]!r}")
    return found


class Generation:
    """A batch of sequences of equal length growing through the cache."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._cache: Any = None

    def step(self, ids: Tokens) -> Array:
        """Logits ``[B, S, V]`` of new tokens ``ids [B, S]``."""
        with torch.inference_mode():
            result = self._module(
                input_ids=torch.from_numpy(np.ascontiguousarray(ids, np.int64)),
                past_key_values=self._cache,
                use_cache=True,
            )
        self._cache = result.past_key_values
        logits: Array = result.logits.float().numpy()
        return logits


class TransformersWorker(ModelWorker[Model]):
    """Answers for checkpoint folders."""

    def runtime(self) -> Runtime:
        return Runtime("transformers", transformers.__version__, "cpu")

    def open(self, folder: str, threads: int, device: str) -> Model:
        return Model(folder, threads, device)

    def load(self, request: Load, report: Report) -> Loaded:
        loaded = super().load(request, report)
        return replace(loaded, missing=self.model(request.name).missing)


def main(arguments: Sequence[str] = ()) -> int:
    """Serve until shutdown or end of input."""
    return serve(TransformersWorker().handlers())
