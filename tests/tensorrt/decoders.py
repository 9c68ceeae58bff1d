"""A tiny decoder with a static cache as a lowered folder, and what it should compute."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from compile_sparse.backends.tensorrt.description import DESCRIPTION_FILE, Description, Profile, Value
from tests.tensorrt.graphs import DECODER, decoder, decoder_profiles, save

PROMPT = 5
STEPS = 16
BATCH = 2
LENGTH = PROMPT + STEPS


def described(model: onnx.ModelProto, **fields: Any) -> Description:
    """What the lowering would write beside ``model``."""

    def values(protos: Any) -> tuple[Value, ...]:
        found = []
        for proto in protos:
            kind = proto.type.tensor_type
            shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
            found.append(
                Value(name=proto.name, dtype=helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape=shape)
            )
        return tuple(found)

    outputs = values(model.graph.output)
    aliases = {v.name: v.name.replace("present", "past_key_values") for v in outputs if v.name.startswith("present")}
    graph = {"inputs": values(model.graph.input), "outputs": outputs, "aliases": aliases}
    return Description(kind="text", precision="fp16", **graph, **fields)


def decoder_folder(folder: Path, *, precision: str = "float16", decomposable: bool = False) -> Path:
    model = decoder(precision=precision, decomposable=decomposable)
    save(model, folder, external=True)
    profiles = tuple(Profile.model_validate(profile) for profile in decoder_profiles(batch=BATCH, prompt=8))
    description = described(model, max_length=DECODER["max_length"], profiles=profiles)
    (folder / DESCRIPTION_FILE).write_text(description.model_dump_json())
    return folder


def full_forward(folder: Path, ids: np.ndarray[Any, Any]) -> torch.Tensor:
    """Logits of all positions at once in float64, by torch and without a cache, from the weights in ``folder``."""
    model = onnx.load(str(folder / "model.onnx"))
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()).double() for t in model.graph.initializer}
    heads, kv_heads, size = DECODER["heads"], DECODER["kv_heads"], DECODER["head_size"]
    batch, length = ids.shape
    cos, sin = weights["cos"][:length], weights["sin"][:length]

    def normal(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    def split(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(batch, length, count, size).transpose(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)

    x = weights["embedding"][torch.from_numpy(ids)]
    for i in range(DECODER["layers"]):
        n = normal(x)
        q, k = rotate(split(n @ weights[f"wq{i}"], heads)), rotate(split(n @ weights[f"wk{i}"], kv_heads))
        v = split(n @ weights[f"wv{i}"], kv_heads)
        k, v = (z.repeat_interleave(heads // kv_heads, 1) for z in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        x = x + attended @ weights[f"wo{i}"]
    return normal(x) @ weights["head"]


def tolerance(precision: str, expected: torch.Tensor) -> float:
    """Six standard deviations of what rounding does to a logit, and the rounding of the largest logit itself.

    Each of the about 20 values stored on the way through two layers is off by half a unit in its last place, at random; sums of
    64 terms add the root of their number of such errors when they are kept in ``precision`` too, which float16's are not.
    """
    half_unit = torch.finfo(getattr(torch, precision)).eps / 2
    terms = DECODER["width"] if precision == "float32" else 1
    return float(half_unit * (6 * math.sqrt(20 * terms) * expected.std() + expected.abs().max()))


def through_the_cache(model: Any, ids: np.ndarray[Any, Any], first: int = PROMPT) -> np.ndarray[Any, Any]:
    generation = model.generation(ids.shape[0], ids.shape[1])
    pieces = [generation.step(ids[:, :first])]
    pieces += [generation.step(ids[:, at : at + 1]) for at in range(first, ids.shape[1])]
    return np.concatenate(pieces, axis=1)
