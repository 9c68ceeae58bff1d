"""A Hugging Face folder as vLLM loads it: plain or quantized, of uniform layers or (with our plugin) not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compile_sparse.backends.checkpoint.checkpoint import plan_checkpoint, write_checkpoint
from compile_sparse.backends.checkpoint.solver import Solution
from compile_sparse.backends.vllm.contract import violations
from compile_sparse.backends.vllm.plugin_files import PLUGIN_FOLDER
from compile_sparse.backends.vllm.storage import Storage, StorageWriter, storage_of
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS, RunSettings
from compile_sparse.compiler.files.digests import digest_file
from compile_sparse.compiler.files.durable import write_durably
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import torch_dtype
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.targets.target import Target

__all__ = ["PLUGIN_CLASSES", "Written", "plan", "write"]

CONFIG_FILE = "config.json"
PLUGIN_CLASSES = {
    name: f"CompileSparse{name}"
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
}
"""Classes of which our vLLM plugin has a form whose layers may differ."""
PLUGIN_HINT = f"install compile-sparse in vLLM's environment, or add this model's folder {PLUGIN_FOLDER} to PYTHONPATH"
"""Second architecture of a model that needs the plugin: vLLM takes the first one it knows, and prints both when it knows none."""
_DERIVES_HEAD_SIZE = {"Qwen2ForCausalLM"}
"""Classes for which vLLM computes ``head_dim`` as ``hidden_size / num_attention_heads``, whatever the config says."""


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        files: name -> sha256.
        changes: config fields that differ from the model's.
        per_layer: number of layers that differ from the global config.
        plugin: whether vLLM needs our plugin to load it.
        hinted: whether its architecture is one of ours, so that vLLM says what to do without the plugin.
        form: how the weights are stored.
        notes: what vLLM will run slowly.
    """

    files: Mapping[str, str]
    changes: Mapping[str, Any]
    per_layer: int
    plugin: bool
    hinted: bool
    form: Storage
    notes: Sequence[Diagnostic]


def plan(program: Program, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> list[Diagnostic]:
    """What ``write`` would refuse, or what vLLM would run slowly. Reads no weights."""
    try:
        form = storage_of(program)
        found = violations(form.view, form.quantized, target, settings.tensor_parallel)
        if any(diagnostic.severity == "error" for diagnostic in found):
            return found
        form.require_one_method(settings.tensor_parallel)
        solution = plan_checkpoint(form.view, per_layer=True)
        _architecture(form.view.config, solution)
    except Refusal as error:
        return [Diagnostic.of(error)]
    return found


def write(
    program: Program, target: Target, out: Path, progress: Progress, settings: RunSettings = DEFAULT_SETTINGS
) -> Written:
    """Write config, weights and tokenizer files into the empty folder ``out``.

    Raises:
        Refusal: CS42xx the model's class cannot express the program; CS43xx vLLM cannot run it.
    """
    form = storage_of(program)
    notes = violations(form.view, form.quantized, target, settings.tensor_parallel)
    for diagnostic in notes:
        if diagnostic.severity == "error":
            raise diagnostic.refusal("vLLM cannot run this.")
    form.require_one_method(settings.tensor_parallel)
    stored = torch_dtype(settings.precision_on(target))
    writer = StorageWriter(form, stored)
    written = write_checkpoint(
        form.view, out, progress, per_layer=True, encode=writer.encode, beside=writer.beside, dtype=stored
    )
    writer.require_all()
    config = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
    plain = str(config["architectures"][0])
    different = bool(written.per_layer) or _derives_wrong_head_size(config)
    plugin = different or form.own_method
    # A format of our own does not need our classes. Under their names vLLM says what to do when the plugin is missing.
    hinted = different or (plugin and plain in PLUGIN_CLASSES)
    if hinted:
        config["architectures"] = [_plugin_class(plain), PLUGIN_HINT]
        config.setdefault("per_layer_config", {})
        config["allow_global_per_layer_attribute_access"] = True
    if method := writer.quantization_config():
        config["quantization_config"] = method
    write_durably(out / CONFIG_FILE, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    files = {**written.files, CONFIG_FILE: digest_file(out / CONFIG_FILE)[0]}
    return Written(files, written.changes, len(written.per_layer), plugin, hinted, form, notes)


def _architecture(config: Mapping[str, Any], solution: Solution) -> str:
    plain = str((config.get("architectures") or [""])[0])
    return _plugin_class(plain) if solution.per_layer or _derives_wrong_head_size(solution.config) else plain


def _plugin_class(plain: str) -> str:
    if plain in PLUGIN_CLASSES:
        return PLUGIN_CLASSES[plain]
    raise Refusal(
        "CS4309",
        f"vLLM builds every layer of {plain} alike.",
        where="architectures",
        why=f"In this program layers differ, or heads do not divide the width; the vLLM plugin has {', '.join(PLUGIN_CLASSES)}.",
        hint="Use --allocation uniform and remove whole layers only, or compile for ort-cpu, which takes any shape.",
    )


def _derives_wrong_head_size(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures") or [""]
    heads, size = int(config.get("num_attention_heads") or 0), int(config.get("head_dim") or 0)
    return names[0] in _DERIVES_HEAD_SIZE and heads > 0 and size > 0 and size * heads != config["hidden_size"]
