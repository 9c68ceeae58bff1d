"""A Hugging Face model folder, opened without running anything in it."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compile_sparse.compiler.capture.quantized.detection import QUANTIZATION_FILES, find_method, without_quantization
from compile_sparse.compiler.capture.quantized.reading import Method
from compile_sparse.compiler.capture.side_files import find_side_files
from compile_sparse.compiler.errors import ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["ModelFolder", "find_model_class", "is_causal", "open_folder", "read_classes"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
MAX_CONFIG_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a config.json that transformers' own classes understand.

    Attributes:
        path: the folder.
        config: parsed by the config class of its ``model_type``.
        model_class: the transformers class named by ``architectures``.
        quantization: how its weights are quantized; None where they are not.
    """

    path: Path
    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    quantization: Method | None = None

    def digest(self) -> str:
        """sha256 over names and bytes of the config and every safetensors file: the identity of the source model."""
        described = [file for name in QUANTIZATION_FILES if (file := self.path / name).is_file()]
        return _digest([self.path / "config.json", *described, *sorted(self.path.glob("*.safetensors"))])

    def side_files_digest(self) -> str:
        """sha256 over everything else that decides how text becomes token ids, or is copied into an artifact."""
        return _digest(find_side_files(self.path))


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
        ModelError: CS2002 the architecture is not one of transformers' own; CS2020, CS2021 its weights are quantized in a way
            that is not read.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        path = _from_hub(str(model))
    raw = _read_config(path)
    return ModelFolder(path.resolve(), *read_classes(raw, path), find_method(raw, path))


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


def _from_hub(model: str) -> Path:
    why = "The path does not exist."
    if re.fullmatch(r"[\w.]+:\w+", model):
        why = "It names Python code, which this version does not run; save the model with save_pretrained."
    if HUB_ID.fullmatch(model) and not Path(model).parent.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            # The file patterns leave pickles and remote code behind.
            return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            why = f"There is no such folder, and the hub gave nothing for this id ({type(error).__name__})."
    raise UsageError(
        "CS1002",
        f"There is no model at {model!r}.",
        where="MODEL",
        why=why,
        hint="Give a folder with config.json and *.safetensors, as save_pretrained writes it.",
    )


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(
            "CS1003",
            "The model folder has no config.json.",
            where=path.name,
            why="A Hugging Face folder is recognised by its config.json.",
            hint="Point MODEL at the folder that save_pretrained wrote.",
        )
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {MAX_CONFIG_BYTES} bytes")
        raw = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError, OSError) as error:
        raise UsageError(
            "CS1003", "config.json cannot be read.", where=str(file.name), why=str(error), hint="Restore the file."
        ) from error
    return raw


def read_classes(raw: dict[str, Any], path: Path) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """The config and the model class that ``raw``, a config.json, describes. How weights are quantized is not part of it.

    Args:
        raw: plain data.
        path: the folder it is from, to be named in errors.

    Raises:
        UsageError, ModelError: see ``open_folder``.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
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
    try:
        with quiet_transformers():
            config = CONFIG_MAPPING[model_type].from_dict(without_quantization(raw))
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UsageError(
            "CS1003",
            "config.json has values its model type rejects.",
            where=f"{path.name}/config.json",
            why=str(error),
            hint="Compare it with a config of the same model_type.",
        ) from error
    names = raw.get("architectures") or []
    if names:
        model_class = find_model_class(config, str(names[0]))
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
