"""Put a runtime into an environment of its own, or register one that exists; either is recorded only after a check.

An environment is built where it stays (its scripts carry their path), and the record is written last: no record, no runtime.
An interrupted installation goes on where it stopped, because ``pip`` skips what is there. Sources of packages are the user's:
``pip`` reads its own configuration (``uv``, the fallback, only its own).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from compile_sparse.compiler.errors import EnvironmentFailure, UsageError
from compile_sparse.compiler.files.durable import disk_errors
from compile_sparse.compiler.progress import Progress, SilentProgress
from compile_sparse.compiler.runtimes.client import PASSED_ON
from compile_sparse.compiler.runtimes.environments import (
    Device,
    Packages,
    RequirementsOf,
    RuntimeKind,
    RuntimeRecord,
    find_kind,
    find_runtime,
    open_runtimes_folder,
    write_record,
)

__all__ = ["add_runtime", "install_runtime"]

CHECK_SECONDS = 300
_TAIL_LINES = 12
_STOP_SECONDS = 5
_NEWS = ("Collecting", "Downloading", "Using cached", "Building", "Installing", "Resolved", "Prepared", "Installed")
# These would send packages somewhere else than into the environment.
_DIVERTING = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_PYTHON", "PIP_DRY_RUN", "PIP_REQUIREMENT")
# Runs inside the environment, where 'packaging' may be missing but pip brings its own.
_READ_REQUIREMENTS = """
import importlib.metadata, json, sys
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name
without = {canonicalize_name(name) for name in sys.argv[2:]}
found = [Requirement(text) for text in importlib.metadata.requires(sys.argv[1]) or ()]
found = [r for r in found if canonicalize_name(r.name) not in without]
print(json.dumps([str(r) for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]))
"""


def install_runtime(
    name: str,
    *,
    version: str | None = None,
    device: Device | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> RuntimeRecord:
    """Build an environment for runtime ``name`` and register it; what is registered already is returned as it is.

    Args:
        name: of a registered kind.
        version: of the runtime; by default the one that is known to work, or any that is registered.
        device: by default what this machine has, or what is registered.
        force: start over, in place of whatever was registered or left by an interrupted installation.
        progress: where the steps are reported.

    Raises:
        UsageError: CS1051 no such kind, CS1053 not a version, CS1054 another version or device is registered.
        EnvironmentFailure: CS5003, CS5005 about the folder; CS5205 an installation step failed; CS5206 the check failed.
    """
    progress = progress or SilentProgress()
    kind = find_kind(name)
    if version is not None and not re.fullmatch(r"[0-9][0-9A-Za-z.!+_-]*", version):
        hint = "Write the number alone, such as 1.2.3."
        raise UsageError("CS1053", f"{version!r} is not a version.", where="--version", hint=hint)
    folder = open_runtimes_folder()
    with disk_errors(folder), _lock(folder / f"{name}.lock", name, progress):
        if not force and (known := _registered(name)) is not None:
            return _as_asked(known, version, device)
        device = device or kind.default_device()
        plan = kind.plan(device, version)
        python_version = f"py{sys.version_info.major}.{sys.version_info.minor}"
        environment = folder / name / f"{plan.version}-{device}-{python_version}"
        if force and environment.exists():
            (folder / f"{name}.json").unlink(missing_ok=True)
            shutil.rmtree(environment)
        python = environment / "bin" / "python"
        with progress.task(f"{name}: virtual environment"):
            _step([sys.executable, "-I", "-m", "venv", str(environment)], name)
        for step in plan.steps:
            _install(step, python, name, progress)
        record = _checked(kind, python, managed=True, progress=progress)
        write_record(record)
        for other in environment.parent.iterdir():  # what this one replaces
            if other != environment:
                shutil.rmtree(other, ignore_errors=True)
    return record


def add_runtime(name: str, python: str | Path, progress: Progress | None = None) -> RuntimeRecord:
    """Register the interpreter ``python``, in which somebody installed the runtime; also to check it again.

    Raises:
        UsageError: CS1051 no such kind, CS1052 nothing that can be executed.
        EnvironmentFailure: CS5003, CS5005 about the folder; CS5206 the runtime cannot be imported there.
    """
    progress = progress or SilentProgress()
    kind = find_kind(name)
    executable = shutil.which(os.path.expanduser(python))
    if executable is None:
        inside = Path(python).expanduser() / "bin" / "python"
        raise UsageError(
            "CS1052",
            "There is no interpreter to add.",
            where=f"--python {python}",
            why="It is not a file that can be executed.",
            hint=f"Did you mean {inside}?"
            if inside.exists()
            else f"'compile-sparse runtime install {name}' makes one.",
        )
    folder = open_runtimes_folder()
    with disk_errors(folder), _lock(folder / f"{name}.lock", name, progress):
        path = Path(executable).absolute()
        record = _checked(kind, path, managed=path.is_relative_to(folder), progress=progress)
        write_record(record)
    return record


def _registered(name: str) -> RuntimeRecord | None:
    """The record, if it is of any use: a damaged one is written anew."""
    try:
        known = find_runtime(name)
    except EnvironmentFailure as error:
        if error.code != "CS5207":
            raise
        return None
    return None if known is None or known.problem else known


def _as_asked(known: RuntimeRecord, version: str | None, device: Device | None) -> RuntimeRecord:
    found = known.versions.get(known.name, "")
    # 1.2 is also what '1.2+cpu' calls itself; who asks for '1.2+cpu' means that build.
    if version not in (None, found, found.partition("+")[0]) or device not in (None, known.device):
        raise UsageError(
            "CS1054",
            f"Another {known.name} is registered already.",
            where=str(known.python),
            why=f"It is {known.name} {found} for {known.device}.",
            hint="Use --force to replace it.",
        )
    return known


@contextlib.contextmanager
def _lock(path: Path, name: str, progress: Progress) -> Iterator[None]:
    """One installation per runtime at a time; a second one waits, and then finds the first one's record."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with progress.task(f"{name}: waiting for another installation") as task:
            while not lock.is_locked:
                with contextlib.suppress(Timeout):
                    lock.acquire(timeout=1)
                task.advance()
    try:
        yield
    finally:
        lock.release()


