"""``report.json``: what was done to a model and what it measurably changed.

Parts that were not measured are absent, never zero. Decoders report tokens and perplexity; encoders and vision models report
``samples_s`` and the agreement of outputs in their place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from compile_sparse.compiler.artifact.section import DiagnosticEntry, Section, SourceSection

__all__ = [
    "Change",
    "DiagnosticEntry",
    "Fidelity",
    "GateResult",
    "GraphSparsity",
    "Interval",
    "Kind",
    "Level",
    "MeasuredWorkload",
    "ModelSection",
    "PassSection",
    "Percentiles",
    "Performance",
    "Quality",
    "Ratios",
    "Report",
    "RuntimeSection",
    "Score",
    "Slice",
    "SourceSection",
    "SparseLayer",
    "SparseProfile",
    "SparseProfileLayer",
    "SparseShape",
    "Sparsity",
    "Speed",
]


class RuntimeSection(Section):
    """What executed the artifact."""

    name: str
    version: str = ""
    device: str = ""


class Change(Section):
    """A quantity of the dense baseline and of the compiled model."""

    baseline: int = Field(ge=0)
    compiled: int = Field(ge=0)


Kind = Literal["decoder", "encoder", "vision", "audio"]


class ModelSection(Section):
    """Size of the model."""

    kind: Kind | None = None
    parameters: Change = Field(description="trained elements")
    artifact_bytes: Change | None = Field(default=None, description="bytes of what the runtime loads")
    source_bytes: int | None = Field(
        default=None,
        ge=0,
        description="bytes of what the model was compiled from: weight files, config and files beside them",
    )
    precision: Literal["fp32", "fp16", "bf16"] | None = Field(
        default=None, description="of what is not quantized, in the baseline too"
    )
    zeros: float | None = Field(default=None, ge=0, le=1, description="share of stored weights that are zero, 0 to 1")


class PassSection(Section):
    """What one pass was asked, and did."""

    name: str
    changes_numerics: bool | None = Field(
        default=None,
        description="whether values differ from the dense model's because numbers are quantized; absent: an earlier version "
        "wrote the report, and the model is judged as if they might",
    )
    requested: dict[str, Any] = Field(default_factory=dict)
    achieved: dict[str, Any] = Field(default_factory=dict)
    seconds: float | None = Field(default=None, ge=0, description="wall-clock seconds")
    peak_rss_bytes: int | None = Field(default=None, ge=0, description="highest resident memory, bytes")
    skips: tuple[DiagnosticEntry, ...] = ()
    notes: tuple[str, ...] = ()


class LayerError(Section):
    """One layer of the artifact, computed by the runtime and by the program from the same input."""

    layer: str = Field(description="module path, or the node's name where that is not known")
    error: float | None = Field(
        ge=0,
        description="length of the difference over that of the output, where it is farthest beyond; null: not a number",
    )
    bound: float = Field(ge=0, description="what rounding explains of that")


class LayerFidelity(Section):
    """The runtime's layers against the program's, each from the input that the runtime itself had."""

    checked: int = Field(ge=0, description="layers compared: GEMMs and convolutions, with what lies before each")
    processor: str = Field(default="", description="digest of what the processor is and can: kernels follow from it")
    unseen: int = Field(default=0, ge=0, description="layers with weights whose values the runtime does not show")
    wrong: tuple[LayerError, ...] = Field(default=(), description="beyond their bound, the worst first")
    nearest: LayerError | None = Field(default=None, description="the one nearest to its bound, where none is beyond")


class Fidelity(Section):
    """The runtime's output against the program run in torch, on the same inputs."""

    tokens: int | None = Field(default=None, ge=0, description="decoders: positions compared")
    samples: int | None = Field(default=None, ge=0, description="encoders and vision: inputs compared")
    ties: int | None = Field(
        default=None, ge=0, description="decoders: positions left out of top-1, the program's best two being too close"
    )
    mean_abs_logprob_diff: float | None = Field(default=None, ge=0, description="decoders, nats")
    logprob_bound: float | None = Field(
        default=None, ge=0, description="what rounding in the runtime's precision explains of that, nats"
    )
    max_abs_diff: float | None = Field(default=None, ge=0, description="largest difference of an output element")
    mean_cosine: float | None = Field(default=None, ge=-1, le=1.000001, description="of output vectors, -1 to 1")
    top1_agreement: float | None = Field(
        default=None, ge=0, le=1, description="share of equal arg-max of logits, 0 to 1"
    )
    top1_bound: float | None = Field(
        default=None, ge=0, le=1, description="lowest agreement that rounding in the runtime's precision explains"
    )
    relative_error: float | None = Field(
        default=None, ge=0, description="encoders and vision: length of the difference over that of the output"
    )
    error_bound: float | None = Field(default=None, ge=0, description="what rounding explains of that")
    layers: LayerFidelity | None = Field(default=None, description="layer by layer; absent: the runtime shows none")
    runtime: str | None = Field(
        default=None, description="what ran the artifact where the target's own runtime could not be used"
    )


