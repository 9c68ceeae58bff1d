"""Reports, plans and registries as tables for people (rich; printed by the command line)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from compile_sparse.compiler.cli.numbers import interval, plain
from compile_sparse.compiler.cli.quality_rows import quality_notes, quality_rows

__all__ = ["doctor_table", "plan_table", "report_table", "runtimes_table", "targets_table"]

_STYLES = {
    "faster": "bold green",
    "smaller-only": "cyan",
    "slower": "bold red",
    "quality-lost": "bold red",
    "refused": "bold red",
}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def report_table(report: Mapping[str, Any]) -> RenderableType:
    """Verdict, measurements, passes and gates of a report."""
    verdict = str(report.get("verdict", "unverified"))
    head = Text.assemble((verdict, _STYLES.get(verdict, "yellow")), f"  {report.get('verdict_why', '')}")
    parts: list[RenderableType] = [head, _measurements(report)]
    skips = (report.get("source") or {}).get("skips")
    parts += [_diagnostics("in the model's folder", skips)] if skips else []
    parts += [_passes(report["passes"])] if report.get("passes") else []
    parts += [_sparsity(report["sparsity"])] if report.get("sparsity") else []
    parts += [_gates(report["gates"])] if report.get("gates") else []
    notes = (*quality_notes(report.get("quality") or {}), *report.get("notes", ()))
    parts += [Text(f"note: {note}") for note in notes]
    return Group(*parts)


def plan_table(plan: Mapping[str, Any]) -> RenderableType:
    """What ``explain`` found: sizes, passes, groups, refusals."""
    model = plan.get("model", {})
    parts: list[RenderableType] = [
        Text(f"{model.get('kind', 'model')}, {model.get('layers', '?')} layers, for {plan.get('target', '?')}"),
        _sizes(plan),
    ]
    parts += [_diagnostics("in the model's folder", plan["source"])] if plan.get("source") else []
    parts += [_passes(plan["passes"])] if plan.get("passes") else []
    if groups := plan.get("groups"):
        parts.append(_groups(groups))
    if gain := plan.get("gain"):
        parts.append(_gain(gain))
    if runtime := plan.get("runtime"):
        parts.append(_diagnostics("what the runtime cannot do, or does slowly", runtime))
    if refusals := plan.get("refusals"):
        parts.append(_diagnostics("refused", refusals))
    return Group(*parts)


def targets_table(targets: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The registry, one line per target."""
    table = _table("targets", "target", "backend", "baseline", "summary")
    for target in targets:
        table.add_row(*(escape(str(target[key])) for key in ("name", "backend", "baseline_precision", "summary")))
    return table


