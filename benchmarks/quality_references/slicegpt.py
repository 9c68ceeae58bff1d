"""SliceGPT: rotate the hidden states onto their principal components, then keep the first (Ashkboos et al. 2024, 2401.15024).

RMSNorm without its scale commutes with rotations, so scales are folded into the linears that follow and every residual
stream between two blocks gets its own basis. Streams in different bases are added, so each of the two residual connections
of a layer gains a matrix; and a tied embedding and head rotate differently, so they are untied. Both cost parameters.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from quality_references.registry import Unavailable, reference
from quality_references.walk import LayerWalk
from quality_references.width import FRACTION, kept_width, parameters_after_indices

__all__: list[str] = []

DAMPING = 0.01


class _Norm(nn.Module):
    """RMSNorm without scale, whose mean is over the original width."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().sum(-1, keepdim=True) / self.width + self.eps).rsqrt()


class _RotatedLayer(nn.Module):
    """A decoder layer with a matrix on each residual connection."""

    def __init__(self, layer: Any, norm: _Norm, after_attention: torch.Tensor, after_mlp: torch.Tensor) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.norm = layer.self_attn, layer.mlp, norm
        self.after_attention, self.after_mlp = nn.Parameter(after_attention), nn.Parameter(after_mlp)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.norm(hidden_states), **kwargs)
        hidden_states = hidden_states @ self.after_attention + attended
        return hidden_states @ self.after_mlp + self.mlp(self.norm(hidden_states))


def _components(signal: list[torch.Tensor], width: int) -> torch.Tensor:
    """The first principal directions ``[d, width]`` of hidden states, uncentred."""
    gram = sum((part.flatten(0, 1).T @ part.flatten(0, 1)).double() for part in signal)
    gram += DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :width].float()


def _fold(norm: Any, linears: tuple[nn.Linear, ...]) -> None:
    for linear in linears:
        linear.weight = nn.Parameter(linear.weight.detach() * norm.weight.detach())


def _read(linear: nn.Linear, basis: torch.Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach() @ basis)
    linear.in_features = basis.shape[1]


def _write(linear: nn.Linear, basis: torch.Tensor) -> None:
    linear.weight = nn.Parameter(basis.T @ linear.weight.detach())
    linear.out_features = basis.shape[1]


@torch.no_grad()
def slice_model(model: Any, windows: torch.Tensor, width: int, *, slice_head: bool) -> None:
    """Give every residual stream ``width`` principal components; the one before the head too with ``slice_head`` (the
    authors' code leaves it whole).

    Layers are treated in order, on hidden states that the sliced layers before made, brought back to the full width.
    """
    body, full = model.model, model.config.hidden_size
    norm = _Norm(full, model.config.rms_norm_eps)
    walk = LayerWalk(model, windows)
    basis = _components(walk.hidden, width)
    embedding = body.embed_tokens.weight.detach()
    model.lm_head.weight = nn.Parameter(embedding.clone() if model.config.tie_word_embeddings else model.lm_head.weight)
    _fold(body.norm, (model.lm_head,))
    body.embed_tokens.weight = nn.Parameter(embedding @ basis)
    streams = [hidden @ basis for hidden in walk.hidden]
    for index, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        _fold(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))
        _fold(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            _read(linear, basis)
        whole = [x @ basis.T + walk.attend(attention, norm(x)) for x in streams]
        middle = _components(whole, width)
        streams = [x @ middle for x in whole]
        for linear in (mlp.gate_proj, mlp.up_proj):
            _read(linear, middle)
        _write(attention.o_proj, middle)
        whole = [x @ middle.T + mlp(norm(x)) for x in streams]
        last = index + 1 == len(body.layers)
        after = _components(whole, full if last and not slice_head else width)
        streams = [x @ after for x in whole]
        _write(mlp.down_proj, after)
        body.layers[index] = _RotatedLayer(layer, norm, basis.T @ middle, middle.T @ after)
        basis = after
    body.norm = norm
    _read(model.lm_head, basis)
    model.config.tie_word_embeddings = False


def _size(model: Any, width: int, slice_head: bool) -> int:
    """Parameters after slicing to ``width``, without doing it."""
    full, layers = model.config.hidden_size, model.model.layers
    inner = sum(
        linear.weight.numel() for layer in layers for linear in layer.modules() if isinstance(linear, nn.Linear)
    )
    last = width if slice_head else full
    down = layers[-1].mlp.down_proj.in_features
    vocabulary = model.config.vocab_size
    shortcuts = (2 * len(layers) - 1) * width * width + width * last
    return vocabulary * (width + last) + inner // full * width + down * (last - width) + shortcuts


def at_rate(model: Any, windows: torch.Tensor, *, slice_head: bool) -> dict[str, Any]:
    """Slice the fraction that index pruning removes; this leaves more parameters."""
    width = kept_width(model)
    expected = _size(model, width, slice_head)
    slice_model(model, windows, width, slice_head=slice_head)
    _check_size(model, expected)
    return {"width": width, "slicing": FRACTION}


def at_equal_parameters(model: Any, windows: torch.Tensor, *, slice_head: bool) -> dict[str, Any]:
    """Slice until no more parameters are left than index pruning leaves.

    Raises:
        Unavailable: no width is that small.
    """
    allowed, full = parameters_after_indices(model), model.config.hidden_size
    widths = [width for width in range(1, full) if _size(model, width, slice_head) <= allowed]
    if not widths:
        raise Unavailable(f"No slicing leaves {allowed} parameters: the untied head alone has more.")
    expected = _size(model, widths[-1], slice_head)
    slice_model(model, windows, widths[-1], slice_head=slice_head)
    _check_size(model, expected)
    return {"width": widths[-1], "slicing": round(1 - widths[-1] / full, 4)}


def _check_size(model: Any, expected: int) -> None:
    found = sum(p.numel() for p in model.parameters())
    if found != expected:
        raise RuntimeError(f"the sliced model has {found} parameters, {expected} were predicted")


for _name, _method, _note in (
    ("slicegpt", at_rate, "SliceGPT 2401.15024, 12.5 % slicing"),
    ("slicegpt-equal", at_equal_parameters, "SliceGPT 2401.15024, as many parameters as index pruning leaves"),
):
    reference("width", f"width12-{_name}", _note)(partial(_method, slice_head=False))
    reference("width", f"width12-{_name}-head", f"{_note}, head sliced")(partial(_method, slice_head=True))
