"""A small program for every operator with an axis rule, and the axes of it that are free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from compile_sparse.compiler.ir import ops

TOLERANCE = 1e-5
_own = torch.ops.compile_sparse
assert ops  # importing registers the operators


class Case(NamedTuple):
    function: Callable[..., Any]
    shapes: Sequence[tuple[int, ...]]
    free: Sequence[int]
    """Sizes of the axes that must be free: a rule that froze everything would pass trivially."""
    form: str = "commutes"
    integers: dict[int, int] = {}
    """Input number -> exclusive upper bound, for index inputs."""


def _qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _cached(q: Any, k: Any, v: Any, pk: Any, pv: Any, cos: Any, sin: Any) -> Any:
    mask = torch.ones(2, 8, dtype=torch.long)
    return _own.cached_attention(q, k, v, pk, pv, mask, cos, sin, 4, 2, 0.35, 0)


def _fp8(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn)


def _fp4(q: torch.Tensor, s: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return _own.dequantize_nvfp4(q.to(torch.int8), _fp8(s), g.abs() + 1)


CASES: dict[str, Case] = {
    "merge": Case(lambda x: x.reshape(3, 20), [(3, 4, 5)], [3, 4, 5]),
    "split": Case(lambda x: x.reshape(3, 4, 5), [(3, 20)], [3, 4, 5]),
    "regroup": Case(lambda x: x.reshape(4, 6, 5), [(4, 2, 3, 5)], [4, 2, 3, 5]),
    "shuffle": Case(lambda x: x.view(3, 4, 5).transpose(1, 2).reshape(3, 20), [(3, 20)], [3, 4, 5]),
    "flatten": Case(lambda x: x.flatten(1), [(3, 4, 5)], [3, 4, 5]),
    "permute": Case(lambda x: x.permute(2, 0, 1), [(3, 4, 5)], [3, 4, 5]),
    "squeeze": Case(lambda x: x.unsqueeze(1).squeeze(1).t(), [(3, 4)], [3, 4]),
    "expand": Case(lambda x: x[:, None].expand(3, 6, 4), [(3, 4)], [3, 4]),
    "copies": Case(lambda x: x[:, :, None].expand(3, 4, 2, 5).reshape(3, 8, 5), [(3, 4, 5)], [3, 4, 5]),
    "cat": Case(lambda x, y: torch.cat([x, y, x], 1), [(3, 4), (3, 5)], [3, 4, 5]),
    "rotate_half": Case(
        lambda x, c: x * torch.cat([c, c], -1) + torch.cat([-x[..., 4:], x[..., :4]], -1), [(3, 8), (4,)], [3, 4]
    ),
    "slice": Case(lambda x: x[:, 2:5], [(3, 8)], [3, 2, 3, 3]),
    "negative_slice": Case(lambda x: x[:, -5:-1], [(3, 8)], [1, 3, 3, 4]),
    "narrow": Case(lambda x: x.narrow(1, 2, 4), [(3, 8)], [3, 2, 4, 2]),
    "stride": Case(lambda x: torch.cat([x[:, 1::2], x[:, 0::2]], 1), [(3, 8)], [3, 4]),
    "chunk": Case(lambda x: torch.mul(*x.chunk(2, 1)), [(3, 8)], [3, 4]),
    "split_sizes": Case(lambda x: x.split([2, 6], 1)[1], [(3, 8)], [3, 2, 6]),
    "select": Case(lambda x: x[:, 2], [(3, 4, 5)], [3, 5]),
    "unbind": Case(lambda x: x.unbind(1)[0], [(3, 4, 5)], [3, 5]),
    "repeat_interleave": Case(lambda x: x.repeat_interleave(2, 1), [(3, 4)], [3, 4]),
    "repeat": Case(lambda x: x.repeat(1, 2), [(3, 4)], [3, 4]),
    "repeated_copies": Case(lambda x, y: x.repeat(2, 1, 5) * y, [(3, 1), (2, 3, 5)], [2, 3, 5]),
    "repeated_tiles": Case(lambda x, y: x.repeat(2, 3) * y, [(3, 4), (6, 12)], [2, 3, 3, 4]),
    "empty_slice": Case(lambda x: torch.cat([x[:, :4], x[:, 4:]], 1), [(3, 4)], [3, 4]),
    "pad": Case(lambda x: F.pad(x, (1, 1)), [(3, 4)], [3]),
    "tril": Case(lambda x: x.tril(), [(3, 4, 4)], [3]),
    "flip": Case(lambda x: x.flip(1), [(3, 4)], [3]),
    "roll": Case(lambda x: x.roll(1, 1), [(3, 4)], [3]),
    "pointwise": Case(lambda x, y: F.silu(x) * y + 1, [(3, 4), (4,)], [3, 4]),
    "where": Case(lambda x, y: torch.where(x > 0, x, y), [(3, 4), (3, 1)], [3, 4]),
    "masked_fill": Case(lambda x, y: x.masked_fill(y > 0, -1.0), [(3, 4), (4,)], [3, 4]),
    "cast": Case(lambda x: x.double().float().clone().contiguous(), [(3, 4)], [3, 4]),
    "fill": Case(lambda x: x * torch.full((4,), 2.0) + torch.ones_like(x) + x.new_zeros(3, 4), [(3, 4)], [3, 4]),
    "minimum": Case(lambda x, y: torch.min(x, y), [(3, 4), (4,)], [3, 4]),
    "linear": Case(F.linear, [(3, 4), (5, 4), (5,)], [3, 4, 5], "reduces"),
    "matmul": Case(torch.matmul, [(2, 3, 4), (2, 4, 5)], [2, 3, 4, 5], "reduces"),
    "broadcast_matmul": Case(torch.matmul, [(2, 3, 4), (4, 5)], [2, 3, 4, 5], "reduces"),
    "addmm": Case(torch.addmm, [(5,), (3, 4), (4, 5)], [3, 4, 5], "reduces"),
    "baddbmm": Case(torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)], [2, 3, 4, 5], "reduces"),
    "einsum": Case(lambda x, y: torch.einsum("bik,bjk->bij", x, y), [(2, 3, 4), (2, 5, 4)], [2, 3, 4, 5], "reduces"),
    "attention": Case(_qkv, [(2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 8)], [2, 3, 4, 6, 8], "reduces"),
    "grouped_attention": Case(_grouped, [(2, 6, 4, 5), (2, 3, 9, 5), (2, 3, 9, 7)], [2, 2, 3, 4, 5, 7], "reduces"),
    "conv": Case(F.conv2d, [(2, 4, 5, 5), (6, 4, 3, 3), (6,)], [2, 4, 6], "reduces"),
    "conv1d": Case(F.conv1d, [(2, 4, 5), (6, 4, 3)], [2, 4, 6], "reduces"),
    "depthwise": Case(lambda x, w: F.conv2d(x, w, groups=4), [(2, 4, 5, 5), (4, 1, 3, 3)], [2, 4], "reduces"),
    "grouped_conv": Case(lambda x, w: F.conv2d(x, w, groups=2), [(2, 4, 5, 5), (6, 2, 3, 3)], [2, 2, 2, 3], "reduces"),
    "conv_same": Case(lambda x, w: F.conv2d(x, w, padding="same"), [(2, 4, 5, 5), (6, 4, 3, 3)], [2, 4, 6], "reduces"),
    "conv3d": Case(F.conv3d, [(2, 4, 3, 3, 3), (6, 4, 2, 2, 2), (6,)], [2, 4, 6], "reduces"),
    "transposed_conv": Case(
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), [(2, 4, 3, 3), (4, 6, 3, 3), (6,)], [2, 4, 6], "reduces"
    ),
    "transposed_conv1d": Case(F.conv_transpose1d, [(2, 4, 5), (4, 6, 3), (6,)], [2, 4, 6], "reduces"),
    "grouped_transposed_conv": Case(
        lambda x, w, b: F.conv_transpose2d(x, w, b, groups=3),
        [(2, 12, 3, 3), (12, 5, 3, 3), (15,)],
        [2, 3, 4, 5],
        "reduces",
    ),
    "convolution": Case(
        lambda x, w: torch.convolution(x, w, None, [1], [0], [1], True, [0], 2),
        [(2, 6, 5), (6, 4, 3)],
        [2, 2, 3, 4],
        "reduces",
    ),
    "pools": Case(
        lambda x: (
            F.max_pool2d(x, 2)
            + F.avg_pool2d(x, 2)
            + F.adaptive_max_pool2d(x, 3)
            + F.max_pool2d(x, 2, 2, 0, 1, False, True)[0]
        ),
        [(2, 4, 6, 6)],
        [2, 4],
    ),
    "pools_of_a_line": Case(
        lambda x: F.max_pool1d(x, 2) + F.avg_pool1d(x, 2) + F.adaptive_avg_pool1d(x, 3) + F.adaptive_max_pool1d(x, 3),
        [(2, 4, 6)],
        [2, 4],
    ),
    "pools_of_a_volume": Case(
        lambda x: F.max_pool3d(x, 2) + F.avg_pool3d(x, 2) + F.adaptive_avg_pool3d(x, 2), [(2, 4, 4, 4, 4)], [2, 4]
    ),
    "pool_without_batch": Case(lambda x: F.avg_pool2d(x, 2), [(4, 6, 6)], [4]),
    "interpolation": Case(
        lambda x: (
            F.interpolate(x, scale_factor=2)
            + F.interpolate(x, scale_factor=2, mode="bilinear")
            + F.interpolate(x, size=(6, 6), mode="bicubic")
            + F.interpolate(x, size=(6, 6), mode="nearest-exact")
            + F.interpolate(x, size=(6, 6), mode="bilinear", antialias=True)
        ),
        [(2, 4, 3, 3)],
        [2, 4],
    ),
    "interpolation_of_a_line": Case(
        lambda x: F.interpolate(x, size=6) + F.interpolate(x, size=6, mode="linear"), [(2, 4, 3)], [2, 4]
    ),
    "patches": Case(lambda x: F.unfold(x, (2, 3)), [(2, 4, 5, 5)], [2, 4]),
    "patches_put_back": Case(lambda x: F.fold(x, (5, 5), (2, 3)), [(2, 24, 12)], [2, 4]),
    "pixel_shuffle": Case(lambda x: F.pixel_shuffle(x, 2), [(2, 12, 3, 3)], [2, 3]),
    "pixel_unshuffle": Case(lambda x: F.pixel_unshuffle(x, 2), [(2, 3, 6, 6)], [2, 3]),
    "channel_shuffle": Case(lambda x: F.channel_shuffle(x, 3), [(2, 12, 2, 2)], [2, 2, 2, 3, 4]),
    "windows": Case(lambda x: x.unfold(1, 3, 2), [(3, 7, 4)], [3, 4]),
    "padded_beside": Case(lambda x: F.pad(x, (0, 0, 1, 2)), [(2, 3, 4)], [2, 4]),
    "padded_by_reflection": Case(lambda x: F.pad(x, (1, 2), mode="reflect"), [(2, 3, 4)], [2, 3]),
    "padded_by_nothing": Case(lambda x: F.pad(x, (0, 0, 0, 0)), [(2, 3, 4)], [2, 3, 4]),
    "slice_across_windows": Case(lambda x: x.reshape(2, 3, 3, 4).reshape(2, 9, 4)[:, :8], [(2, 9, 4)], [2, 4]),
    "stride_of_a_part": Case(lambda x: x[:, 1:6:2], [(3, 8, 4)], [3, 4]),
    "instance_norm": Case(
        lambda x, w, m: F.instance_norm(x, None, None, w, m) + F.instance_norm(x, m, w.abs() + 1, w, m, False),
        [(2, 6, 4), (6,), (6,)],
        [2, 6],
    ),
    "gated_linear_unit": Case(lambda x: F.glu(x, 1), [(2, 8, 3)], [2, 4, 3]),
    "slopes": Case(lambda x, a: F.prelu(x, a), [(2, 4, 3), (4,)], [2, 4, 3]),
    "one_slope": Case(lambda x, a: F.prelu(x, a), [(2, 4, 3), (1,)], [2, 4, 3]),
    "untagged_pointwise": Case(lambda x: F.hardswish(x) + F.logsigmoid(x), [(3, 4)], [3, 4]),
    "cumprod": Case(lambda x: x.cumprod(-1), [(3, 6)], [3, 6], "reduces"),
    "logcumsumexp": Case(lambda x: x.logcumsumexp(-1), [(3, 6)], [3, 6], "reduces"),
    "einsum_without_result": Case(lambda x, y: torch.einsum("ki,ij", x, y), [(3, 4), (4, 5)], [3, 4, 5], "reduces"),
    "einsum_with_dots": Case(
        lambda x, y: torch.einsum("...i,oi->...o", x, y), [(2, 3, 4), (5, 4)], [2, 3, 4, 5], "reduces"
    ),
    "einsum_stretched": Case(lambda x, y: torch.einsum("bij,bj->bi", x, y), [(1, 3, 4), (2, 4)], [2, 3, 4], "reduces"),
    "einsum_of_blocks": Case(
        lambda x, y: torch.einsum("bhi,hio->bho", x, y), [(2, 3, 4), (3, 4, 5)], [2, 3, 4, 5], "reduces"
    ),
    "pool": Case(lambda x: F.max_pool2d(x, 2), [(2, 4, 6, 6)], [2, 4]),
    "adaptive_pool": Case(lambda x: F.adaptive_avg_pool2d(x, 2), [(2, 4, 6, 6)], [2, 4]),
    "layer_norm": Case(lambda x, w, b: F.layer_norm(x, (6,), w, b), [(3, 6), (6,), (6,)], [3, 6], "reduces"),
    "rms_norm": Case(lambda x, w: F.rms_norm(x, (6,), w, 1e-6), [(3, 6), (6,)], [3, 6], "reduces"),
    "primitive_rms": Case(
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), [(3, 6)], [3, 6], "reduces"
    ),
    "group_norm": Case(lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 6, 4), (6,), (6,)], [2, 2, 3], "reduces"),
    "batch_norm": Case(lambda x, m, w: F.batch_norm(x, m, w.abs() + 1, w, m), [(2, 6, 4), (6,), (6,)], [2, 6, 4]),
    "softmax": Case(lambda x: x.softmax(-1), [(3, 6)], [3, 6], "reduces"),
    "log_softmax": Case(lambda x: x.log_softmax(-1), [(3, 6)], [3, 6], "reduces"),
    "cumsum": Case(lambda x: x.cumsum(-1), [(3, 6)], [3, 6], "reduces"),
    "mean": Case(lambda x: x.mean((0, 2)), [(3, 4, 5)], [3, 4, 5], "reduces"),
    "sum": Case(lambda x: x.sum(), [(3, 4)], [3, 4], "reduces"),
    "amax": Case(lambda x: x.amax(-1, keepdim=True), [(3, 4)], [3, 4], "reduces"),
    "max_dim": Case(lambda x: x.max(-1)[0], [(3, 4)], [3, 4], "reduces"),
    "variance": Case(lambda x: x.var(-1, correction=0), [(3, 6)], [3, 6], "reduces"),
    "argmax": Case(lambda x, y: y.index_select(0, x.argmax(-1)), [(3, 4), (4, 5)], [3, 4, 5], "reduces"),
    "topk": Case(lambda x: torch.gather(x, -1, x.topk(1, -1)[1]) + x.topk(1, -1)[0], [(3, 6)], [3, 6], "reduces"),
    "experts": Case(lambda x, w: w[x.topk(1, -1)[1].squeeze(-1)], [(3, 6), (6, 5)], [3, 6, 5], "reduces"),
    "chosen_matrices": Case(
        lambda x, r, w: torch.bmm(w[r.topk(1, -1)[1].reshape(-1)], x.unsqueeze(-1)).squeeze(-1),
        [(3, 4), (3, 6), (6, 5, 4)],
        [3, 4, 6, 5],
        "reduces",
    ),
    "one_hot": Case(lambda x: F.one_hot(x.argmax(-1), 6).float() * x, [(3, 6)], [3, 6], "reduces"),
    "argmax_as_number": Case(lambda x: x.argmax(-1) * 2.0, [(3, 6)], [3]),
    "embedding": Case(F.embedding, [(3, 4), (7, 5)], [3, 4, 5], integers={0: 7}),
    "index": Case(lambda x, i: x[:, i], [(3, 7, 5), (4,)], [3, 5, 4], integers={1: 7}),
    "two_indices": Case(lambda x, i, j: x[i, :, j], [(3, 7, 5), (4,), (4,)], [7, 4], integers={1: 3, 2: 5}),
    "sort": Case(lambda x: x.sort(-1)[0], [(3, 6)], [3]),
    "arange": Case(lambda x: x + torch.arange(6), [(3, 6)], [3]),
    "stack": Case(lambda x, y: torch.stack([x, y], 1), [(3, 6), (3, 6)], [3, 6]),
    "interleave": Case(
        lambda x, c: x * c.repeat_interleave(2, -1) + torch.stack([-x[:, 1::2], x[:, ::2]], -1).flatten(-2),
        [(3, 8), (4,)],
        [3, 4],
    ),
    "own_rms_norm": Case(lambda x, w: _own.rms_norm(x, w, 1e-6), [(3, 6), (6,)], [3, 6], "reduces"),
    "residual_norm": Case(
        lambda x, r, w: _own.residual_rms_norm(x, r, w, 1e-6), [(3, 6), (3, 6), (6,)], [3, 6], "reduces"
    ),
    "channel_scales": Case(
        lambda q, s: _own.dequantize_weight(q.to(torch.int8), s, 1, 0), [(5, 6), (5,)], [5, 6], integers={0: 7}
    ),
    "group_scales": Case(
        lambda q, s: _own.dequantize_weight(q.to(torch.int8), s, 1, 2), [(5, 6), (5, 3)], [5, 3], integers={0: 7}
    ),
    "transposed_scales": Case(
        lambda q, s: _own.dequantize_weight(q.to(torch.int8), s, 0, 0), [(6, 5), (5,)], [5, 6], integers={0: 7}
    ),
    "short_group_scales": Case(
        lambda q, s: _own.dequantize_weight(q.to(torch.int8), s, 1, 2), [(5, 7), (5, 4)], [5, 3], integers={0: 7}
    ),
    "channel_zero_points": Case(
        lambda q, s, z: _own.dequantize_weight(q.to(torch.int8), s, 1, 0, 4, z.to(torch.int8)),
        [(5, 6), (5,), (5,)],
        [5, 6],
        integers={0: 7, 2: 7},
    ),
    "group_zero_points": Case(
        lambda q, s, z: _own.dequantize_weight(q.to(torch.int8), s, 1, 2, 4, z.to(torch.int8)),
        [(5, 6), (5, 3), (5, 3)],
        [5, 3],
        integers={0: 7, 2: 7},
    ),
    "transposed_zero_points": Case(
        lambda q, s, z: _own.dequantize_weight(q.to(torch.int8), s, 0, 2, 4, z.to(torch.int8)),
        [(6, 5), (5, 3), (5, 3)],
        [5, 3],
        integers={0: 7, 2: 7},
    ),
    "one_group": Case(
        lambda q, s: _own.dequantize_weight(q.to(torch.int8), s, 1, 8), [(5, 6), (5, 1)], [5, 6], integers={0: 7}
    ),
    "groups_across_a_boundary": Case(
        lambda q, s: _own.dequantize_weight(q.reshape(5, 12).to(torch.int8), s, 1, 4),
        [(5, 2, 6), (5, 3)],
        [5],
        integers={0: 7},
    ),
    "block_scales": Case(lambda q, s: _own.dequantize_block(_fp8(q), s, 2), [(8, 6), (4, 3)], [4, 3]),
    "transposed_block_scales": Case(lambda q, s: _own.dequantize_block(_fp8(q), s, 2, 0), [(6, 8), (4, 3)], [4, 3]),
    "short_block_scales": Case(lambda q, s: _own.dequantize_block(_fp8(q), s, 2), [(7, 5), (4, 3)], [3, 2]),
    "one_block": Case(lambda q, s: _own.dequantize_block(_fp8(q), s, 8), [(7, 5), (1, 1)], [7, 5]),
    "blocks_of_rows": Case(lambda q, s: _own.dequantize_block(_fp8(q), s, 6), [(18, 5), (3, 1)], [3, 5]),
    "fp4_scales": Case(_fp4, [(5, 48), (5, 3), (1,)], [5, 3], integers={0: 16}),
    "short_fp4_scales": Case(_fp4, [(5, 40), (5, 3), (1,)], [5, 2], integers={0: 16}),
    "one_fp4_group": Case(_fp4, [(5, 12), (5, 1), (1,)], [5, 12], integers={0: 16}),
    "transposed_fp4_scales": Case(
        lambda q, s, g: _own.dequantize_nvfp4(q.to(torch.int8), _fp8(s), g.abs() + 1, 0),
        [(48, 5), (5, 3), (1,)],
        [5, 3],
        integers={0: 16},
    ),
    "quantized_tokens": Case(lambda x: _own.fake_quantize(x, "int8"), [(3, 6)], [3, 6], "reduces"),
    "quantized_float_tokens": Case(lambda x: _own.fake_quantize(x, "fp8"), [(2, 3, 6)], [2, 3, 6], "reduces"),
    "quantized_with_a_fixed_range": Case(
        lambda x, s: _own.fake_quantize(x, "int8-static", s.abs() + 0.01), [(3, 6), (1,)], [3, 6]
    ),
    "quantized_groups": Case(lambda x: _own.fake_quantize(x, "fp8-group"), [(3, 384)], [3, 3]),
    "quantized_short_groups": Case(lambda x: _own.fake_quantize(x, "fp8-group"), [(3, 300)], [3, 2]),
    "quantized_one_group": Case(lambda x: _own.fake_quantize(x, "fp8-group"), [(3, 6)], [3, 6], "reduces"),
    "quantized_small_groups": Case(lambda x, s: _own.fake_quantize(x, "fp4", s.abs() + 100), [(3, 48), (1,)], [3, 3]),
    "quantized_one_small_group": Case(
        lambda x, s: _own.fake_quantize(x, "fp4", s.abs() + 100), [(3, 6), (1,)], [3, 6], "reduces"
    ),
    "cached_attention": Case(
        _cached,
        [(2, 3, 24), (2, 3, 12), (2, 3, 8), (2, 2, 5, 6), (2, 2, 5, 4), (9, 3), (9, 3)],
        [2, 2, 2, 3, 4],
        "reduces",
    ),
}
