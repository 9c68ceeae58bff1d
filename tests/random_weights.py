"""Random weights that make every part of a model show in its output."""

from __future__ import annotations

import torch
import transformers as hf

__all__ = ["randomised"]


def randomised(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """Random weights of unit gain, and norms that are not ones: every coupling shows in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.dim() == 1:
                value.add_(0.1 * noise)
            else:
                value.copy_(noise * (0.5 if "embed" in name else value.shape[-1] ** -0.5))
    return model.eval()
