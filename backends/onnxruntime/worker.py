"""The measuring process: loads model folders in ONNX Runtime and answers requests, one JSON object per line.

One file that imports numpy, onnxruntime and the standard library only, so that it runs under any interpreter that has them.
Protocol on the original stdin and stdout; anything a library prints goes to stderr.

    request   {"id": n, "op": "...", ...}
    progress  {"event": "progress", "id": n, "done": k, "total": m}
    reply     {"id": n, "ok": true, "result": {...}}
    failure   {"id": n, "ok": false, "error": {"type": "...", "message": "..."}}

A malformed or failing request is answered and does not end the process. Times are wall-clock seconds, log-probabilities natural
logarithms computed in float64.

Workers of runtimes that take token ids and give logits are subclasses of ``Worker``: they say how a folder is opened. onnxruntime
itself is imported where it is used, so that they need not have it.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import numpy as np

__all__ = ["PROTOCOL", "Report", "RequestError", "Worker", "count", "field", "memory", "serve", "token_windows"]

PROTOCOL = 1
_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
_ROWS = 64  # rows of logits that are turned into float64 at once
_CHUNK_TOKENS = 256  # tokens whose logits are held at once when scoring
_PROBE_BYTES = 256 << 20

Report = Callable[[int, int], None]


class RequestError(Exception):
    """The request cannot be served; the message says what is wrong with it."""


class Model:
    """One loaded folder."""

    def __init__(self, folder: str, threads: int, device: str) -> None:
        import onnxruntime as ort

        path = Path(folder) / "model.onnx"
        if not path.is_file():
            raise RequestError(f"there is no model.onnx in {folder}")
        if device not in _PROVIDERS:
            raise RequestError(f"unknown device {device!r}; known: {', '.join(_PROVIDERS)}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Spinning threads starve each other on a busy machine and make timings depend on the neighbours.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if _saturates():
            options.add_session_config_entry("session.x64quantprecision", "1")
        self.session = ort.InferenceSession(str(path), options, providers=_PROVIDERS[device])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.past = [name for name in self.inputs if name.startswith("past_key_values.")]
        self.share_buffer = bool(self.past) and _shares_buffer(Path(folder))
        self.cache_shapes = {name: _cache_shape(self.inputs[name].shape, Path(folder)) for name in self.past}

    def require_decoder(self) -> None:
        """Raise unless the graph has a key-value cache and logits."""
        if not self.past or "logits" not in self.outputs or "input_ids" not in self.inputs:
            raise RequestError("this operation needs a decoder with a key-value cache")

    def generation(self, batch: int, capacity: int) -> Generation:
        """``batch`` empty sequences that will not grow beyond ``capacity`` tokens."""
        return Generation(self, batch, capacity)

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Values of ``outputs`` for one call."""
        return self.session.run(self.outputs, feeds)


def _saturates() -> bool:
    """Whether 8-bit multiply-add may overflow: x86 without dot-product instructions.

    The runtime then has exact kernels on request. They are asked for only here, because they halve the speed of prompts
    on processors that do not need them.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True  # unknown: right before fast


def _cache_shape(shape: Sequence[Any], folder: Path) -> tuple[int, int]:
    """Cached heads and head size. Graphs of other tools may leave them open and say them in their configuration."""
    if isinstance(shape[1], int) and isinstance(shape[3], int):
        return shape[1], shape[3]
    config = folder / "genai_config.json"
    if not config.is_file():
        raise RequestError(f"the cache inputs have open dimensions {shape} and there is no genai_config.json")
    decoder = json.loads(config.read_text(encoding="utf-8"))["model"]["decoder"]
    return int(decoder["num_key_value_heads"]), int(decoder["head_size"])


def _shares_buffer(folder: Path) -> bool:
    """Whether past and present may be one buffer: our manifest says so, or the configuration of onnxruntime-genai."""
    manifest = folder / "compile_sparse.json"
    if manifest.is_file():
        return bool(json.loads(manifest.read_text(encoding="utf-8")).get("share_buffer", False))
    config = folder / "genai_config.json"
    if config.is_file():
        search = json.loads(config.read_text(encoding="utf-8")).get("search", {})
        return bool(search.get("past_present_share_buffer", False))
    return False


class Generation:
    """A batch of sequences of equal length growing through the cache.

    With a shared buffer, past and present are bound to the same ``capacity`` positions and nothing is copied; otherwise
    the outputs of a step are the inputs of the next one.
    """

    def __init__(self, model: Model, batch: int, capacity: int) -> None:
        import onnxruntime as ort

        model.require_decoder()
        self._model, self._batch, self._length = model, batch, 0
        self._cache = {}
        for name in model.past:
            spec = model.inputs[name]
            length = capacity if model.share_buffer else 0
            heads, size = model.cache_shapes[name]
            shape = (batch, heads, length, size)
            self._cache[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _TYPES[spec.type]))

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits ``[B, S, V]`` of new tokens ``ids [B, S]``."""
        model, length = self._model, ids.shape[1]
        total = self._length + length
        binding = model.session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, dtype=np.int64))
        if "attention_mask" in model.inputs:
            binding.bind_cpu_input("attention_mask", np.ones((self._batch, total), np.int64))
        if "position_ids" in model.inputs:
            positions = np.broadcast_to(np.arange(self._length, total, dtype=np.int64), (self._batch, length))
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        names = ["logits"]
        binding.bind_output("logits", "cpu")
        for name, value in self._cache.items():
            present = name.replace("past_key_values", "present")
            binding.bind_ortvalue_input(name, value)
            if model.share_buffer:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present, "cpu")
            names.append(present)
        model.session.run_with_iobinding(binding)
        results = dict(zip(names, binding.get_outputs(), strict=True))
        if not model.share_buffer:
            self._cache = {name: results[name.replace("past_key_values", "present")] for name in self._cache}
        self._length = total
        return results["logits"].numpy()


