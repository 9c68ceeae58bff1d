"""Folders of images, prepared as the model's own ``preprocessor_config.json`` says (by transformers' classes on Pillow)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.verify.evaluation.lines import spread

__all__ = ["IMAGES", "read_images"]

IMAGES = 256
"""Images of a folder that are measured, where the recipe does not say: all of them are in memory at once."""
_ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
PREPARATION = "preprocessor_config.json"


def read_images(
    path: Path,
    folder: Path | None,
    class_of: Callable[[str, str], int],
    samples: int,
    image_size: tuple[int, int] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
    """Images ``[N, channels, height, width]`` and their classes ``[N]``; None where they do not lie in folders by class.

    Args:
        path: folder of images, or of one folder per class.
        folder: of the model.
        class_of: class of a folder's name; its second argument says where the name was found.
        samples: most images that are read, evenly spaced over the sorted paths.
        image_size: height and width, where not the description's.

    Raises:
        UsageError: CS1059 there is no Pillow, no description of the preparation, or no image; CS1058 a class that is not there.
    """
    if find_spec("PIL") is None:
        raise _cannot(path.name, "Pillow is not installed.", "pip install 'compile-sparse[images]'")
    if folder is None or not (folder / PREPARATION).is_file():
        why = f"The model's folder has no {PREPARATION}, so how images are prepared is not known."
        raise _cannot(path.name, why, "Restore the file, or prepare the images and give an .npz of pixel_values.")
    files = sorted(each for each in path.rglob("*") if each.suffix.lower() in _ENDINGS and each.is_file())
    depths = {len(each.relative_to(path).parts) for each in files}
    if not files or not depths <= {1, 2} or len(depths) > 1:
        why = "It holds no image." if not files else "Its images do not all lie in it, or all in one folder per class."
        raise _cannot(path.name, why, f"Put them into {path.name}/CLASS/; endings: {', '.join(sorted(_ENDINGS))}.")
    labels = None
    chosen = spread(files, samples)
    if depths == {2}:
        names = [each.parent.name for each in chosen]
        known = {name: class_of(name, f"{path.name}/{name}") for name in sorted(set(names))}
        labels = np.array([known[name] for name in names], np.int64)
    return _prepared(chosen, folder, image_size), labels


def _prepared(files: list[Path], folder: Path, image_size: tuple[int, int] | None) -> NDArray[np.float32]:
    from PIL import Image, UnidentifiedImageError
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
    except (OSError, ValueError, ImportError) as error:
        raise _cannot(
            PREPARATION, str(error).splitlines()[0], "Prepare the images and give an .npz instead."
        ) from error
    sizes = {} if image_size is None else _sizes(processor, *image_size)
    found = []
    for file in files:
        try:
            with Image.open(file) as image:
                found.append(processor(images=image.convert("RGB"), return_tensors="np", **sizes)["pixel_values"][0])
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise _cannot(f"{file.parent.name}/{file.name}", f"It cannot be read: {error}", "Take it out.") from error
    return np.stack(found).astype(np.float32)


def _sizes(processor: Any, height: int, width: int) -> dict[str, Any]:
    """Options of a processor that make images of another size the same way: what it cuts off stays the same share."""
    wanted = {"height": height, "width": width}
    crop, size = (getattr(processor, name, None) for name in ("crop_size", "size"))
    if not (getattr(processor, "do_center_crop", False) and crop and size):
        return {"size": wanted, "do_resize": True, "do_center_crop": False}
    if edge := size.get("shortest_edge"):
        scale = edge / min(crop["height"], crop["width"])
        return {"size": {"shortest_edge": round(scale * max(height, width))}, "crop_size": wanted}
    resized = {side: round(size[side] / crop[side] * wanted[side]) for side in wanted}
    return {"size": resized, "crop_size": wanted}


def _cannot(where: str, why: str, hint: str) -> UsageError:
    return UsageError("CS1059", "The folder of images cannot be read.", where=where, why=why, hint=hint)