def _install(step: Packages | RequirementsOf, python: Path, name: str, progress: Progress) -> None:
    if isinstance(step, Packages):
        with progress.task(f"{name}: {step.label}") as task:
            _step([*_pip(python), *step.options, *step.requirements], name, task.advance)
        return
    asked = [str(python), "-I", "-c", _READ_REQUIREMENTS, step.distribution, *step.without]
    requirements = json.loads(_step(asked, name)[-1])
    with progress.task(f"{name}: what {step.distribution} requires") as task:
        try:
            _step([*_pip(python), *requirements], name, task.advance)
        except EnvironmentFailure as error:
            if not step.torch_backend or not re.search(r"No matching distribution found for torch\b", error.why):
                raise
            # This way was never run against a package index, only against a stand-in for uv in our tests.
            _step([*_pip(python), "uv"], name, task.advance)
            uv = [str(python), "-I", "-m", "uv", "pip", "install", "--python", str(python)]
            _step([*uv, "--torch-backend", step.torch_backend, *requirements], name, task.advance)


def _pip(python: Path) -> list[str]:
    return [
        str(python),
        "-I",
        "-u",
        "-m",
        "pip",
        "install",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar=off",
    ]


def _step(command: Sequence[str], name: str, advance: Callable[[], None] = lambda: None) -> list[str]:
    """Run one command of an installation; returns its last lines. ``advance`` is called for each line with news."""
    environment = {key: value for key, value in os.environ.items() if key not in _DIVERTING}
    lines: deque[str] = deque(maxlen=_TAIL_LINES)
    with _group(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            if line.lstrip().startswith(_NEWS):
                advance()
        code = process.wait()
    if code != 0:
        raise EnvironmentFailure(
            "CS5205",
            f"Installing runtime {name!r} failed.",
            where=" ".join(part for part in command if "\n" not in part)[:300],
            why=f"It exited with code {code}. Its last output: {chr(10).join(lines).strip() or 'none'}",
            hint="Packages come from where pip's own configuration says. The same command continues; --force starts over.",
        )
    return list(lines)


def _checked(kind: RuntimeKind, python: Path, *, managed: bool, progress: Progress) -> RuntimeRecord:
    """What ``kind``'s check finds in the environment of ``python``."""
    environment = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
    command = [str(python), "-I", str(kind.check_script)]
    with progress.task(f"{kind.name}: check"), tempfile.TemporaryFile() as errors:
        try:
            with _group(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as process:
                output, _ = process.communicate(timeout=CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            raise _unfit(kind, python, f"It did not answer within {CHECK_SECONDS} s.") from None
        except OSError as error:
            raise _unfit(kind, python, f"It does not start: {error.strerror}.") from error
        errors.seek(0)
        tail = "\n".join(errors.read().decode("utf-8", "replace").strip().splitlines()[-_TAIL_LINES:])
    found = _json_object(output)
    if found is None or "error" in found:
        raise _unfit(kind, python, str(found["error"]) if found else f"Its last output: {tail or 'none'}")
    facts = {key: value for key, value in found.items() if key not in ("versions", "device")}
    record = {"name": kind.name, "python": python, "managed": managed, "facts": facts}
    record |= {key: found.get(key) for key in ("versions", "device")}
    record["checked_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        return RuntimeRecord.model_validate(record)
    except ValidationError as error:
        raise _unfit(kind, python, f"The check's answer is not valid: {error}") from error


def _json_object(output: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        found = json.loads(output)
        return found if isinstance(found, dict) else None
    return None


def _unfit(kind: RuntimeKind, python: Path, why: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        "CS5206",
        f"The runtime {kind.name!r} does not work in this environment.",
        where=str(python),
        why=why,
        hint=f"'compile-sparse runtime install {kind.name}' builds an environment that has what it needs (--force: anew).",
    )


@contextlib.contextmanager
def _group(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own; whatever ends the block early, Ctrl-C included, ends the group."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        **options,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            _stop(process)
        if process.stdout is not None:
            process.stdout.close()


def _stop(process: subprocess.Popen[str]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            os.killpg(process.pid, how)
            process.wait(timeout=_STOP_SECONDS)