def doctor_table(probes: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Which runtimes work here, and why the others don't."""
    table = _table("runtimes on this machine", "target", "works", "runtime", "device", "why not", "hint")
    for probe in probes:
        runtime = f"{probe.get('runtime', '')} {probe.get('version', '')}".strip()
        works = "yes" if probe.get("available") else "no"
        cells = (probe.get("target"), works, runtime, probe.get("device"), probe.get("why_not"), probe.get("hint"))
        table.add_row(*(escape(str(cell or "")) for cell in cells))
    return table


def runtimes_table(runtimes: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Where each runtime with an interpreter of its own is, or how to get it."""
    table = _table("runtimes in their own interpreters", "runtime", "installed", "versions", "device", "python", "hint")
    for runtime in runtimes:
        record = runtime.get("record") or {}
        facts = record.get("facts") or {}
        versions = "\n".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
        details = (facts.get(key) for key in ("isa", "gpu", "capability"))
        device = " ".join(str(part) for part in (record.get("device"), *details) if part)
        origin = f"{record['python']} ({'managed' if record['managed'] else 'added'})" if record else ""
        hint = " ".join(part for part in (runtime.get("why_not"), runtime.get("hint")) if part)
        cells = (runtime["name"], "yes" if runtime.get("installed") else "no", versions, device, origin, hint)
        table.add_row(*(escape(cell) for cell in cells))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _measurements(report: Mapping[str, Any]) -> Table:
    table = _table("baseline and compiled", "", "baseline", "compiled", "ratio (95 % interval)")
    for row in (
        *_size_rows(report.get("model") or {}),
        *_speed_rows(report),
        *quality_rows(report.get("quality") or {}),
    ):
        table.add_row(*row)
    if source := report.get("source"):
        said = "computes what it does" if source.get("difference") is not None else f"not run: {source['not_run']}"
        table.add_row(
            escape(f"{source['model_class']} of transformers"), said, f"{source['tensors']:,} tensors equal", ""
        )
    if (agreement := (report.get("fidelity") or {}).get("top1_agreement")) is not None:
        table.add_row("top-1 agreement with the program", "", f"{agreement:.2%}", "")
    if layers := (report.get("fidelity") or {}).get("layers"):
        right = layers["checked"] - len(layers["wrong"])
        table.add_row("layers that compute the program", "", f"{right:,} of {layers['checked']:,}", "")
    return table


def _sizes(data: Mapping[str, Any]) -> Table:
    table = _table("expected size", "", "baseline", "compiled", "ratio")
    sizes = {"parameters": data.get("parameters"), "artifact_bytes": data.get("bytes")}
    for row in _size_rows(sizes | {"source_bytes": data.get("source_bytes")}):
        table.add_row(*row)
    return table


def _size_rows(model: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for key, label, show in (("parameters", "parameters", plain), ("artifact_bytes", "bytes", _bytes)):
        if change := model.get(key):
            before, after = change["baseline"], change["compiled"]
            yield label, show(before), show(after), f"{after / before:.3f}x" if before else ""
    source, change = model.get("source_bytes"), model.get("artifact_bytes")
    if source and change:
        after = change["compiled"]
        yield "bytes, beside the source's files", _bytes(source), _bytes(after), f"{after / source:.3f}x"


def _speed_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    performance = report.get("performance") or {}
    baseline, compiled, ratio = (performance.get(key) or {} for key in ("baseline", "compiled", "ratio"))
    for key, label in (
        ("prefill_tok_s", "prefill tok/s"),
        ("decode_tok_s", "decode tok/s"),
        ("samples_s", "samples/s"),
    ):
        if compiled.get(key) is not None:
            yield label, plain(baseline.get(key)), plain(compiled[key]), interval(ratio.get(key))
    for key, label in (("ttft_ms", "first token, ms p50"), ("tpot_ms", "per token, ms p50")):
        if (value := (compiled.get(key) or {}).get("p50")) is not None:
            before = (baseline.get(key) or {}).get("p50")
            yield label, plain(before), plain(value), interval((ratio.get(key) or {}).get("p50"))
    if compiled.get("peak_rss_bytes"):
        yield "peak memory", _bytes(baseline.get("peak_rss_bytes")), _bytes(compiled["peak_rss_bytes"]), ""


def _passes(passes: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = _table("passes", "pass", "requested", "achieved", "left alone")
    for entry in passes:
        cells = (entry["name"], _options(entry.get("requested")), _options(entry.get("achieved")))
        table.add_row(*(escape(str(cell)) for cell in cells), str(len(entry.get("skips") or ())))
    diagnostics = [each for entry in passes for each in entry.get("skips") or ()]
    notes = [Text(f"{entry['name']}: {note}") for entry in passes for note in entry.get("notes") or ()]
    return Group(table, *notes, *([_diagnostics("left alone", diagnostics)] if diagnostics else []))


def _diagnostics(title: str, diagnostics: Sequence[Mapping[str, Any]], *, most: int = 12) -> RenderableType:
    table = _table(title, "code", "where", "why", "hint")
    for each in diagnostics[:most]:
        table.add_row(*(escape(str(each.get(key, ""))) for key in ("code", "where", "why", "hint")))
    more = len(diagnostics) - most
    return Group(table, Text(f"... and {more:,} more; --json lists all.")) if more > 0 else table


def _groups(groups: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = _table(
        "what may be removed together", "axis", "count", "size", "parameters", "bytes", "FLOPs", "left alone because"
    )
    for group in groups:
        frozen = group.get("frozen")
        reason = "" if not frozen else "fixed" if frozen is True else str(frozen)
        name = f"{group['kind']} (query, in each group)" if group.get("unit") == "query" else str(group["kind"])
        shares = (_share(group.get(key)) for key in ("parameter_share", "byte_share", "flop_share"))
        table.add_row(escape(name), f"{group['count']:,}", plain(group["size"]), *shares, escape(reason))
    return Group(table, Text("Shares of the model that go through them; a matrix has two axes, so they overlap."))


def _gain(gain: Mapping[str, Any]) -> RenderableType:
    table = _table("what the target could gain at most (not measured)", "", "", "baseline", "compiled", "speed-up")
    for label in ("decode", "prefill", "forward"):
        if found := gain.get(label):
            show = _bytes if "bytes" in found["quantity"] else plain
            ratio = found["at_most"]
            bound = (
                f"not known: {found['unknown_because']}" if ratio is None else f"at most {ratio:.2f}x if {found['if']}"
            )
            table.add_row(label, found["quantity"], show(found["baseline"]), show(found["compiled"]), escape(bound))
    return Group(table, Text(str(gain.get("basis", ""))))


def _sparsity(sparsity: Mapping[str, Any]) -> RenderableType:
    pattern, intended = str(sparsity["pattern"]), sparsity["intended"]
    in_graph = (sparsity.get("in_graph") or {}).get("layers") or ()
    have = sum(layer["state"] == pattern for layer in in_graph)
    columns = ("profile", "made so", "in the graph", "eligible", "chosen", "sparse kernels", "over dense")
    table = _table(f"layers with {pattern} zeros, and what the builder made of them", *columns)
    for name, found in (sparsity.get("profiles") or {"": {}}).items():
        counts = (
            "unverified" if found.get(key) is None else f"{found[key]:,}" for key in ("eligible", "chosen", "kernels")
        )
        graph = f"{have:,}" if sparsity.get("in_graph") else ""
        table.add_row(escape(name), f"{intended:,}", graph, *counts, interval(found.get("twin")))
    lines = [f"unverified: {sparsity['unverified']}"] if sparsity.get("unverified") else []
    lines += [
        f"{name}: {shape['layers']:,} of K={shape['k']:,} N={shape['n']:,} {shape['dtype']} stayed dense, {shape['example']} "
        "among them"
        for name, found in (sparsity.get("profiles") or {}).items()
        for shape in found.get("declined") or ()
    ]
    lines += [f"note: {note}" for note in sparsity.get("notes") or ()]
    return Group(table, *(Text(line) for line in lines))


def _gates(gates: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("gates", "gate", "", "why")
    for gate in gates:
        mark = "[green]passed[/]" if gate["passed"] else "[red]failed[/]"
        table.add_row(escape(gate["gate"]), mark, escape(str(gate.get("why", ""))))
    return table


def _options(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key}={_option(value)}" for key, value in (values or {}).items() if value is not None)


def _option(value: Any) -> str:
    if isinstance(value, Mapping) and {"before", "after"} <= set(value):
        sizes = ", ".join(f"{size:,}" for size in value.get("sizes", ()))
        return f"{value['before']:,} to {value['after']:,}" + (f" ({sizes} each)" if sizes else "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _bytes(value: Any) -> str:
    if value is None:
        return ""
    size, unit = float(value), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:,.4g} {_UNITS[unit]}"
