"""The backend's verbs. vLLM itself is never imported here: it lives in an interpreter of its own (``compiler/runtimes``)."""

from __future__ import annotations

import difflib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compile_sparse.backends.worker.start import command
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.extension.backend_contract import Lowered, Observation, Probe
from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS, RunSettings
from compile_sparse.compiler.version_numbers import older

if TYPE_CHECKING:
    from compile_sparse.compiler.ir.program import Program
    from compile_sparse.compiler.progress import Progress
    from compile_sparse.compiler.targets.target import Target

__all__ = ["VllmBackend"]

_RUNTIME = "vllm"
_HINT = "compile-sparse runtime install vllm"


class VllmBackend:
    """Writes checkpoints that vLLM serves, and measures them in vLLM."""

    name = _RUNTIME

    def probe(self, target: Target) -> Probe:
        """What the registered vLLM is, and whether it runs on the target's hardware here."""
        from compile_sparse.backends.vllm.processor import other_hardware
        from compile_sparse.compiler.files.cache import cache_key
        from compile_sparse.compiler.runtimes.environments import find_runtime

        try:
            record = find_runtime(_RUNTIME)
        except EnvironmentFailure as error:
            return Probe(False, _RUNTIME, why_not=f"{error.what} {error.why}", hint=error.hint or _HINT)
        if record is None:
            return Probe(False, _RUNTIME, why_not="No vLLM is registered.", hint=_HINT)
        version = str(record.versions.get("vllm", ""))
        if record.problem:
            return Probe(False, _RUNTIME, version, why_not=record.problem, hint=f"{_HINT} --force")
        wanted = target.minimum_versions.get("vllm", "0")
        if older(version, wanted):
            why = f"vLLM {version} is older than {wanted}, which this target needs."
            return Probe(False, _RUNTIME, version, why_not=why, hint=f"{_HINT} --version {wanted} --force")
        if why := other_hardware(record, target):
            return Probe(False, _RUNTIME, version, why_not=why)
        facts = {key: record.facts.get(key) for key in ("isa", "capability", "kernels", "int8_saturates")}
        return Probe(True, _RUNTIME, version, target.device, processor=cache_key(facts)[:16])

    def plan(self, program: Program, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[Diagnostic]:
        """CS42xx and CS43xx for what cannot be written or loaded, CS23xx for what runs slowly. Weights are not read."""
        from compile_sparse.backends.vllm.checkpoint import plan
        from compile_sparse.backends.vllm.processor import slow

        return [*_unknown(program), *plan(program, target, settings), *slow(program, target)]

    def lower(
        self,
        program: Program,
        target: Target,
        out: Path,
        progress: Progress,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> Lowered:
        """Write the model folder.

        Raises:
            Refusal: CS42xx or CS43xx.
        """
        from compile_sparse.backends.vllm.checkpoint import write
        from compile_sparse.backends.vllm.plugin_files import PLUGIN_FOLDER, copy_plugin
        from compile_sparse.backends.vllm.processor import slow

        for diagnostic in _unknown(program):
            raise diagnostic.refusal("vLLM does not know this model.")
        written = write(program, target, out, progress, settings)
        stored = written.form
        form: dict[str, Any] = {"config": dict(written.changes) or "as the source"}
        files, limits = dict(written.files), []
        if stored.scheme is not None:
            form["quantization"] = "compressed-tensors"
        if stored.own_method:
            kind = "factors" if stored.factored else "2:4 values and positions"
            form["weights"] = f"{kind}, experimental"
        if stored.scales:
            form["key-value cache"] = "fp8 (e4m3), one scale per layer"
        if written.plugin:
            if written.per_layer:
                form["layers"] = f"{written.per_layer} differ from the global config"
            form["plugin"] = PLUGIN_FOLDER
            files |= {f"{PLUGIN_FOLDER}/{name}": digest for name, digest in copy_plugin(out / PLUGIN_FOLDER).items()}
            unknown = "architecture" if written.hinted else "quantization method"
            limits.append(
                f"vLLM needs the compile-sparse plugin to load this model: put the folder {PLUGIN_FOLDER}, which lies in the "
                "model's folder, on PYTHONPATH (or install compile-sparse in vLLM's environment). Without it vLLM says that it "
                f"does not know the {unknown}."
            )
        return Lowered(files=files, form=form, limits=limits, diagnostics=[*written.notes, *slow(program, target)])

    def observation(
        self, program: Program, target: Target, model: Path, scratch: Path, settings: RunSettings
    ) -> Observation:
        """Linear layers tell their outputs by hooks, those that vLLM merges in parts. On a GPU its engine is one compiled graph,
        which calls none.
        """
        from compile_sparse.backends.checkpoint.layer_modules import layer_modules
        from compile_sparse.backends.vllm.machine import cpu_dtype
        from compile_sparse.backends.vllm.storage import storage_of

        if target.device != "cpu":
            return Observation(model, {}, program)
        precision = "fp32" if cpu_dtype() == "float32" else "bf16"
        return Observation(model, layer_modules(storage_of(program).view), program, precision)

    def cannot_run(self, model: Path, target: Target) -> str:
        """A kernel that the registered vLLM lacks on its processor, or has and computes wrongly."""
        from compile_sparse.backends.vllm.processor import cannot_run

        return cannot_run(model, target)

    def worker_command(self, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[str]:
        """The measuring process under the registered interpreter, with our plugin on its path.

        Raises:
            EnvironmentFailure: CS5007 when no vLLM is registered.
        """
        from compile_sparse.compiler.runtimes.environments import find_runtime

        record = find_runtime(_RUNTIME)
        if record is None:
            raise EnvironmentFailure("CS5007", "No vLLM is registered.", where=target.name, hint=_HINT)
        return command("compile_sparse.backends.vllm.worker", str(_own_plugin()), python=str(record.python))


def _own_plugin() -> Path:
    """A folder with our plugin alone, for PYTHONPATH. Never an artifact's own copy: what a stranger sends is not run.

    Its name tells its content, and it appears by one rename: another process may be importing it.
    """
    from compile_sparse.backends.vllm.plugin_files import copy_plugin
    from compile_sparse.compiler.files.cache import cache_key
    from compile_sparse.compiler.files.durable import disk_errors
    from compile_sparse.compiler.runtimes.environments import open_runtimes_folder

    root = open_runtimes_folder()
    with disk_errors(root):
        made = Path(tempfile.mkdtemp(prefix=".vllm-plugin-", dir=root))
        folder = root / f"vllm-plugin-{cache_key(copy_plugin(made))[:16]}"
        try:
            os.rename(made, folder)
        except OSError:  # it is there already
            shutil.rmtree(made, ignore_errors=True)
            if not folder.is_dir():
                raise
    return folder


def _unknown(program: Program) -> list[Diagnostic]:
    """CS4305 when the registered vLLM has no class for the model."""
    from compile_sparse.backends.vllm.processor import registered

    record = registered()
    known = (record.facts.get("architectures") if record else None) or ()
    name = str((program.config.get("architectures") or [""])[0])
    if not known or name in known:
        return []
    near = difflib.get_close_matches(name, known, n=2)
    why = f"vLLM {record.versions.get('vllm', '') if record else ''} has {len(known)} model classes, and not this one."
    hint = f"Its nearest are {' and '.join(near)}. " if near else ""
    return [Diagnostic(f"architectures: {name}", "CS4305", why, f"{hint}Compile for ort-cpu or hf.", severity="error")]
