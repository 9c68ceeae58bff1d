"""The measuring process: loads model folders in transformers and answers requests, one JSON object per line.

One file that imports numpy, torch, transformers and the standard library only, so that it runs under any interpreter that has
them. Protocol on the original stdin and stdout; anything a library prints goes to stderr.

    request   {"id": n, "op": "...", ...}
    progress  {"event": "progress", "id": n, "done": k, "total": m}
    reply     {"id": n, "ok": true, "result": {...}}
    failure   {"id": n, "ok": false, "error": {"type": "...", "message": "..."}}

A malformed or failing request is answered and does not end the process. Times are wall-clock seconds, log-probabilities natural
logarithms computed in float64.
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import transformers
from torch.utils import _pytree as pytree

PROTOCOL = 1
_ROWS = 64  # rows of logits that are turned into float64 at once
_CHUNK_TOKENS = 256  # tokens whose logits are held at once when scoring
_PROBE_BYTES = 256 << 20

Report = Callable[[int, int], None]


class RequestError(Exception):
    """The request cannot be served; the message says what is wrong with it."""


class Model:
    """One loaded folder, as its own class in the precision of its weights.

    Nothing is fetched and no code of the folder is run.
    """

    def __init__(self, folder: str, threads: int, device: str) -> None:
        config = Path(folder) / "config.json"
        if not config.is_file():
            raise RequestError(f"there is no config.json in {folder}")
        if device != "cpu":
            raise RequestError(f"unknown device {device!r}; known: cpu")
        torch.set_num_threads(threads)
        described = json.loads(config.read_text(encoding="utf-8"))
        self.module, report = _model_class(described).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        self.module.eval()
        self.missing = sorted(report["missing_keys"])
        for problem in ("unexpected_keys", "mismatched_keys", "error_msgs"):
            if report.get(problem):
                raise RequestError(f"{problem} while loading: {sorted(map(str, report[problem]))[:3]}")
        self.inputs = list(inspect.signature(self.module.forward).parameters)
        self.decoder = self.module.can_generate() and not self.module.config.is_encoder_decoder

    def require_decoder(self) -> None:
        """Raise unless the model generates text."""
        if not self.decoder:
            raise RequestError("this operation needs a decoder with a key-value cache")

    def outputs(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call; tuples are spread over ``name.0``, ``name.1``, ..."""
        with torch.inference_mode():
            result = self.module(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        found = {}
        for name, value in result.items():
            leaves = pytree.tree_leaves(value)
            for place, leaf in enumerate(leaves):
                found[name if len(leaves) == 1 else f"{name}.{place}"] = leaf.float().numpy()
        return found


def _model_class(config: dict[str, Any]) -> Any:
    """transformers' own class that the config names; parts of a model are found next to its other classes."""
    names = config.get("architectures") or [None]
    found = getattr(transformers, str(names[0]), None)
    if found is None and config.get("model_type") in transformers.CONFIG_MAPPING:
        package = transformers.CONFIG_MAPPING[config["model_type"]].__module__.rpartition(".")[0]
        modeling = __import__(f"{package}.modeling_{package.rpartition('.')[2]}", fromlist=["*"])
        found = getattr(modeling, str(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise RequestError(f"transformers {transformers.__version__} has no model class {names[0]!r}")
    return found


class Generation:
    """A batch of sequences of equal length growing through the cache."""

    def __init__(self, model: Model) -> None:
        model.require_decoder()
        self._model = model
        self._cache: Any = None

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits ``[B, S, V]`` of new tokens ``ids [B, S]``."""
        with torch.inference_mode():
            result = self._model.module(
                input_ids=torch.from_numpy(np.ascontiguousarray(ids, np.int64)),
                past_key_values=self._cache,
                use_cache=True,
            )
        self._cache = result.past_key_values
        return result.logits.float().numpy()


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
    """State between requests and one method per operation (``op_<name>``)."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}

    def _model(self, name: Any) -> Model:
        if name not in self._models:
            raise RequestError(f"no model is loaded under the name {name!r}; loaded: {sorted(self._models)}")
        return self._models[name]

    def op_hello(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        runtime = {"name": "transformers", "version": transformers.__version__, "device": "cpu"}
        return {"protocol": PROTOCOL, "runtime": runtime, "pid": os.getpid()}

    def op_load(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        name = _field(request, "name", str)
        began = time.perf_counter()
        model = Model(
            _field(request, "folder", str), _count(request, "threads", 1), _field(request, "device", str, "cpu")
        )
        self._models[name] = model
        return {
            "seconds": time.perf_counter() - began,
            "rss_bytes": _memory("VmRSS"),
            "inputs": model.inputs,
            "missing": model.missing,
        }

    def op_unload(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        self._model(request.get("name"))
        del self._models[request["name"]]
        return {}

    def op_trace(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Next-token predictions of a batch, with the cache filled by one prefill and then one given token at a time."""
        model, windows = self._model(request.get("name")), _windows(request)
        if len({len(ids) for ids in windows}) != 1:
            raise RequestError("the windows of a trace must have equal lengths: they run as one batch")
        tokens = np.stack(windows)
        count, length = tokens.shape
        generation = Generation(model)
        traces: list[dict[str, list[float]]] = [{"top1": [], "logprob": [], "margin": []} for _ in range(count)]
        start, stop = 0, min(_count(request, "prefill", 1), length - 1)
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
        model, windows = self._model(request.get("name")), _windows(request)
        other = self._model(request["against"]) if request.get("against") is not None else None
        scores = []
        for done, ids in enumerate(windows):
            generation = Generation(model)
            reference = Generation(other) if other else None
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
        prompt, output = _count(request, "prompt_tokens", 1), _count(request, "output_tokens", 1)
        batch, rounds = _count(request, "batch", 1, default=1), _count(request, "rounds", 1)
        warmup = _count(request, "warmup", 0, default=1)
        draws = np.random.default_rng(int(request.get("seed", 0)))
        tokens = draws.integers(0, _count(request, "vocab", 1), (batch, prompt + output))
        times: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        total, done = (warmup + rounds) * len(names), 0
        for turn in range(warmup + rounds):
            for name in names if turn % 2 == 0 else names[::-1]:
                measured = _generate(models[name], tokens, prompt)
                if turn >= warmup:
                    times[name].append(measured)
                done += 1
                report(done, total)
        return {"rounds": times}

    def op_memory(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Peak resident memory of one generation. Meaningful in a fresh process only."""
        model = Model(
            _field(request, "folder", str), _count(request, "threads", 1, default=1), request.get("device", "cpu")
        )
        prompt, output = _count(request, "prompt_tokens", 1), _count(request, "output_tokens", 1)
        batch = _count(request, "batch", 1, default=1)
        tokens = np.random.default_rng(0).integers(0, _count(request, "vocab", 1, default=2), (batch, prompt + output))
        _generate(model, tokens, prompt)
        return {"peak_rss_bytes": _memory("VmHWM")}

    def op_run(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """One call on arrays from a file, results into a file."""
        model, feeds = self._model(request.get("name")), _feeds(request)
        results = model.outputs(_known(model, feeds))
        np.savez(_field(request, "outputs", str), **results)  # type: ignore[arg-type]  # numpy's types take them for its options
        return {"outputs": list(results)}

    def op_benchmark_samples(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Seconds of one call per round, for models without a cache; the order flips every round."""
        names = _names(request)
        models = {name: self._model(name) for name in names}
        feeds = {name: _known(models[name], _feeds(request)) for name in names}
        rounds, warmup = _count(request, "rounds", 1), _count(request, "warmup", 0, default=1)
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(warmup + rounds):
            for name in names if turn % 2 == 0 else names[::-1]:
                began = time.perf_counter()
                models[name].outputs(feeds[name])
                if turn >= warmup:
                    times[name].append(time.perf_counter() - began)
            report(turn + 1, warmup + rounds)
        return {"rounds": times}

    def op_bandwidth(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Best of several reads of an array much larger than any cache, by as many threads as the model uses."""
        threads = _count(request, "threads", 1, default=1)
        values = np.ones(_PROBE_BYTES // 8, np.int64)
        parts = np.array_split(values, threads)
        best = float("inf")
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(5):
                began = time.perf_counter()
                list(pool.map(np.bitwise_or.reduce, parts))
                best = min(best, time.perf_counter() - began)
        return {"bytes_per_s": values.nbytes / best}


def _generate(model: Model, tokens: np.ndarray, prompt: int) -> dict[str, Any]:
    """Feed a prompt and then the given tokens one by one; the same work whatever the model predicts."""
    generation = Generation(model)
    began = time.perf_counter()
    generation.step(tokens[:, :prompt])
    prefill = time.perf_counter() - began
    steps = []
    for position in range(prompt, tokens.shape[1]):
        began = time.perf_counter()
        generation.step(tokens[:, position : position + 1])
        steps.append(time.perf_counter() - began)
    return {"prefill_s": prefill, "decode_s": sum(steps), "token_s": steps}


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


def _field(request: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = request.get(name, default)
    if not isinstance(value, kind):
        raise RequestError(f"field {name!r} must be {kind.__name__}, got {value!r}")
    return value


def _count(request: dict[str, Any], name: str, least: int, default: Any = None) -> int:
    value = request.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RequestError(f"field {name!r} must be an integer of at least {least}, got {value!r}")
    return value


def _names(request: dict[str, Any]) -> list[str]:
    names = request.get("names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise RequestError(f"field 'names' must be a list of loaded names, got {names!r}")
    return names


def _windows(request: dict[str, Any]) -> list[np.ndarray]:
    windows = request.get("windows")
    if not isinstance(windows, list) or not all(isinstance(w, list) and len(w) >= 2 for w in windows):
        raise RequestError("field 'windows' must be a list of token lists of at least 2 ids")
    if not all(isinstance(token, int) and token >= 0 for window in windows for token in window):
        raise RequestError("field 'windows' must hold non-negative integers")
    return [np.asarray(window, np.int64) for window in windows]


def _feeds(request: dict[str, Any]) -> dict[str, np.ndarray]:
    with np.load(_field(request, "feeds", str), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _known(model: Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    surplus = [name for name in feeds if name not in model.inputs]
    if surplus:
        raise RequestError(f"the model takes no {', '.join(surplus)}")
    return feeds


def _memory(field: str) -> int:
    """Bytes from /proc, whose peak starts anew with this program (getrusage inherits the parent's)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _answer(worker: Worker, line: str, send: Callable[[dict[str, Any]], None]) -> bool:
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


def main(arguments: Sequence[str] = ()) -> int:
    """Serve until shutdown or end of input."""
    stream = _protocol_stream()

    def send(message: dict[str, Any]) -> None:
        stream.write(json.dumps(message, allow_nan=True) + "\n")
        stream.flush()

    worker = Worker()
    for line in sys.stdin:
        if line.strip() and not _answer(worker, line, send):
            break
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
