"""Does a backend keep its contract (``compiler/extension/backend_contract.py``), and does its runtime compute the program?"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from compile_sparse.compiler.errors import EnvironmentFailure, ModelError, Refusal
from compile_sparse.compiler.extension.backend_contract import Backend, Lowered, Probe
from compile_sparse.compiler.extension.backend_options import BackendOptions
from compile_sparse.compiler.extension.run_settings import RunSettings
from compile_sparse.compiler.files.digests import digest_file
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import cast_weights, torch_dtype
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Load
from compile_sparse.compiler.targets.target import Target
from compile_sparse.compiler.verify.fidelity import check_fidelity
from compile_sparse.compiler.verify.reference import write_reference
from compile_sparse.compiler.verify.same_model import departures
from compile_sparse.testing.conformance import require
from compile_sparse.testing.programs import contents, tiny_program, without_weights

__all__ = ["check_backend"]

_HEAVY = ("numpy", "torch", "transformers")  # what every runtime's package imports, and what they are


def check_backend(
    backend: Backend,
    target: Target,
    programs: Sequence[Program] | None = None,
    *,
    settings: RunSettings | None = None,
) -> None:
    """Lower programs for ``target`` and hold the backend to every rule of its contract that can be observed from outside.

    Its module imports nothing heavy; ``probe`` answers; a plan needs no weights, and says an error exactly when lowering refuses;
    what is written is what ``Lowered.files`` lists, with these digests, the same at every run, and nothing when it was refused;
    the program stays as it was. Where the runtime is here, its worker loads the folder and computes the program.

    Args:
        backend: an instance.
        target: one of its targets.
        programs: what is lowered; tiny Llama, BERT and ResNet when left out. Some may be refused, not all.
        settings: of the run; those of a run that chooses nothing when left out.

    Raises:
        NonConforming: naming the rule.
    """
    chosen = settings or RunSettings()
    _check_imports(backend)
    for attribute in ("options", "verify_options"):
        declared = getattr(backend, attribute, BackendOptions)
        complete = isinstance(declared, type) and issubclass(declared, BackendOptions)
        require(complete, f"{attribute} is a subclass of BackendOptions", backend.name)
    found = backend.probe(target)
    require(isinstance(found, Probe), "probe returns a Probe", backend.name)
    require(found.available or bool(found.why_not), "A runtime that is not here says why not", backend.name)
    given = [tiny_program(name) for name in ("llama", "bert", "resnet")] if programs is None else programs
    given = [cast_weights(program, torch_dtype(chosen.precision_on(target))) for program in given]
    lowered = [_check_on(backend, target, program, chosen, runs=found.available) for program in given]
    require(any(lowered), "Some model can be lowered", backend.name)


def _check_imports(backend: Backend) -> None:
    """In a process of its own, because this one has everything."""
    module = type(backend).__module__
    code = f"import sys, {module}\nprint(*[name for name in {_HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"], capture_output=True, text=True
    )
    require(done.returncode == 0, "Its module can be imported by itself", module, done.stderr[-300:])
    heavy = done.stdout.strip()
    require(
        not heavy,
        "Its module imports nothing heavy: the command line asks every backend for its options",
        module,
        heavy,
    )


def _check_on(backend: Backend, target: Target, program: Program, settings: RunSettings, *, runs: bool) -> bool:
    """Whether the program was lowered."""
    where = f"{backend.name} for {target.name}, {(program.config.get('architectures') or [program.kind])[0]}"
    before = contents(program)
    errors = [each for each in backend.plan(without_weights(program), target, settings) if each.severity == "error"]
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / run for run in ("first", "second")]
        made = []
        for folder in folders:
            (folder / "model").mkdir(parents=True)
            try:
                made.append(backend.lower(program, target, folder / "model", SilentProgress(), settings))
            except (Refusal, ModelError) as error:
                left = [path.name for path in (folder / "model").iterdir()]
                require(not left, "What is refused leaves nothing behind", where, ", ".join(left))
                require(bool(errors), "What lowering refuses, the plan says", where, f"{error.code} {error.what}")
                return False
        require(not errors, "What the plan says is an error, lowering refuses", where, "; ".join(e.why for e in errors))
        require(contents(program) == before, "The program that is lowered stays as it was", where)
        _check_files(made[0], folders[0] / "model", where)
        require(made[0].files == made[1].files, "The same program gives the same files, bit for bit", where)
        if runs and not backend.cannot_run(folders[0] / "model", target):
            _check_answers(backend, target, program, folders[0], settings, where)
    return True


def _check_files(lowered: Lowered, model: Path, where: str) -> None:
    written = {path.relative_to(model).as_posix(): path for path in model.rglob("*") if path.is_file()}
    unlisted, missing = sorted(set(written) - set(lowered.files)), sorted(set(lowered.files) - set(written))
    require(not unlisted, "Every file that is written is listed", where, ", ".join(unlisted))
    require(not missing, "Every file that is listed is written", where, ", ".join(missing))
    wrong = [name for name, path in written.items() if digest_file(path)[0] != lowered.files[name]]
    require(not wrong, "The digests are those of the files", where, ", ".join(wrong))


def _check_answers(
    backend: Backend, target: Target, program: Program, folder: Path, settings: RunSettings, where: str
) -> None:
    """In its own process the runtime loads the folder and gives the program's answers."""
    write_reference(
        program, folder, text=(), precision=settings.precision_on(target), seed=0, progress=SilentProgress(), windows=2
    )
    with Worker(backend.worker_command(target, settings)) as worker:
        try:
            worker.call(
                Load(name="model", folder=str(folder / "model"), device=target.device, sequence=64, sequences=2)
            )
        except EnvironmentFailure as error:
            require(False, "The runtime loads what was lowered", where, error.why)
        found = check_fidelity(worker, "model", folder, SilentProgress())
    departed = departures(found.model_dump(), quantized=False)
    require(not departed, "The runtime computes the program", where, " ".join(each.why for each in departed))
