"""The measuring process: loads model folders in vLLM and answers requests, one JSON object per line.

One file that imports vLLM, what comes with it and the standard library only: it runs under a vLLM environment's interpreter.
Protocol on the original stdin and stdout; everything vLLM logs goes to stderr.

    request   {"id": n, "op": "...", ...}
    progress  {"event": "progress", "id": n, "done": k, "total": m}
    reply     {"id": n, "ok": true, "result": {...}}
    failure   {"id": n, "ok": false, "error": {"type": "...", "message": "..."}}

The engine runs in this process, eagerly, with prefix caching off and token ids as prompts, so that several models can take turns
and no tokenizer matters. A model that was loaded stays until the process ends: taking one engine down would take the process
groups of the others with it. Times are wall-clock seconds on the engine's own clock, log-probabilities natural logarithms.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

PROTOCOL = 1
_PROBE_BYTES = 256 << 20
_WINDOWS_AT_ONCE = 16
_SPARE_CACHE_BYTES = 64 << 20
_BLOCK_TOKENS = 128
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a window as long as the model's context needs room for one more token
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_FOUR_BIT_KERNEL = "cpu_gemm_wna16"

Report = Callable[[int, int], None]


class RequestError(Exception):
    """The request cannot be served; the message says what is wrong with it."""


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise RequestError("there is no vLLM in this environment")


def _instruction_set() -> str:
    """Of this processor, as far as it decides which kernels vLLM has; read from the kernel, because torch is not loaded yet."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return platform.machine()
    words = set(text.split())
    for flag, name in (("amx_tile", "AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2"), ("bf16", "Arm bf16")):
        if flag in words:
            return name
    return platform.machine()


def _cpu_dtype() -> str:
    """bfloat16, vLLM's usual precision, where the processor has kernels for it.

    Without AVX-512 or its like vLLM falls back to torch's bfloat16 products, several times slower than float32 for prompts:
    nobody would serve that, so it would be a false baseline.
    """
    return "bfloat16" if _instruction_set() in ("AMX", "AVX-512", "Arm bf16") else "float32"


def _gpu_name() -> str:
    """Of the first GPU, from the driver's own tool; empty for a CPU build of vLLM or without a GPU."""
    if "cpu" in _version() or _is_installed("vllm-cpu"):
        return ""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return listed.stdout.strip().splitlines()[0] if listed.returncode == 0 and listed.stdout.strip() else ""


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


class Model:
    """One loaded folder."""

    def __init__(self, folder: str, device: str, length: int, sequences: int) -> None:
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise RequestError(f"there is no config.json in {folder}")
        config = json.loads(path.read_text(encoding="utf-8"))
        from vllm import LLM

        self._require_kernels(config, device)
        dtype = _cpu_dtype() if device == "cpu" else "bfloat16"
        self.engine = LLM(
            folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=length + 1,
            max_num_seqs=max(sequences, _WINDOWS_AT_ONCE),
            # All prompts of a batch in one step, so that prefill and decoding do not mix, up to what memory bears.
            max_num_batched_tokens=max(2048, min(sequences * length, 65536)),
            enforce_eager=device == "cpu",
            enable_prefix_caching=False,
            async_scheduling=False,
            kv_cache_memory_bytes=_cache_bytes(folder, length + 1, max(sequences, 2), 4 if dtype == "float32" else 2),
            disable_log_stats=False,
            trust_remote_code=False,
            logits_processors=[_forced_tokens()],
            seed=0,
        )

    @staticmethod
    def _require_kernels(config: dict[str, Any], device: str) -> None:
        """vLLM accepts 4-bit weights on any processor and fails at the first product where the kernel is not built in."""
        if device != "cpu" or (config.get("quantization_config") or {}).get("format") != "pack-quantized":
            return
        import torch
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins

        current_platform.import_kernels()
        load_general_plugins()  # a plugin may bring a kernel
        if not hasattr(torch.ops._C, _FOUR_BIT_KERNEL):
            raise RequestError(
                f"this vLLM has no kernel for 4-bit weights ({_FOUR_BIT_KERNEL}) on this processor ({_instruction_set()})"
            )

    def generate(self, prompts: Sequence[Sequence[int]], parameters: Any) -> list[Any]:
        """Requests in the order given."""
        asked = [{"prompt_token_ids": list(map(int, ids))} for ids in prompts]
        outputs: list[Any] = self.engine.generate(asked, parameters, use_tqdm=False)
        return outputs


