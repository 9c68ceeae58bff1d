"""Pooling, interpolation and moves between channels and space."""

from __future__ import annotations

from typing import Any

from torch import fx

from compile_sparse.backends.onnx.emission import Emission, Emitter, Unsupported, emits
from compile_sparse.backends.onnx.emitters.convolution import each
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.nodes import dimensions

__all__: list[str] = []


def _space(node: fx.Node, dims: int) -> list[int]:
    """Sizes of the last ``dims`` dimensions."""
    sizes = list(dimensions(node)[-dims:])
    if not all(isinstance(size, int) for size in sizes):
        raise Unsupported("space of dynamic size")
    return [int(size) for size in sizes]


def _first_output(node: fx.Node) -> Any:
    value = node.meta["val"]
    return value[0] if isinstance(value, (tuple, list)) else value


def _checked(emission: Emission, node: fx.Node, dims: int) -> dict[str, Any]:
    given = schema_arguments(node)
    if emission.rank(given["self"]) != dims + 2:
        raise Unsupported("its input has no batch dimension")
    return given


def _pool(op: str, dims: int) -> Emitter:
    def emit(emission: Emission, node: fx.Node) -> Any:
        given = _checked(emission, node, dims)
        if given.get("divisor_override"):
            raise Unsupported("a divisor of its own")
        kernel = each(given["kernel_size"], dims)
        strides = each(given["stride"], dims) if given["stride"] not in ([], None) else kernel
        padding = each(given["padding"], dims)
        dilation = each(given.get("dilation", 1), dims)
        if given["ceil_mode"]:
            # Without padding a window larger than the space is the space (EfficientNet's pooler).
            space = _space(given["self"], dims)
            kernel = [
                min(width, size) if not pad and step == 1 else width
                for width, size, pad, step in zip(kernel, space, padding, dilation, strict=True)
            ]
            _refuse_partial_windows(node, dims, space, kernel, strides, padding, dilation)
        options: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "pads": padding * 2}
        if op == "MaxPool":
            options["dilations"] = dilation
        else:
            options["count_include_pad"] = int(given["count_include_pad"])
        return _result(node, emission.graph.call(op, [emission.value(given["self"])], hint=node.name, **options))

    return emit


def _refuse_partial_windows(
    node: fx.Node,
    dims: int,
    space: list[int],
    kernel: list[int],
    strides: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    """Rounding up is the same as rounding down when windows fill the space; runtimes differ about the rest."""
    got = [int(size) for size in _first_output(node).shape[-dims:]]
    whole = [
        (size + 2 * pad - step * (width - 1) - 1) // stride + 1
        for size, width, stride, pad, step in zip(space, kernel, strides, padding, dilation, strict=True)
    ]
    if got != whole:
        raise Unsupported("windows that reach over the edge (ceil_mode)")


def _adaptive(op: str, dims: int) -> Emitter:
    def emit(emission: Emission, node: fx.Node) -> Any:
        given = _checked(emission, node, dims)
        wanted = [int(size) for size in _first_output(node).shape[-dims:]]
        source = emission.value(given["self"])
        if all(size == 1 for size in wanted):
            return _result(node, emission.graph.call(f"Global{op}", [source], hint=node.name))
        space = _space(given["self"], dims)
        if any(size % parts for size, parts in zip(space, wanted, strict=True)):
            raise Unsupported("windows of unequal size")
        steps = [size // parts for size, parts in zip(space, wanted, strict=True)]
        return _result(node, emission.graph.call(op, [source], hint=node.name, kernel_shape=steps, strides=steps))

    return emit


def _result(node: fx.Node, name: str) -> Any:
    """Operators that also give positions have two outputs; nobody reads the second."""
    if not isinstance(node.meta["val"], (tuple, list)):
        return name
    if any(user.args[1] == 1 for user in node.users):
        raise Unsupported("the positions of maxima")
    return [name, ""]


for _dims in (1, 2, 3):
    emits(f"aten::max_pool{_dims}d", f"aten::max_pool{_dims}d_with_indices")(_pool("MaxPool", _dims))
    emits(f"aten::avg_pool{_dims}d")(_pool("AveragePool", _dims))
    emits(f"aten::adaptive_avg_pool{_dims}d", f"aten::_adaptive_avg_pool{_dims}d")(_adaptive("AveragePool", _dims))
    emits(f"aten::adaptive_max_pool{_dims}d")(_adaptive("MaxPool", _dims))


def _resample(dims: int, **options: Any) -> Emitter:
    def emit(emission: Emission, node: fx.Node) -> str:
        given = schema_arguments(node)
        source = given["input"] if "input" in given else given["self"]
        before, after = _space(source, dims), _space(node, dims)
        factors = given.get("scale_factors") or [given.get(f"scales_{part}") for part in ("d", "h", "w")[-dims:]]
        for size, new, factor in zip(before, after, factors, strict=False):
            if factor is not None and size * factor != new:
                raise Unsupported("a factor that does not give a whole size")
        attributes = dict(options)
        if given.get("align_corners"):
            attributes["coordinate_transformation_mode"] = "align_corners"
        inputs = [emission.value(source), "", "", emission.graph.constant(after)]
        axes = list(range(2, 2 + dims))
        return emission.graph.call("Resize", inputs, hint=node.name, axes=axes, **attributes)

    return emit


_FLOOR = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
_CENTRE = {"mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_ceil"}
_LINEAR = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
for _dims, _linear in ((1, "linear"), (2, "bilinear"), (3, "trilinear")):
    emits(f"aten::upsample_nearest{_dims}d")(_resample(_dims, **_FLOOR))
    emits(f"aten::_upsample_nearest_exact{_dims}d")(_resample(_dims, **_CENTRE))
    emits(f"aten::upsample_{_linear}{_dims}d")(_resample(_dims, **_LINEAR))
emits("aten::upsample_bicubic2d")(_resample(2, **{**_LINEAR, "mode": "cubic"}, cubic_coeff_a=-0.75))


@emits("aten::pixel_shuffle")
def _pixel_shuffle(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    if emission.rank(node) != 4:
        raise Unsupported("pixel shuffle of other than images")
    factor = given["upscale_factor"]
    return emission.graph.call(
        "DepthToSpace", [emission.value(given["self"])], hint=node.name, blocksize=factor, mode="CRD"
    )
