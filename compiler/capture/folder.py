"""A Hugging Face model folder, opened without running anything in it."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compile_sparse.compiler.capture.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_of_adapter
from compile_sparse.compiler.capture.config_file import as_loaded, read_config, rejected, rejections
from compile_sparse.compiler.capture.hub import find_model, hub_id_of
from compile_sparse.compiler.capture.quantized.detection import QUANTIZATION_FILES, find_method, without_quantization
from compile_sparse.compiler.capture.quantized.reading import Method
from compile_sparse.compiler.capture.side_files import find_side_files
from compile_sparse.compiler.capture.weight_files import weight_files
from compile_sparse.compiler.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["ModelFolder", "find_model_class", "is_causal", "open_folder", "read_classes"]


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a config.json that transformers' own classes understand.

    Attributes:
        path: the folder.
        config: parsed by the config class of its ``model_type``.
        model_class: the transformers class named by ``architectures``.
        adapter: folder of a LoRA adapter that is merged into the model in ``path``; None for most.
        quantization: how its weights are quantized; None where they are not.
    """

    path: Path
    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    adapter: Path | None = None
    quantization: Method | None = None

    @property
    def name(self) -> str:
        """What people call it: the hub id of a snapshot in the hub's cache, else the folder's name."""
        named = self.adapter or self.path
        return hub_id_of(named) or named.name

    @property
    def commit(self) -> str:
        """The commit of a snapshot in the hub's cache; empty for any other folder."""
        named = self.adapter or self.path
        return named.name if hub_id_of(named) else ""

    def weight_files(self, *, required: bool = True) -> list[Path]:
        """The safetensors files that transformers would read; see ``capture.weight_files``."""
        return weight_files(self.path, getattr(self.config, "transformers_weights", None) or "", required=required)

    def digest(self) -> str:
        """sha256 over names and bytes of the config and every safetensors file: the identity of the source model."""
        described = [file for name in QUANTIZATION_FILES if (file := self.path / name).is_file()]
        own = [self.path / "config.json", *described, *self.weight_files(required=False)]
        return _digest(own + [self.adapter / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if self.adapter])

    def side_files_digest(self) -> str:
        """sha256 over everything else that decides how text becomes token ids, or is copied into an artifact."""
        paths = find_side_files(self.path)
        places = "\0".join(path.relative_to(self.path).as_posix() for path in paths)
        return hashlib.sha256(f"{places}\0{_digest(paths)}".encode()).hexdigest()


def _digest(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as handle:
            total.update(f"{path.name}\0{hashlib.file_digest(handle, 'sha256').hexdigest()}\0".encode())
    return total.hexdigest()


def open_folder(model: str | Path) -> ModelFolder:
    """Open a folder, or fetch a hub id when a hub is reachable.

    Raises:
        UsageError: CS1002 no such folder; CS1003 config.json missing or unreadable.
        ModelError: CS2002 the architecture is not one of transformers' own; CS2003 a file of another form; CS2014 values that no
            model can have; CS2015 an adapter whose base is missing; CS2020, CS2021 weights that are quantized in a way that is
            not read.
    """
    path = find_model(str(model))
    base = base_of_adapter(path)
    adapter, path = (None, path) if base is None else (path.resolve(), base)
    raw = read_config(path)
    return ModelFolder(path.resolve(), *read_classes(raw, path), adapter, find_method(raw, path))


def is_causal(model_class: type) -> bool:
    """Whether a class generates text token by token, by transformers' own list."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names.update(value if isinstance(value, (tuple, list)) else [value])
    return model_class.__name__ in names


def find_model_class(config: PretrainedConfig, name: str) -> type[PreTrainedModel] | None:
    """transformers' own class of that name, or None.

    Parts of a model (``WhisperEncoder``, as ``get_encoder().save_pretrained`` names it) are found next to the config's models.
    """
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        # Derived from transformers' config class, never from the file.
        package = type(config).__module__.rpartition(".")[0]
        models = importlib.import_module(f"{package}.modeling_{package.rpartition('.')[2]}")
        found = getattr(models, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return None


def read_classes(raw: dict[str, Any], path: Path) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """The config and the model class that ``raw``, a config.json, describes. How weights are quantized is not part of it.

    Args:
        raw: plain data.
        path: the folder it is from, to be named in errors.

    Raises:
        UsageError, ModelError: see ``open_folder``.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    from compile_sparse.compiler.capture.skeleton import quiet_transformers

    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        remote = " It names code of its own (auto_map), which is never run." if raw.get("auto_map") else ""
        raise ModelError(
            "CS2002",
            f"The model type {model_type!r} is unknown.",
            where=f"{path.name}/config.json",
            why=f"transformers {transformers.__version__} has no class for it.{remote}",
            hint="Use a model type of transformers, or a newer transformers.",
        )
    where = f"{path.name}/config.json"
    config_class, values = CONFIG_MAPPING[model_type], as_loaded(without_quantization(raw), where)
    with quiet_transformers():
        try:
            config = config_class.from_dict(dict(values))
        except rejections() as error:
            raise rejected(error, where, values, config_class.from_dict) from error
    names = raw.get("architectures") or []
    if names:
        model_class = find_model_class(config, names[0])
        if model_class is None:
            raise ModelError(
                "CS2002",
                f"The architecture {names[0]!r} is unknown.",
                where=f"{path.name}/config.json, architectures",
                why=f"transformers {transformers.__version__} has no such model class.",
                hint="Use an architecture of transformers, or a newer transformers.",
            )
        return config, model_class
    # Encoders that can also serve as a decoder (BERT) have this switch, and it is off.
    generates = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and getattr(config, "is_decoder", True)
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if generates else MODEL_MAPPING
    if type(config) not in mapping:
        raise ModelError(
            "CS2002",
            "config.json names no architecture.",
            where=f"{path.name}/config.json, architectures",
            why=f"{model_type!r} has no default model class.",
            hint="Add an 'architectures' list with the class that was trained.",
        )
    return config, mapping[type(config)]
