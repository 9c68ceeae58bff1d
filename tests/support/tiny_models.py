"""Every tiny model of the suite by one name.

``llama``: of ``compile_sparse.testing``, sizes that must not couple differ, for what reads graphs. ``small/llama`` and
``wide/llama``: of ``served_models``, for what runs them. ``deep/llama``: of ``tests.deep``, four blocks.
"""

from __future__ import annotations

import transformers as hf

from compile_sparse.testing.models import build_model
from tests.deep import deep_model
from tests.support.served_models import SMALL, WIDE, build_served

__all__ = ["build_tiny"]

_SIZES = {"small": SMALL, "wide": WIDE}


def build_tiny(name: str) -> hf.PreTrainedModel:
    """The model called ``name`` in evaluation mode, the same weights every time."""
    group, _, family = name.rpartition("/")
    if group == "deep":
        return deep_model(family)
    return build_served(family, _SIZES[group]) if group else build_model(family)