class MeasuredWorkload(Section):
    """What was run."""

    batch: int = Field(ge=1, description="requests or samples at once")
    prompt_tokens: int | None = Field(default=None, ge=1, description="decoders, tokens per request")
    output_tokens: int | None = Field(default=None, ge=1, description="decoders, tokens per request")
    rounds: int = Field(ge=1, description="alternating measurements of each model")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of the runtime")


class Percentiles(Section):
    """A distribution, in the unit of its field."""

    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class Speed(Section):
    """Performance of one model."""

    prefill_tok_s: float | None = Field(default=None, gt=0, description="prompt tokens per second, whole batch")
    decode_tok_s: float | None = Field(default=None, gt=0, description="generated tokens per second, whole batch")
    samples_s: float | None = Field(default=None, gt=0, description="encoders and vision: inputs per second")
    ttft_ms: Percentiles | None = Field(default=None, description="time to first token, milliseconds")
    tpot_ms: Percentiles | None = Field(default=None, description="time per output token, milliseconds")
    latency_ms: Percentiles | None = Field(
        default=None, description="encoders and vision: time per batch, milliseconds"
    )
    peak_rss_bytes: int | None = Field(default=None, ge=0, description="of the measuring process, bytes")
    roofline: float | None = Field(
        default=None,
        ge=0,
        description="bytes of the model folder over time per token and measured bandwidth",
    )


class Interval(Section):
    """Compiled over baseline, with its 95 % confidence interval."""

    value: float = Field(gt=0)
    ci95: tuple[float, float]


class Ratios(Section):
    """Compiled over baseline. Rates above 1 are gains; times and bytes below 1 are."""

    prefill_tok_s: Interval | None = None
    decode_tok_s: Interval | None = None
    samples_s: Interval | None = None
    workload: Interval | None = Field(default=None, description="speed of the whole workload, from per-round totals")
    ttft_ms: dict[str, Interval] | None = None
    tpot_ms: dict[str, Interval] | None = None
    peak_rss_bytes: Interval | None = None


class Level(Section):
    """Speed with some number of requests at once."""

    baseline: Speed
    compiled: Speed
    ratio: Ratios


class Performance(Level):
    """Baseline and compiled model, measured in alternation in one runtime."""

    workload: MeasuredWorkload
    concurrency: dict[str, Level] | None = Field(
        default=None,
        description="by number of requests at once, where several were asked for; the first is the one above",
    )


class Score(Section):
    """A score of both models on the same inputs; higher is better."""

    baseline: float
    compiled: float


class Slice(Section):
    """Quality on one named set of inputs, compiled against baseline."""

    loss: float | None = Field(
        default=None,
        ge=0,
        description="how many times worse than the dense model: a ratio of perplexities, or the dense model's score over the "
        "compiled one's; below 1 is better. Absent beside loss_of: nothing is left, or the answers are no numbers",
    )
    loss_of: str | None = Field(default=None, description="which figure the loss is of, such as perplexity or cosine")
    scores: dict[str, Score] | None = Field(
        default=None, description="by name, such as accuracy, f1, auc, recall@1, mrr and ndcg@10; each from 0 to 1"
    )
    ppl_baseline: float | None = Field(default=None, gt=0)
    ppl_compiled: float | None = Field(default=None, gt=0)
    ratio: float | None = Field(default=None, gt=0, description="of perplexities; below 1 is better")
    ci95: tuple[float, float] | None = Field(default=None, description="of the ratio")
    kl: float | None = Field(default=None, description="mean KL divergence from the baseline, nats")
    top1_agreement: float | None = Field(default=None, ge=0, le=1)
    mean_cosine: float | None = Field(
        default=None, ge=-1, le=1.000001, description="of output vectors, or of embeddings, to the dense model's"
    )
    rank_agreement: float | None = Field(
        default=None,
        ge=-1,
        le=1.000001,
        description="embeddings: Spearman correlation of all pairs' similarities with the dense model's",
    )
    logit_error: float | None = Field(
        default=None, ge=0, description="root mean square difference of logits over their spread in the dense model"
    )
    note: str | None = Field(default=None, description="what had to be assumed, or left out")
    samples: int | None = Field(default=None, ge=0, description="windows, texts, pairs or other inputs")
    tokens: int | None = Field(default=None, ge=0, description="predicted tokens")


