"""Capture: one ``torch.export`` of the Hugging Face model itself, without loading its weights.

The exported model is a skeleton whose parameters are fake tensors, so capturing costs no memory for weights and works from a
config alone. A decoder is exported once with its key-value cache as inputs and outputs, through transformers' own exporter;
the same graph then serves analysis, calibration (empty cache), prefill and decode.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from transformers import PretrainedConfig, PreTrainedModel
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

from compile_sparse.compiler.capture.bind import bind_weights, different_ties, renamed
from compile_sparse.compiler.capture.fold import fold_constants
from compile_sparse.compiler.capture.folder import ModelFolder
from compile_sparse.compiler.capture.functional import is_functional
from compile_sparse.compiler.capture.normalize import normalize
from compile_sparse.compiler.capture.quantized.decoding import fused
from compile_sparse.compiler.capture.samples import Sample, sample_for
from compile_sparse.compiler.capture.skeleton import build_skeleton, named_key, new_fake_mode, quiet_transformers, untie
from compile_sparse.compiler.capture.stored import read_stored
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.ir.edit import eliminate_dead_code
from compile_sparse.compiler.ir.program import Binding, ModelSource, Program
from compile_sparse.compiler.ir.weights import AbsentTensor, ResidentTensor, TensorSource, WeightStore
from compile_sparse.compiler.progress import Progress, SilentProgress

__all__ = ["capture", "capture_model"]


def capture(
    folder: ModelFolder,
    *,
    dtype: torch.dtype = torch.float32,
    require_weights: bool = True,
    image_size: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Program:
    """Capture the model in ``folder``; its weights stay on disk.

    Args:
        folder: an opened model folder.
        dtype: type the weights are converted to when they are loaded. Those of a quantized checkpoint are the values its codes
            stand for (``QuantizedTensor``).
        require_weights: False for planning: a folder without safetensors then gives a program of shapes only.
        image_size: height and width of images; None: the config's.
        progress: where the three steps are reported.

    Raises:
        ModelError: CS2003 to CS2008, see the modules of this package.
    """
    checkpoint, said = read_stored(folder, dtype, required=require_weights)
    mode = new_fake_mode()
    try:
        model = build_skeleton(folder.model_class, folder.config, dtype, mode)
    except ModelError as error:
        raise named_key(folder.model_class, folder.config, error) from error
    config, stored = folder.config, None
    if checkpoint:
        stored = renamed(model, checkpoint)
        if different := different_ties(model, stored):
            config = copy.deepcopy(config)
            untie(model, config, different, mode)
    sources = bind_weights(model, stored)
    said += fused(checkpoint, sources)
    program = _capture(model, config, sources, mode, progress or SilentProgress(), image_size)
    return replace(program, source=ModelSource(folder.path, said))


def capture_model(model: PreTrainedModel) -> Program:
    """Capture a model that is in memory; its tensors are shared, not copied."""
    mode = new_fake_mode()
    skeleton = build_skeleton(type(model), model.config, model.dtype, mode)
    # Already in the form of memory: nothing to rename or assemble.
    sources = {name: ResidentTensor(value.detach()) for name, value in model.state_dict().items()}
    return _capture(skeleton, model.config, sources, mode, SilentProgress())


def _capture(
    model: PreTrainedModel,
    config: PretrainedConfig,
    sources: Mapping[str, TensorSource],
    mode: torch._subclasses.FakeTensorMode,
    progress: Progress,
    image_size: tuple[int, int] | None = None,
) -> Program:
    with quiet_transformers(), progress.task("capture", total=3) as task:
        sample = sample_for(model, mode, image_size)
        task.advance()
        exported = _export(model, sample)
        task.advance()
        program = _program(exported, model, config, sample, sources)
        task.advance()
    return program


def _export(model: PreTrainedModel, sample: Sample) -> ExportedProgram:
    # The exporter and export warn about their own experimental state on every call; our verifier is the judge.
    exporter_log = logging.getLogger("transformers.exporters")
    before = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = DynamoExporter().export(
                model,
                dict(sample.kwargs),
                DynamoConfig(dynamic=True, dynamic_shapes=sample.dynamic_shapes),
            )
            # An empty table keeps linear, attention and silu whole; it functionalises and inlines sub-graphs.
            return exported if is_functional(exported.graph) else exported.run_decompositions({})
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, KeyError) as error:
        raise ModelError(
            "CS2008",
            f"{type(model).__name__} could not be exported.",
            where="torch.export",
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            hint="torch.export must be able to trace the model's forward; see the torch.export documentation.",
        ) from error
    finally:
        exporter_log.setLevel(before)


def _program(
    exported: ExportedProgram,
    model: PreTrainedModel,
    config: PretrainedConfig,
    sample: Sample,
    sources: Mapping[str, TensorSource],
) -> Program:
    bindings: dict[str, Binding] = {}
    weights: dict[str, TensorSource] = {}
    user: list[str] = []
    for spec in exported.graph_signature.input_specs:
        name = str(getattr(spec.arg, "name", ""))
        if spec.kind == InputKind.USER_INPUT:
            user.append(name)
            continue
        target = str(spec.target)
        if spec.kind == InputKind.PARAMETER:
            bindings[name] = Binding(target, "parameter")
        else:
            bindings[name] = Binding(target, "buffer")
        constant = exported.constants.get(target)
        if target in sources:
            weights[target] = sources[target]
        elif isinstance(constant, torch.Tensor):
            weights[target] = ResidentTensor(constant.detach())
        else:  # a buffer that the checkpoint does not hold and nothing computes
            value = exported.state_dict[target]
            weights[target] = AbsentTensor(tuple(value.shape), value.dtype, target)
    if len(user) != len(sample.inputs):
        raise RuntimeError(f"export made inputs {user}, expected {[i.name for i in sample.inputs]}")
    inputs = tuple(
        type(i)(placeholder, i.name, i.role, i.layer) for placeholder, i in zip(user, sample.inputs, strict=True)
    )
    graph_module, bindings = normalize(exported, bindings)
    program = Program(
        graph_module=graph_module,
        bindings=bindings,
        inputs=inputs,
        outputs=sample.outputs,
        weights=WeightStore(weights),
        kind=sample.kind,
        # A config made in memory names no class until it is saved. The skeleton's own says what type it was captured in.
        config={**config.to_dict(), "architectures": [type(model).__name__]},
    )
    program = eliminate_dead_code(fold_constants(program))
    # Export binds every name of a tied tensor; which of them is used shows only now.
    return replace(program, aliases=_aliases(model, {b.tensor for b in program.bindings.values()}))


def _aliases(model: PreTrainedModel, bound: set[str]) -> dict[str, str]:
    """Tied parameters: every other name -> the name that is bound in the graph."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    aliases: dict[str, str] = {}
    for names in by_identity.values():
        chosen = next((n for n in names if n in bound), names[0])
        aliases.update({n: chosen for n in names if n != chosen})
    return aliases
