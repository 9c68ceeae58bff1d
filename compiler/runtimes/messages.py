"""What the compiler asks a measuring process, and what it is told: one definition for both sides.

Standard library only, like ``wire``. Times are wall-clock seconds, log-probabilities natural logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from compile_sparse.compiler.runtimes.wire import Least, Request

__all__ = [
    "PROTOCOL",
    "Bandwidth",
    "Benchmark",
    "BenchmarkSamples",
    "Done",
    "Greeting",
    "Hello",
    "Load",
    "Loaded",
    "Memory",
    "Natural",
    "Observe",
    "PeakMemory",
    "Positive",
    "Ran",
    "ReadSpeed",
    "Round",
    "Rounds",
    "Run",
    "Runtime",
    "SampleTimes",
    "Score",
    "Scores",
    "Shutdown",
    "TokenTrace",
    "Trace",
    "Traces",
    "Unload",
    "Window",
    "WindowScore",
]

PROTOCOL = 1

Positive = Annotated[int, Least(1)]
Natural = Annotated[int, Least(0)]
Names = Annotated[list[str], Least(1)]
Window = Annotated[list[Natural], Least(2)]
"""Token ids: the first ones are read, all but the first one are predicted."""


@dataclass(frozen=True)
class Runtime:
    """What answers."""

    name: str
    version: str = ""
    device: str = ""


@dataclass(frozen=True)
class Greeting:
    """``protocol`` and ``runtime`` are None from a process that does not tell them."""

    protocol: int | None = None
    runtime: Runtime | None = None
    pid: int | None = None


@dataclass(frozen=True)
class Hello(Request[Greeting], operation="hello"):
    """Who is there?"""


@dataclass(frozen=True)
class Done:
    """Nothing more to say."""


@dataclass(frozen=True)
class Shutdown(Request[Done], operation="shutdown"):
    """Answer, then end."""


@dataclass(frozen=True)
class Loaded:
    """``inputs`` and ``outputs``: names, where the runtime knows them before a call. ``missing``: weights the folder lacks."""

    seconds: float
    rss_bytes: int
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    share_buffer: bool = False
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Load(Request[Loaded], operation="load"):
    """Keep the model in ``folder`` under ``name``.

    ``sequence`` (tokens of the longest one) and ``sequences`` (at once) are for runtimes that reserve memory when they load.
    """

    name: str
    folder: str
    threads: Positive = 1
    device: str = "cpu"
    sequence: Positive | None = None
    sequences: Positive = 1


@dataclass(frozen=True)
class Unload(Request[Done], operation="unload"):
    """Forget a model."""

    name: str


@dataclass
class TokenTrace:
    """Per predicted position: the likeliest token, the given token's log-probability, and by how much the best logit exceeds the
    second; ``margin`` is empty where the runtime does not tell it.
    """

    top1: list[int]
    logprob: list[float]
    margin: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Traces:
    """One trace per window."""

    windows: list[TokenTrace]


@dataclass(frozen=True)
class Trace(Request[Traces], operation="trace"):
    """Predict the tokens of windows: ``prefill`` tokens at once, then one given token at a time through the cache."""

    name: str
    windows: list[Window]
    prefill: Positive


@dataclass(frozen=True)
class WindowScore:
    """Of one window, by the model and by the one it is held against.

    ``nll``: negative log-likelihood of all predicted tokens. ``kl``: divergence, summed; None where the runtime tells the given
    tokens' probabilities only. ``top1_equal``: positions with the same likeliest token.
    """

    tokens: int
    nll: float
    nll_against: float
    top1_equal: int
    kl: float | None = None


@dataclass(frozen=True)
class Scores:
    """One score per window."""

    windows: list[WindowScore]


@dataclass(frozen=True)
class Score(Request[Scores], operation="score"):
    """Likelihood of windows by two loaded models."""

    name: str
    against: str
    windows: list[Window]


@dataclass(frozen=True)
class Round:
    """One generation of a batch.

    ``token_s``: per decode step, or per request where the runtime schedules them itself; ``ttft_s`` is then each one's time to
    its first token, and else empty.
    """

    prefill_s: float
    decode_s: float
    token_s: list[float]
    ttft_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Rounds:
    """Rounds by model."""

    rounds: dict[str, list[Round]]


@dataclass(frozen=True)
class Benchmark(Request[Rounds], operation="benchmark"):
    """Prefill and decode on random tokens below ``vocab``; the models take turns, and the order flips every round."""

    names: Names
    prompt_tokens: Positive
    output_tokens: Positive
    rounds: Positive
    vocab: Positive
    batch: Positive = 1
    warmup: Natural = 1
    seed: Natural = 0


@dataclass(frozen=True)
class SampleTimes:
    """Seconds of each call by model."""

    rounds: dict[str, list[float]]


@dataclass(frozen=True)
class BenchmarkSamples(Request[SampleTimes], operation="benchmark_samples"):
    """Whole calls on the arrays in the file ``feeds``, for models without a cache; the order flips every round."""

    names: Names
    feeds: str
    rounds: Positive
    warmup: Natural = 1


@dataclass(frozen=True)
class PeakMemory:
    """Of the process; ``device_bytes``: what the GPU has less to give, where there is one."""

    peak_rss_bytes: int
    device_bytes: int | None = None


@dataclass(frozen=True)
class Memory(Request[PeakMemory], operation="memory"):
    """Load one model and generate once. Meaningful in a fresh process only."""

    folder: str
    prompt_tokens: Positive
    output_tokens: Positive
    threads: Positive = 1
    batch: Positive = 1
    vocab: Positive = 2
    device: str = "cpu"


@dataclass(frozen=True)
class Ran:
    """Names of the arrays written."""

    outputs: list[str]


@dataclass(frozen=True)
class Run(Request[Ran], operation="run"):
    """One call on the arrays in the file ``feeds``, results into the file ``outputs``."""

    name: str
    feeds: str
    outputs: str


@dataclass(frozen=True)
class Observe(Request[Ran], operation="observe"):
    """Outputs of single layers, ``values``, into the file ``outputs``: ``0.NAME`` of the first call, ``1.NAME`` of the next.

    A decoder reads ``windows`` as for ``Trace``: one prefill, then one given token per call. Other models get the arrays in the
    file ``feeds`` in one call. Values that the loaded model does not have are left out.
    """

    name: str
    values: Names
    outputs: str
    windows: list[Window] = field(default_factory=list)
    prefill: Positive = 1
    feeds: str = ""


@dataclass(frozen=True)
class ReadSpeed:
    """Of memory."""

    bytes_per_s: float


@dataclass(frozen=True)
class Bandwidth(Request[ReadSpeed], operation="bandwidth"):
    """Read an array much larger than any cache, by as many threads as the model uses."""

    threads: Positive = 1