class Quality(Section):
    """Quality by slice; the worst is the one with the largest loss."""

    slices: dict[str, Slice]
    worst_slice: str | None = None
    known: bool = Field(
        default=True,
        description="false: no evaluation data was given, and the slice only says how far the model is from the dense one",
    )
    max_loss: float | None = Field(
        default=None, ge=1, description="loss of the worst slice beyond which quality counts as lost; absent: no limit"
    )


class SparseLayer(Section):
    """A GEMM that was made sparse, as the artifact's graph has it."""

    node: str = Field(description="name of its node in the graph")
    tensor: str = Field(description="name of its weight")
    dtype: str = Field(description="how the weight is stored")
    k: int = Field(ge=0, description="elements that are contracted")
    n: int = Field(ge=0, description="outputs")
    state: str = Field(description="the pattern, 'dense', 'K % M', or 'no constant'")
    remarks: tuple[str, ...] = Field(default=(), description="what may keep it from a sparse kernel")


class GraphSparsity(Section):
    """What the artifact's graph has, whatever a builder makes of it."""

    states: dict[str, int] = Field(description="state -> GEMMs of the whole graph")
    layers: tuple[SparseLayer, ...] = Field(default=(), description="those that were made sparse")
    unintended: tuple[str, ...] = Field(default=(), description="GEMMs that have the pattern without being made so")


class SparseProfileLayer(Section):
    """What a builder did with one GEMM that was made sparse. A missing answer is not known."""

    node: str
    eligible: bool | None = Field(default=None, description="the builder saw the zeros")
    chosen: bool | None = Field(default=None, description="the builder picked a sparse kernel, as its log says")
    kernel: bool | None = Field(default=None, description="the built kernel is a sparse one, as its name says")


class SparseShape(Section):
    """GEMMs of one shape that were made sparse and stayed on dense kernels."""

    k: int = Field(ge=0)
    n: int = Field(ge=0)
    dtype: str
    layers: int = Field(ge=1)
    example: str = Field(description="one of them")


class SparseProfile(Section):
    """What a builder did for one optimization profile, in GEMMs that were made sparse."""

    eligible: int | None = Field(default=None, ge=0, description="GEMMs whose zeros the builder saw")
    chosen: int | None = Field(default=None, ge=0, description="GEMMs with a sparse kernel, from the builder's log")
    kernels: int | None = Field(default=None, ge=0, description="GEMMs whose built kernel is a sparse one")
    logged_eligible: int | None = Field(
        default=None, ge=0, description="layers that the builder counts, whoever meant them"
    )
    logged_chosen: int | None = Field(
        default=None, ge=0, description="layers that the builder counts, whoever meant them"
    )
    layers: tuple[SparseProfileLayer, ...] | None = None
    declined: tuple[SparseShape, ...] | None = Field(
        default=None, description="shapes for which dense kernels were faster"
    )
    # The key's name is older than the idea that any backend may have a dense build to compare with.
    twin: Interval | None = Field(default=None, description="speed over the same model built without sparse kernels")


class Sparsity(Section):
    """Whether zeros that were made in a pattern reach sparse kernels."""

    pattern: str = Field(description="N:M along the contracted axis")
    intended: int = Field(ge=0, description="GEMMs that were made sparse")
    in_graph: GraphSparsity | None = None
    profiles: dict[str, SparseProfile] | None = Field(
        default=None, description="by optimization profile; absent: unverified"
    )
    unverified: str = Field(default="", description="why no builder chose kernels; empty when one did")
    notes: tuple[str, ...] = ()

    def with_speed(self, over_dense: Mapping[str, Interval]) -> Sparsity:
        """The section with the speed of sparse kernels over dense ones, for the profiles that were measured."""
        profiles = {
            name: section.model_copy(update={"twin": over_dense.get(name)})
            for name, section in (self.profiles or {}).items()
        }
        return self.model_copy(update={"profiles": profiles or None})


class GateResult(Section):
    """A judged gate; see ``verify/gates.py``."""

    gate: str
    value: float | None
    bound: float | None = None
    passed: bool
    why: str = ""


class Report(Section):
    """The whole file."""

    schema_version: Literal[1] = 1
    target: str
    verdict: Literal["faster", "smaller-only", "slower", "no-gain", "quality-lost", "refused", "unverified"]
    verdict_why: str = ""
    runtime: RuntimeSection | None = None
    model: ModelSection
    source: SourceSection | None = None
    passes: tuple[PassSection, ...] = ()
    fidelity: Fidelity | None = None
    performance: Performance | None = None
    quality: Quality | None = None
    sparsity: Sparsity | None = None
    gates: tuple[GateResult, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> str:
        """Text of ``report.json``: absent parts are left out, a gate's missing value stays ``null``."""
        data = self.model_dump(mode="json", exclude_none=True)
        if "gates" in data:
            data["gates"] = [gate.model_dump(mode="json") for gate in self.gates]
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