def _log_softmax(rows: np.ndarray) -> np.ndarray:
    shifted = rows.astype(np.float32)
    shifted -= shifted.max(axis=-1, keepdims=True)
    # Terms in float32 are exact enough; their sum over a large vocabulary is not.
    totals = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    shifted -= np.log(totals).astype(np.float32)
    return shifted


def _row_blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _ROWS):
        yield slice(start, min(start + _ROWS, count))


class Worker:
    """State between requests and one method per operation (``op_<name>``).

    A subclass for another runtime says what ``runtime`` it is and how to ``open`` a folder; what it opens has ``inputs``,
    ``outputs``, ``share_buffer``, ``require_decoder``, ``generation`` and ``run`` as ``Model`` has.
    """

    def __init__(self) -> None:
        self._models: dict[str, Any] = {}

    def runtime(self) -> dict[str, str]:
        """Name, version and device."""
        import onnxruntime as ort

        device = "cuda" if "CUDAExecutionProvider" in ort.get_available_providers() else "cpu"
        return {"name": "onnxruntime", "version": ort.__version__, "device": device}

    def open(self, folder: str, threads: int, device: str) -> Any:
        """The model in ``folder``, ready to run."""
        return Model(folder, threads, device)

    def generate(self, model: Any, tokens: np.ndarray, prompt: int) -> dict[str, Any]:
        """Feed a prompt and then the given tokens one by one; the same work whatever the model predicts."""
        generation = model.generation(tokens.shape[0], tokens.shape[1])
        began = time.perf_counter()
        generation.step(tokens[:, :prompt])
        prefill = time.perf_counter() - began
        steps = []
        for position in range(prompt, tokens.shape[1]):
            began = time.perf_counter()
            generation.step(tokens[:, position : position + 1])
            steps.append(time.perf_counter() - began)
        return {"prefill_s": prefill, "decode_s": sum(steps), "token_s": steps}

    def call(self, model: Any, feeds: dict[str, np.ndarray]) -> float:
        """Seconds of one call."""
        began = time.perf_counter()
        model.run(feeds)
        return time.perf_counter() - began

    def _model(self, name: Any) -> Any:
        if name not in self._models:
            raise RequestError(f"no model is loaded under the name {name!r}; loaded: {sorted(self._models)}")
        return self._models[name]

    def op_hello(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        return {"protocol": PROTOCOL, "runtime": self.runtime(), "pid": os.getpid()}

    def op_load(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        name = field(request, "name", str)
        began = time.perf_counter()
        model = self.open(
            field(request, "folder", str), count(request, "threads", 1), field(request, "device", str, "cpu")
        )
        self._models[name] = model
        return {
            "seconds": time.perf_counter() - began,
            "rss_bytes": memory("VmRSS"),
            "inputs": list(model.inputs),
            "outputs": model.outputs,
            "share_buffer": model.share_buffer,
        }

    def op_unload(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        self._model(request.get("name"))
        del self._models[request["name"]]
        return {}

    def op_trace(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Next-token predictions of a batch, with the cache filled by one prefill and then one given token at a time."""
        model, windows = self._model(request.get("name")), token_windows(request)
        if len({len(ids) for ids in windows}) != 1:
            raise RequestError("the windows of a trace must have equal lengths: they run as one batch")
        tokens = np.stack(windows)
        rows, length = tokens.shape
        generation = model.generation(rows, length)
        traces: list[dict[str, list[float]]] = [{"top1": [], "logprob": [], "margin": []} for _ in range(rows)]
        start, stop = 0, min(count(request, "prefill", 1), length - 1)
        while start < length - 1:
            logits = generation.step(tokens[:, start:stop])
            for row, trace in enumerate(traces):
                _extend(trace, logits[row], tokens[row, start + 1 : stop + 1])
            report(stop, length - 1)
            start, stop = stop, stop + 1
        return {"windows": traces}

    def op_score(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Negative log-likelihood of windows, and the divergence from another model on the same tokens.

        Windows run in chunks through the cache, so memory does not follow their length.
        """
        model, windows = self._model(request.get("name")), token_windows(request)
        other = self._model(request["against"]) if request.get("against") is not None else None
        scores = []
        for done, ids in enumerate(windows):
            generation = model.generation(1, len(ids))
            reference = other.generation(1, len(ids)) if other else None
            score = {"tokens": len(ids) - 1, "nll": 0.0, "nll_against": None, "kl": None, "top1_equal": None}
            if reference:
                score.update(nll_against=0.0, kl=0.0, top1_equal=0)
            for start in range(0, len(ids) - 1, _CHUNK_TOKENS):
                stop = min(start + _CHUNK_TOKENS, len(ids) - 1)
                chunk, targets = ids[None, start:stop], ids[start + 1 : stop + 1]
                logits = generation.step(chunk)[0]
                _add_score(score, logits, reference.step(chunk)[0] if reference else None, targets)
            scores.append(score)
            report(done + 1, len(windows))
        return {"windows": scores}

    def op_benchmark(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Prefill and decode times; the models take turns and the order flips every round."""
        names = _names(request)
        models = {name: self._model(name) for name in names}
        prompt, output = count(request, "prompt_tokens", 1), count(request, "output_tokens", 1)
        batch, rounds = count(request, "batch", 1, default=1), count(request, "rounds", 1)
        warmup = count(request, "warmup", 0, default=1)
        draws = np.random.default_rng(int(request.get("seed", 0)))
        tokens = draws.integers(0, count(request, "vocab", 1), (batch, prompt + output))
        times: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        total, done = (warmup + rounds) * len(names), 0
        for turn in range(warmup + rounds):
            for name in names if turn % 2 == 0 else names[::-1]:
                measured = self.generate(models[name], tokens, prompt)
                if turn >= warmup:
                    times[name].append(measured)
                done += 1
                report(done, total)
        return {"rounds": times}

    def op_memory(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Peak resident memory of one generation. Meaningful in a fresh process only."""
        model = self.open(
            field(request, "folder", str), count(request, "threads", 1, default=1), request.get("device", "cpu")
        )
        prompt, output = count(request, "prompt_tokens", 1), count(request, "output_tokens", 1)
        batch = count(request, "batch", 1, default=1)
        tokens = np.random.default_rng(0).integers(0, count(request, "vocab", 1, default=2), (batch, prompt + output))
        self.generate(model, tokens, prompt)
        return {"peak_rss_bytes": memory("VmHWM")}

    def op_run(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """One call on arrays from a file, results into a file."""
        model, feeds = self._model(request.get("name")), _feeds(request)
        results = model.run(_known(model, feeds))
        np.savez(field(request, "outputs", str), **dict(zip(model.outputs, results, strict=True)))
        return {"outputs": model.outputs}

    def op_benchmark_samples(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Seconds of one call per round, for models without a cache; the order flips every round."""
        names = _names(request)
        models = {name: self._model(name) for name in names}
        feeds = {name: _known(models[name], _feeds(request)) for name in names}
        rounds, warmup = count(request, "rounds", 1), count(request, "warmup", 0, default=1)
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(warmup + rounds):
            for name in names if turn % 2 == 0 else names[::-1]:
                seconds = self.call(models[name], feeds[name])
                if turn >= warmup:
                    times[name].append(seconds)
            report(turn + 1, warmup + rounds)
        return {"rounds": times}

    def op_bandwidth(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Best of several reads of an array much larger than any cache, by as many threads as the model uses."""
        threads = count(request, "threads", 1, default=1)
        values = np.ones(_PROBE_BYTES // 8, np.int64)
        parts = np.array_split(values, threads)
        best = float("inf")
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(5):
                began = time.perf_counter()
                list(pool.map(np.bitwise_or.reduce, parts))
                best = min(best, time.perf_counter() - began)
        return {"bytes_per_s": values.nbytes / best}


def _extend(trace: dict[str, list[float]], logits: np.ndarray, targets: np.ndarray) -> None:
    for rows in _row_blocks(len(targets)):
        block, wanted = logits[rows], targets[rows]
        best_two = np.partition(block, -2, axis=-1)[:, -2:]
        trace["top1"] += block.argmax(axis=-1).tolist()
        trace["margin"] += (best_two[:, 1] - best_two[:, 0]).astype(np.float64).tolist()
        trace["logprob"] += _log_softmax(block)[np.arange(len(wanted)), wanted].tolist()


def _add_score(score: dict[str, Any], logits: np.ndarray, against: np.ndarray | None, targets: np.ndarray) -> None:
    for rows in _row_blocks(len(targets)):
        wanted = targets[rows]
        picked = np.arange(len(wanted))
        log_p = _log_softmax(logits[rows])
        score["nll"] -= float(log_p[picked, wanted].sum(dtype=np.float64))
        if against is not None:
            log_q = _log_softmax(against[rows])
            score["nll_against"] -= float(log_q[picked, wanted].sum(dtype=np.float64))
            score["kl"] += float((np.exp(log_q) * (log_q - log_p)).sum(dtype=np.float64))
            score["top1_equal"] += int((logits[rows].argmax(-1) == against[rows].argmax(-1)).sum())


def field(request: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A value of type ``kind`` out of a request.

    Raises:
        RequestError: it is missing or something else.
    """
    value = request.get(name, default)
    if not isinstance(value, kind):
        raise RequestError(f"field {name!r} must be {kind.__name__}, got {value!r}")
    return value


def count(request: dict[str, Any], name: str, least: int, default: Any = None) -> int:
    """A whole number of at least ``least`` out of a request.

    Raises:
        RequestError: it is missing or something else.
    """
    value = request.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RequestError(f"field {name!r} must be an integer of at least {least}, got {value!r}")
    return value


def _names(request: dict[str, Any]) -> list[str]:
    names = request.get("names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise RequestError(f"field 'names' must be a list of loaded names, got {names!r}")
    return names


def token_windows(request: dict[str, Any]) -> list[np.ndarray]:
    """The token ids of a request.

    Raises:
        RequestError: they are no lists of at least two ids.
    """
    windows = request.get("windows")
    if not isinstance(windows, list) or not all(isinstance(w, list) and len(w) >= 2 for w in windows):
        raise RequestError("field 'windows' must be a list of token lists of at least 2 ids")
    if not all(isinstance(token, int) and token >= 0 for window in windows for token in window):
        raise RequestError("field 'windows' must hold non-negative integers")
    return [np.asarray(window, np.int64) for window in windows]


def _feeds(request: dict[str, Any]) -> dict[str, np.ndarray]:
    with np.load(field(request, "feeds", str), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _known(model: Any, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    missing = [name for name in model.inputs if name not in feeds]
    if missing:
        raise RequestError(f"feeds lack {', '.join(missing)}")
    return {name: feeds[name] for name in model.inputs}


def memory(kind: str) -> int:
    """Bytes from /proc, whose peak starts anew with this program (getrusage inherits the parent's)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(kind + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _answer(worker: object, line: str, send: Callable[[dict[str, Any]], None]) -> bool:
    """Serve one line; False after a shutdown request."""
    identifier: Any = None
    try:
        request = json.loads(line)
        if not isinstance(request, dict):
            raise RequestError("a request is a JSON object")
        identifier, operation = request.get("id"), request.get("op")
        if operation == "shutdown":
            send({"id": identifier, "ok": True, "result": {}})
            return False
        handler = getattr(worker, f"op_{operation}", None) if isinstance(operation, str) else None
        if handler is None:
            known = sorted(name[3:] for name in dir(worker) if name.startswith("op_"))
            raise RequestError(f"unknown operation {operation!r}; known: {', '.join([*known, 'shutdown'])}")

        def report(done: int, total: int) -> None:
            send({"event": "progress", "id": identifier, "done": done, "total": total})

        send({"id": identifier, "ok": True, "result": handler(request, report)})
    except Exception as error:  # noqa: BLE001  (the process boundary: every failure becomes an answer)
        send({"id": identifier, "ok": False, "error": {"type": type(error).__name__, "message": str(error)}})
    return True


def _protocol_stream() -> TextIO:
    """The real stdout, kept for replies; file descriptor 1 then leads to stderr, so that no library can garble them."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return stream


def serve(worker: object) -> int:
    """Answer requests with the ``op_`` methods of ``worker`` until shutdown or end of input; the exit code of the process."""
    stream = _protocol_stream()

    def send(message: dict[str, Any]) -> None:
        stream.write(json.dumps(message, allow_nan=True) + "\n")
        stream.flush()

    for line in sys.stdin:
        if line.strip() and not _answer(worker, line, send):
            break
    return 0


if __name__ == "__main__":
    sys.exit(serve(Worker()))
