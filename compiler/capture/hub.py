"""Where MODEL lies: a folder here, or a model of a hub, fetched into the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from compile_sparse.compiler.capture.side_files import NEVER_COPIED, SIDE_FILES
from compile_sparse.compiler.errors import ModelError, UsageError

__all__ = ["find_model", "hub_id_of"]

HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def _in_any_case(pattern: str) -> str:
    """The pattern for matching that tells cases apart, as the hub's does."""
    return re.sub(
        r"\[[^]]*\]|[A-Za-z]",
        lambda found: f"[{found[0].strip('[]').lower()}{found[0].strip('[]').upper()}]",
        pattern,
    )


FETCHED = sorted({"*.json", "*.safetensors", *(_in_any_case(entry.pattern) for entry in SIDE_FILES)})
IGNORED = [_in_any_case(f"*{ending}") for ending in NEVER_COPIED]
"""Code and pickles stay behind, whatever the rest of their names is."""
_FILES = {
    ".gguf": ("a GGUF file", "Compile the safetensors folder that it was converted from"),
    ".onnx": ("an ONNX graph", "Compile the Hugging Face folder that it was exported from"),
    ".safetensors": ("a weight file", "Give the folder it lies in, with its config.json"),
    **dict.fromkeys(
        (".bin", ".pt", ".pth", ".ckpt"),
        (
            "a pickle, which runs code when it is opened",
            "Convert once in a place you trust, with save_pretrained(FOLDER)",
        ),
    ),
}


def find_model(model: str) -> Path:
    """The folder of ``model``: a folder, or ``ID`` or ``ID@REVISION`` of a hub that can be reached or has it in the cache.

    Raises:
        UsageError: CS1002 there is no such model.
        ModelError: CS2003 it is a file of another form.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        what, do = _FILES.get(path.suffix.lower(), ("a file", "Give the folder that save_pretrained wrote"))
        raise ModelError(
            "CS2003",
            f"{path.name} is {what}.",
            where="MODEL",
            why="A model is a folder with config.json and *.safetensors.",
            hint=f"{do}.",
        )
    why = "The path does not exist."
    if re.fullmatch(r"[\w.]+:\w+", model):
        why = "It names Python code, which this version does not run; save the model with save_pretrained."
    found = HUB_ID.fullmatch(model)
    if found and not Path(model).parent.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(
                    found["id"], revision=found["revision"], allow_patterns=FETCHED, ignore_patterns=IGNORED
                )
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            why = f"There is no such folder, and the hub gave nothing for this id ({type(error).__name__})."
    raise UsageError(
        "CS1002",
        f"There is no model at {model!r}.",
        where="MODEL",
        why=why,
        hint="Give a folder with config.json and *.safetensors, as save_pretrained writes it.",
    )


def hub_id_of(folder: Path) -> str:
    """The id of the model whose snapshot (``models--ORG--NAME/snapshots/COMMIT``) a folder of the hub's cache is; else empty."""
    if folder.parent.name != "snapshots":
        return ""
    kind, *parts = folder.parents[1].name.split("--")
    return "/".join(parts) if kind == "models" else ""