def _cache_bytes(folder: str, length: int, sequences: int, itemsize: int) -> int:
    """Room for ``sequences`` sequences of ``length`` tokens, in whole blocks, and some to spare."""
    from transformers import AutoConfig

    # transformers knows what each family calls its sizes.
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    own = getattr(config, "per_layer_config", None)
    kinds = [own[number] for number in range(layers)] if own else [config]
    widest = max(int(getattr(kind, "num_key_value_heads", None) or heads) for kind in kinds)
    size = int(getattr(config, "head_dim", None) or int(config.hidden_size) // heads)
    blocks = -(-length // _BLOCK_TOKENS) + 1
    return sequences * blocks * _BLOCK_TOKENS * layers * widest * size * 2 * itemsize + _SPARE_CACHE_BYTES


def _forced_tokens() -> type:
    """A logits processor that makes a request generate given tokens; reported log-probabilities are from before it."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class ForcedTokens(AdapterLogitsProcessor):  # type: ignore[misc]
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            tokens = (params.extra_args or {}).get("forced_tokens")
            if not tokens:
                return None

            def process(output_ids: list[int], logits: Any) -> Any:
                wanted = tokens[min(len(output_ids), len(tokens) - 1)]
                logits.fill_(float("-inf"))
                logits[wanted] = 0.0
                return logits

            return process

    return ForcedTokens


class Worker:
    """State between requests and one method per operation (``op_<name>``)."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._retired: list[Model] = []

    def _model(self, name: Any) -> Model:
        if name not in self._models:
            raise RequestError(f"no model is loaded under the name {name!r}; loaded: {sorted(self._models)}")
        return self._models[name]

    def op_hello(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        gpu = _gpu_name()
        device = f"cuda ({gpu}, bfloat16)" if gpu else f"cpu ({_instruction_set()}, {_cpu_dtype()})"
        runtime = {"name": "vllm", "version": _version(), "device": device}
        return {"protocol": PROTOCOL, "runtime": runtime, "pid": os.getpid()}

    def op_load(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        name, began = _field(request, "name", str), time.perf_counter()
        if name in self._models:
            self._retired.append(self._models.pop(name))
        self._models[name] = _loaded(request)
        return {"seconds": time.perf_counter() - began, "rss_bytes": _memory("VmRSS")}

    def op_trace(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Next-token predictions of windows: a prefill, then one given token at a time through the cache."""
        from vllm import SamplingParams

        model, windows = self._model(request.get("name")), _windows(request)
        traces: list[dict[str, list[float]]] = []
        for some in _chunks(windows, _WINDOWS_AT_ONCE):
            begins = [min(_count(request, "prefill", 1), len(ids) - 1) for ids in some]
            parameters = [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=len(ids) - begin,
                    min_tokens=len(ids) - begin,
                    ignore_eos=True,
                    logprobs=1,
                    prompt_logprobs=1,
                    detokenize=False,
                    extra_args={"forced_tokens": list(ids[begin:])},
                )
                for ids, begin in zip(some, begins, strict=True)
            ]
            prompts = [ids[:begin] for ids, begin in zip(some, begins, strict=True)]
            for ids, begin, output in zip(some, begins, model.generate(prompts, parameters), strict=True):
                generated = output.outputs[0]
                if list(generated.token_ids) != list(ids[begin:]):
                    raise RequestError("vLLM did not generate the tokens it was made to")
                found = [*output.prompt_logprobs[1:], *generated.logprobs]
                traces.append(_trace(found, ids[1:]))
            report(len(traces), len(windows))
        return {"windows": traces}

    def op_score(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Negative log-likelihood of windows by one model and by another. Divergences would need whole distributions."""
        names = [request.get("name"), *([request["against"]] if request.get("against") is not None else [])]
        models, windows = [self._model(name) for name in names], _windows(request)
        scores: list[dict[str, Any]] = []
        for some in _chunks(windows, _WINDOWS_AT_ONCE):
            traces = [self._scored(model, some) for model in models]
            for place, ids in enumerate(some):
                own = traces[0][place]
                score = {"tokens": len(ids) - 1, "nll": -sum(own["logprob"]), "nll_against": None, "kl": None}
                score["top1_equal"] = None
                if len(traces) > 1:
                    other = traces[1][place]
                    score["nll_against"] = -sum(other["logprob"])
                    score["top1_equal"] = sum(a == b for a, b in zip(own["top1"], other["top1"], strict=True))
                scores.append(score)
                report(len(scores), len(windows))
        return {"windows": scores}

    def _scored(self, model: Model, windows: Sequence[Sequence[int]]) -> list[dict[str, list[float]]]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        outputs = model.generate(windows, parameters)
        return [_trace(output.prompt_logprobs[1:], ids[1:]) for output, ids in zip(outputs, windows, strict=True)]

    def op_benchmark(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Prefill and decode times; the models take turns, the order flips every round, prompts are new every round."""
        import numpy as np

        names = _names(request)
        models = {name: self._model(name) for name in names}
        prompt, output = _count(request, "prompt_tokens", 1), _count(request, "output_tokens", 1)
        batch, rounds = _count(request, "batch", 1, default=1), _count(request, "rounds", 1)
        warmup, vocabulary = _count(request, "warmup", 0, default=1), _count(request, "vocab", 1)
        draws = np.random.default_rng(int(request.get("seed", 0)))
        times: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        done = 0
        for turn in range(warmup + rounds):
            tokens = draws.integers(0, vocabulary, (batch, prompt)).tolist()
            for name in names if turn % 2 == 0 else names[::-1]:
                measured = _generate(models[name], tokens, output)
                if turn >= warmup:
                    times[name].append(measured)
                done += 1
                report(done, (warmup + rounds) * len(names))
        return {"rounds": times}

    def op_memory(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Peak resident memory of one generation. Meaningful in a fresh process only."""
        import numpy as np

        prompt, output = _count(request, "prompt_tokens", 1), _count(request, "output_tokens", 1)
        batch = _count(request, "batch", 1, default=1)
        model = _loaded({**request, "sequence": prompt + output, "sequences": batch})
        tokens = np.random.default_rng(0).integers(0, _count(request, "vocab", 1, default=2), (batch, prompt))
        _generate(model, tokens.tolist(), output)
        return {"peak_rss_bytes": _memory("VmHWM")}

    def op_bandwidth(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Best of several reads of an array much larger than any cache, by as many threads as the model uses."""
        import numpy as np

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


def _loaded(request: dict[str, Any]) -> Model:
    # OpenMP reads this once, when vLLM's libraries are loaded with the first model.
    os.environ["OMP_NUM_THREADS"] = str(_count(request, "threads", 1, default=1))
    folder, device = _field(request, "folder", str), _field(request, "device", str, "cpu")
    return Model(folder, device, _count(request, "sequence", 1), _count(request, "sequences", 1, default=1))


def _generate(model: Model, tokens: Sequence[Sequence[int]], output: int) -> dict[str, Any]:
    """One batch of prompts and ``output`` further tokens each, timed by the engine."""
    from vllm import SamplingParams

    # The prompt's own pass makes the first token, so one more is asked for: ``output`` are decoded.
    wanted = output + 1
    parameters = SamplingParams(
        temperature=0.0, max_tokens=wanted, min_tokens=wanted, ignore_eos=True, detokenize=False
    )
    found = model.generate(tokens, parameters)
    if any(len(request.outputs[0].token_ids) != wanted for request in found):
        raise RequestError("vLLM stopped before the length it was asked for")
    stats = [request.metrics for request in found]
    first = max(s.first_token_ts for s in stats)
    return {
        "prefill_s": first - min(s.scheduled_ts for s in stats),
        # Of the slowest request from its own first token on: prompts that take several steps let others decode meanwhile.
        "decode_s": max(s.last_token_ts - s.first_token_ts for s in stats),
        "ttft_s": [s.first_token_latency for s in stats],
        "token_s": [(s.last_token_ts - s.first_token_ts) / output for s in stats],
    }


def _trace(found: Sequence[dict[int, Any]], targets: Sequence[int]) -> dict[str, list[float]]:
    """Best token and the given token's log-probability at each position."""
    trace: dict[str, list[float]] = {"top1": [], "logprob": []}
    for entries, target in zip(found, targets, strict=True):
        trace["top1"].append(max(entries, key=lambda token: entries[token].logprob))
        trace["logprob"].append(float(entries[target].logprob))
    return trace


def _chunks(windows: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(windows), size):
        yield windows[start : start + size]


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


def _windows(request: dict[str, Any]) -> list[list[int]]:
    windows = request.get("windows")
    if not isinstance(windows, list) or not all(isinstance(w, list) and len(w) >= 2 for w in windows):
        raise RequestError("field 'windows' must be a list of token lists of at least 2 ids")
    if not all(isinstance(token, int) and token >= 0 for window in windows for token in window):
        raise RequestError("field 'windows' must hold non-negative integers")
    return windows


def _memory(field: str) -> int:
    """Bytes from /proc, whose peak starts anew with this program (getrusage inherits the parent's)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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


def main(arguments: Sequence[str] = ()) -> int:
    """Serve until shutdown or end of input. Arguments: folders with vLLM plugins, found by this process and its children."""
    stream: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # vLLM logs to stdout; file descriptor 1 leads to stderr from here on
    os.environ.update(_ENVIRONMENT)
    sys.path[:0] = arguments
    os.environ["PYTHONPATH"] = os.pathsep.join(arguments)

    def send(message: dict[str, Any]) -> None:
        stream.write(json.dumps(message, allow_nan=True) + "\n")

    worker = Worker()
    for line in sys.stdin:
        if line.strip() and not _answer(worker, line, send):
            break
    stream.flush()
    os._exit(0)  # an orderly end of the engines takes up to half a minute and gains nothing


if __name__ == "__main__":
    main(sys.argv[1:])
