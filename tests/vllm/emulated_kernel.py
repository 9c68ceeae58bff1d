"""A stand-in for vLLM's 4-bit CPU kernel, for processors on which vLLM is built without it (those without AVX-512).

It is a vLLM plugin that the worker process loads: everything but the product itself (reading the checkpoint, joining projections,
repacking for the kernel) is vLLM's own code, so a wrong layout in a checkpoint gives wrong logits here too. Speed means nothing.
The layout it reads is what ``CPUWNA16LinearKernel`` (vllm/model_executor/kernels/linear/mixed_precision/cpu.py) makes.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_plugin"]

_SOURCE = '''
import torch


def _nibbles(packed):
    """int32 [..., n] -> codes [..., 8 n], lowest bits first."""
    return ((packed.unsqueeze(-1) >> (torch.arange(8) * 4)) & 15).flatten(-2)


def cpu_gemm_wna16(x, q_weight, out, scales, zeros, bias, pack_factor, isa_hint):
    """x [M, K]; q_weight [N / 16, K * 2] int32, blocks of 16 outputs; scales [G, N]; zeros [G, N / 8] int32 or None."""
    inputs, blocks = x.shape[1], q_weight.shape[0]
    codes = _nibbles(q_weight.view(blocks, inputs, 2)).permute(1, 0, 2).reshape(inputs, blocks * 16)
    zero = torch.full_like(scales, 8) if zeros is None else _nibbles(zeros).to(scales.dtype)
    group = inputs // scales.shape[0]
    weight = (codes - zero.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)
    product = x.float() @ weight.float()
    out.copy_(product if bias is None else product + bias.float())


def register():
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a!) output, Tensor scales, Tensor? zeros, Tensor? bias, "
        "int pack_factor, str isa_hint) -> ()"
    )
    library.impl("cpu_gemm_wna16", cpu_gemm_wna16, "CPU")
    globals()["_kept"] = library
'''


def write_plugin(folder: Path) -> Path:
    """Write the plugin as an installed package would lie there; ``folder`` goes on the worker's path."""
    package, info = folder / "emulated_wna16", folder / "emulated_wna16-1.dist-info"
    for made in (package, info):
        made.mkdir(parents=True)
    (package / "__init__.py").write_text(_SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: emulated_wna16\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nemulated = emulated_wna16:register\n")
    return folder
