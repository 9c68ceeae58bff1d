"""Which profile a call uses, and which memory its inputs and outputs are in.

Unverified: written against the bindings' types and tested with a double that reads and writes the addresses it is given; never
run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from compile_sparse.backends.tensorrt.description import Description, Profile, Value
from compile_sparse.backends.worker.errors import RequestError

if TYPE_CHECKING:
    import tensorrt_rtx as trt
    import torch

__all__ = ["bind", "fitting_profile", "largest_call", "torch_type"]

Shape = tuple[int, ...]


def torch_type(name: str) -> torch.dtype:
    """Torch's type by numpy's name of it.

    Raises:
        RequestError: there is none.
    """
    import torch

    found = getattr(torch, {"bool": "bool"}.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise RequestError(f"torch has no type {name!r}")
    return found


def fitting_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> Profile:
    """The profile whose ranges hold ``shapes`` and whose kernels were chosen for the nearest ones.

    Raises:
        RequestError: none holds them.
    """
    fitting = [profile for profile in profiles if _holds(profile, shapes)]
    if not fitting:
        ranges = "; ".join(
            f"{profile.name}: "
            + ", ".join(f"{name} {list(low)} to {list(high)}" for name, (low, _, high) in profile.shapes.items())
            for profile in profiles
        )
        wanted = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise RequestError(f"the engine was not built for {wanted}; it was for {ranges}")
    return min(fitting, key=lambda profile: _distance(profile, shapes))


def _holds(profile: Profile, shapes: Mapping[str, Shape]) -> bool:
    for name, (low, _, high) in profile.shapes.items():
        if name in shapes and not all(a <= b <= c for a, b, c in zip(low, shapes[name], high, strict=True)):
            return False
    return True


def _distance(profile: Profile, shapes: Mapping[str, Shape]) -> int:
    return sum(
        abs(a - b)
        for name, (_, best, _) in profile.shapes.items()
        if name in shapes
        for a, b in zip(best, shapes[name], strict=True)
    )


def largest_call(profiles: Sequence[Profile], name: str, axis: int) -> int | None:
    """Largest size of one dimension of an input that some profile holds; None when none says so: the dimension is fixed."""
    return max((profile.shapes[name][2][axis] for profile in profiles if name in profile.shapes), default=None)


def bind(
    context: trt.IExecutionContext, description: Description, feeds: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tell ``context`` the shapes and addresses of one call; the outputs' buffers by name.

    An output that shares an input's memory gets that input's address: the cache grows in place. ``feeds`` and the result must
    live until the call has ended.

    Raises:
        RequestError: an input is missing, of another type or not contiguous, or the context refuses a shape.
    """
    import torch

    for value in description.inputs:
        if value.name not in feeds:
            raise RequestError(f"feeds lack {value.name}")
        _bind_input(context, value, feeds[value.name])
    if unknown := list(context.infer_shapes()):
        raise RequestError(f"TensorRT does not know the shapes of {', '.join(map(str, unknown))}")
    results = {}
    for value in description.outputs:
        if value.name in description.aliases:
            result = feeds[description.aliases[value.name]]
        else:
            dims = context.get_tensor_shape(value.name)
            shape = [int(dims[axis]) for axis in range(len(dims))]
            device = next(iter(feeds.values())).device
            result = torch.empty(shape, dtype=torch_type(value.dtype), device=device)
        if not context.set_tensor_address(value.name, result.data_ptr()):
            raise RequestError(f"TensorRT has no output {value.name}")
        results[value.name] = result
    return results


def _bind_input(context: trt.IExecutionContext, value: Value, feed: torch.Tensor) -> None:
    if feed.dtype != torch_type(value.dtype):
        raise RequestError(f"{value.name} must be {value.dtype}, got {feed.dtype}")
    if not feed.is_contiguous():
        raise RequestError(f"{value.name} is not contiguous")
    if not context.set_input_shape(value.name, tuple(feed.shape)):
        raise RequestError(f"TensorRT refuses the shape {list(feed.shape)} of {value.name}")
    if not context.set_tensor_address(value.name, feed.data_ptr()):
        raise RequestError(f"TensorRT has no input {value.name}")
