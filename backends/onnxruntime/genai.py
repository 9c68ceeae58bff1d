"""What onnxruntime-genai needs beside the graph: ``genai_config.json`` and the tokenizer's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compile_sparse.compiler.capture.side_files import copy_side_files
from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.ir.program import Program

__all__ = ["write_genai"]

CONFIG_FILE = "genai_config.json"
_DEFAULT_CONTEXT = 2048


def write_genai(
    program: Program, inputs: Sequence[str], out: Path, *, share_buffer: bool
) -> tuple[dict[str, str], str]:
    """Write the files into ``out``.

    Args:
        program: a decoder.
        inputs: names of the graph's inputs.
        share_buffer: whether past and present may be one buffer, which only the grouped-query kernel supports.

    Returns:
        File name -> SHA-256, and a sentence when onnxruntime-genai cannot load this model.
    """
    files = copy_side_files(program.source.folder, out, "genai")
    shapes = {(int(s[1]), int(s[3])) for s in _cache_shapes(program)}
    if len(shapes) != 1:
        return files, (
            "Layers have different numbers of cached heads, which onnxruntime-genai cannot describe: "
            "load this folder with plain ONNX Runtime."
        )
    text = json.dumps(_config(program, inputs, shapes.pop(), share_buffer), indent=2).encode()
    (out / CONFIG_FILE).write_bytes(text)
    files[CONFIG_FILE] = hashlib.sha256(text).hexdigest()
    return files, ""


def _cache_shapes(program: Program) -> list[tuple[Any, ...]]:
    return [
        tuple(program.node(entry.placeholder).meta["val"].shape)
        for entry in program.inputs
        if entry.role in ("past_key", "past_value")
    ]


def _config(program: Program, inputs: Sequence[str], cache: tuple[int, int], share_buffer: bool) -> dict[str, Any]:
    config = program.config
    kv_heads, head_size = cache
    context = context_length(program.config) or _DEFAULT_CONTEXT
    layers = 1 + max(entry.layer for entry in program.inputs if entry.role == "past_key")
    logits = next(node for node, out in zip(program.output_nodes, program.outputs, strict=True) if out.role == "logits")
    eos = config.get("eos_token_id")
    first_eos = eos[0] if isinstance(eos, (list, tuple)) and eos else eos
    pad = config.get("pad_token_id")
    tokens = {"bos_token_id": config.get("bos_token_id"), "eos_token_id": eos}
    tokens["pad_token_id"] = next((t for t in (pad, first_eos, 0) if t is not None), 0)
    names = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    return {
        "model": {
            # The generic decoder of the runtime: it only decides how inputs are prepared, not the layers.
            "type": "llama",
            **{key: value for key, value in tokens.items() if value is not None},
            "context_length": context,
            "vocab_size": int(logits.meta["val"].shape[-1]),
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": head_size,
                "hidden_size": config.get("hidden_size") or config.get("n_embd") or head_size * kv_heads,
                "num_attention_heads": config.get("num_attention_heads") or config.get("n_head") or kv_heads,
                "num_hidden_layers": layers,
                "num_key_value_heads": kv_heads,
                "inputs": {
                    **names,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": share_buffer,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }
