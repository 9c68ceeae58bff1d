"""What onnxruntime-genai needs beside the graph and the tokenizer's files: ``genai_config.json``, and how to open these."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compile_sparse.compiler.capture.generation import GenerationDefaults, generation_defaults
from compile_sparse.compiler.execution.token_windows import load_tokenizer
from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.ir.program import Program

__all__ = ["write_genai"]

CONFIG_FILE = "genai_config.json"
TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_DEFAULT_CONTEXT = 2048
_SEARCH = (
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"),
    *("no_repeat_ngram_size", "min_length"),
)
"""Options of ``generate()`` that onnxruntime-genai has under the same name."""
_OTHER_TOKENIZERS = (
    *(TOKENIZER_CONFIG_FILE, "tokenizer.model", "tokenizer.model.v3", "tekken.json"),
    *("spiece.model", "vocab.json", "vocab.txt"),
)
_UNKNOWN = {
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("num_beams", "typical_p", "guidance_scale", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "stop_strings")),
    **dict.fromkeys(
        ("forced_bos_token_id", "forced_eos_token_id", "penalty_alpha", "exponential_decay_length_penalty")
    ),
}
"""Options that it has not, or (beams) not with this form of cache, and the values that do nothing."""


def write_genai(
    program: Program, inputs: Sequence[str], out: Path, *, share_buffer: bool
) -> tuple[dict[str, str], list[str]]:
    """Write the files into ``out``, which has the tokenizer's files already.

    Args:
        program: a decoder.
        inputs: names of the graph's inputs.
        share_buffer: whether past and present may be one buffer, which only the grouped-query kernel supports.

    Returns:
        File name -> SHA-256, and sentences: that onnxruntime-genai cannot load this model, or what it leaves out.

    Raises:
        UsageError: CS1003 when the source's generation_config.json is malformed.
    """
    defaults = generation_defaults(program.source.folder, program.config)
    files = _describe_tokenizer(out, defaults)
    shapes = {(int(s[1]), int(s[3])) for s in _cache_shapes(program)}
    if len(shapes) != 1:
        return files, [
            "Layers have different numbers of cached heads, which onnxruntime-genai cannot describe: "
            "load this folder with plain ONNX Runtime."
        ]
    files[CONFIG_FILE] = _write_json(
        out / CONFIG_FILE, _config(program, inputs, shapes.pop(), defaults, share_buffer=share_buffer)
    )
    return files, [*_unopened(out), *_left_out(defaults)]


def _write_json(path: Path, content: Mapping[str, Any]) -> str:
    text = json.dumps(content, indent=2).encode()
    path.write_bytes(text)
    return hashlib.sha256(text).hexdigest()


def _describe_tokenizer(folder: Path, defaults: GenerationDefaults) -> dict[str, str]:
    """A ``tokenizer_config.json`` where there is a fast tokenizer without one: onnxruntime-genai opens none without."""
    if not (folder / TOKENIZER_FILE).is_file() or (folder / TOKENIZER_CONFIG_FILE).exists():
        return {}
    tokenizer = load_tokenizer(folder)
    described: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role in ("bos_token", "eos_token", "pad_token"):
        ids = defaults.ids(f"{role}_id")
        token = tokenizer.id_to_token(ids[0]) if tokenizer is not None and ids else None
        described |= {} if token is None else {role: token}
    return {TOKENIZER_CONFIG_FILE: _write_json(folder / TOKENIZER_CONFIG_FILE, described)}


def _unopened(folder: Path) -> list[str]:
    if (folder / TOKENIZER_FILE).exists() or not any((folder / name).exists() for name in _OTHER_TOKENIZERS):
        return []
    return [
        f"onnxruntime-genai opens no tokenizer without a {TOKENIZER_FILE}: give it token ids, or save the source's tokenizer "
        "with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) and compile again."
    ]


def _left_out(defaults: GenerationDefaults) -> list[str]:
    said = {name: defaults.values.get(name) for name in _UNKNOWN}
    left = [f"{name}={value}" for name, value in said.items() if value not in (None, False, _UNKNOWN[name], [], {})]
    if not left:
        return []
    return [
        f"generation_config.json also asks for {', '.join(left)}; genai_config.json cannot say that, so onnxruntime-genai "
        "generates without."
    ]


def _cache_shapes(program: Program) -> list[tuple[Any, ...]]:
    return [
        tuple(program.node(entry.placeholder).meta["val"].shape)
        for entry in program.inputs
        if entry.role in ("past_key", "past_value")
    ]


def _config(
    program: Program, inputs: Sequence[str], cache: tuple[int, int], defaults: GenerationDefaults, *, share_buffer: bool
) -> dict[str, Any]:
    config = program.config
    kv_heads, head_size = cache
    context = context_length(program.config) or _DEFAULT_CONTEXT
    layers = 1 + max(entry.layer for entry in program.inputs if entry.role == "past_key")
    logits = next(node for node, out in zip(program.output_nodes, program.outputs, strict=True) if out.role == "logits")
    bos, eos, pad = (defaults.ids(f"{role}_token_id") for role in ("bos", "eos", "pad"))
    tokens: dict[str, int | list[int]] = {"bos_token_id": bos[0]} if bos else {}
    if eos:
        tokens["eos_token_id"] = list(eos) if len(eos) > 1 else eos[0]
    tokens["pad_token_id"] = (*pad, *eos, 0)[0]
    search = {name: value for name in _SEARCH if (value := defaults.values.get(name)) is not None}
    names = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    return {
        "model": {
            # The generic decoder of the runtime: it only decides how inputs are prepared, not the layers.
            "type": "llama",
            **tokens,
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
            **search,
        },
    }
