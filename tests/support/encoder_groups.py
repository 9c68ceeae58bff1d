"""What can be pruned in each of the tiny encoders."""

from __future__ import annotations

__all__ = ["GROUPS"]

_BLOCKS = {("heads", 8): 2, ("head_dim", 8): 4, ("channels", 88): 2}
GROUPS: dict[str, dict[tuple[str, int], int]] = {
    # The hidden state is an output of headless encoders, so their width is frozen.
    "bert": _BLOCKS,
    "bert_classifier": {**_BLOCKS, ("width", 64): 1, ("channels", 64): 1},  # the pooled vector
    "distilbert": {**_BLOCKS, ("width", 64): 1, ("channels", 64): 1},
    # The pooled vector and the table of relative positions have widths of their own.
    "deberta": {("width", 48): 1, ("heads", 4): 2, ("head_dim", 12): 4, ("channels", 48): 2, ("channels", 88): 2},
    # Query, key and value are taken one by one from a fused projection: one group for all three, in rotary pairs.
    "modernbert": {("heads", 8): 2, ("head_dim", 4): 2, ("channels", 88): 2},
    # Every layer adds the same relative bias, a column per head.
    "t5_encoder": {("heads", 8): 1, ("head_dim", 6): 4, ("channels", 88): 2},
    "whisper_encoder": {**_BLOCKS, ("conv", 64): 1},  # between the two convolutions
    "whisper_classifier": {**_BLOCKS, ("conv", 64): 1, ("width", 64): 1, ("channels", 24): 1},
    "vit": _BLOCKS,
    "vit_classifier": {**_BLOCKS, ("width", 64): 1},
    "swin": {
        ("width", 24): 1,
        ("width", 48): 1,
        ("heads", 3): 2,
        ("heads", 6): 1,
        ("head_dim", 8): 6,
        ("channels", 96): 2,
        ("channels", 192): 1,
    },
    "convnext": {("conv", 12): 1, ("conv", 20): 1, ("channels", 48): 2, ("channels", 80): 1},
    # Stem 12, stages 32 and 48, two inner groups per bottleneck.
    "resnet": {("conv", 12): 3, ("conv", 32): 1, ("conv", 48): 1, ("conv", 8): 4},
    "resnet_basic": {("conv", 12): 1, ("conv", 16): 3, ("conv", 24): 1},  # the last stage is an output
    "efficientnet": {
        ("conv", 32): 1,  # the stem, through its depthwise convolution
        ("conv", 8): 2,
        ("conv", 24): 1,
        ("conv", 2): 1,
        ("conv", 12): 1,  # two blocks that are summed
        ("conv", 36): 1,
        ("conv", 3): 1,
        ("conv", 1280): 1,
    },
}
"""Free groups of each encoder: ``(kind, size) -> how many``."""
