"""How long choosing channels by greedy OBS takes: ours, and the textbook form that updates its tables after every removal.

Random weights and correlated inputs of one layer's size; both must choose the same channels. CPU seconds of one thread with
OMP_NUM_THREADS=1.

    python benchmarks/greedy_obs.py [--inputs 1536] [--outputs 576] [--remove 384] [--ours-only]
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from quality_references.solve import greedy_obs

from compile_sparse.passes.pruning.obs import DAMPING, Consumer, removal_order


def main() -> int:
    """Print both times; exit status 1 when the choices differ."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("inputs", 1536), ("outputs", 576), ("remove", 384)):
        options.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    options.add_argument("--ours-only", action="store_true", help="leave the slow reference out")
    given = options.parse_args()
    draws = torch.Generator().manual_seed(0)
    mixing = torch.randn(given.inputs, given.inputs, generator=draws) + 8 * torch.eye(given.inputs)
    x = (torch.randn(8 * given.inputs, given.inputs, generator=draws) @ mixing).double()
    weight = torch.randn(given.outputs, given.inputs, generator=draws).double()
    gram = x.T @ x
    began = time.process_time()
    consumer = Consumer(weight.T @ weight, gram, torch.arange(given.inputs))
    removal = removal_order([consumer], given.inputs, given.remove)
    print(f"ours       {time.process_time() - began:8.2f} CPU s")
    if given.ours_only:
        return 0
    # The reference damps by the mean of the diagonal: it is given what ours sees.
    damped = gram + DAMPING * torch.diag(gram.diagonal())
    began = time.process_time()
    kept, _ = greedy_obs(weight, damped, torch.arange(given.inputs)[:, None], given.remove)
    print(f"reference  {time.process_time() - began:8.2f} CPU s")
    same = len(set(kept.tolist()).intersection(removal.order.tolist()))
    print(f"{same} of {given.remove} removed by ours and kept by the reference")
    return 1 if same > given.remove // 100 else 0


if __name__ == "__main__":
    sys.exit(main())
