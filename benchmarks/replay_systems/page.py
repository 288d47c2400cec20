"""The Markdown page of `benchmarks/replay.py`, made from the stored figures alone."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.step import Spread

Run = Mapping[str, Any]
System = Mapping[str, Any]

MEASURES = {
    "insert_one": "inserts/s, one by one",
    "insert_batch": "inserts/s, by 64",
    "sample": "sampled/s with update, by 64",
}
PLAIN = {measure: title.replace("/s", "") for measure, title in MEASURES.items()}
CALLS = {"insert": "insert_one", "sample": "sample", "update": "sample"}  # whose latency stands in which measure
CPU = ("client_cpu_us", "server_cpu_us")
OURS = ("ours-unix", "ours-tcp", "ours-pipelined")
BEATEN = ("reverb", "torchrl", "torchrl-bytes")
RAW = {"ours-unix": "raw-unix", "ours-tcp": "raw-tcp", "ours-pipelined": "raw-unix"}
LEAST_PER_S, MOST_OF_RAW, GROWTH_SLACK = 20_000, 3.0, 1.5


@dataclass(frozen=True)
class Row:
    """One thing that is compared: {round: value} of a system, where more is better."""

    title: str
    values: Callable[[System], dict[int, float]]


def report(run: Run) -> str:
    """The whole page."""
    systems: Mapping[str, System] = run["systems"]
    return "\n".join(
        [
            "# Replay speed", "", f"`{run['command']}`", "",
            "; ".join(f"{key} {value}" for key, value in run["about"].items()), "",
            "Medians over n interleaved rounds (quartiles). What the systems and measurements are, and which are not",
            "comparable: `python -m benchmarks.replay --help`.", "",
            *_floor(run), *_speeds(systems), *_latencies(systems), *_ratios(systems), *_cpu(systems), *_sizes(systems),
            "## Aims", "", *aims(systems), "",
        ]
    )  # fmt: skip


def _floor(run: Run) -> list[str]:
    floor = run["floor"]
    copy_us = floor["payload_bytes"] / floor["copy_gb_per_s"] / 1e3
    lines = [
        "## The floor",
        "",
        f"A sequence: {run['payload']}.",
        f"Its arrays are {floor['array_bytes']:,} bytes, {floor['payload_bytes']:,} encoded; the small one of",
        f"the table of sizes is {floor['small_payload_bytes']}. Our codec alone takes {floor['encode_us']:.1f} µs of",
        f"CPU to encode it and {floor['decode_us']:.1f} µs to decode it (best of 5 passes); one copy of its bytes",
        f"takes {copy_us:.2f} µs at {floor['copy_gb_per_s']:.1f} GB/s.",
        "",
        "The least that a batch of 64 needs is two commands, sample and update, with 64 payloads one way and 64 keys",
        "and priorities the other; an insert needs one, whatever its size. The raw rows are that, less the priorities.",
        "",
    ]
    counted = [(system["title"], cells) for system in run["systems"].values() if (cells := _counted(system))]
    if counted:
        lines += ["As the servers counted, bytes in / bytes out / commands (scripts' own too) for each sequence:", ""]
        lines += _head("system", *PLAIN.values())
        lines += [f"| {title} | " + " | ".join(cells) + " |" for title, cells in counted]
        lines.append("")
    return lines


def _counted(system: System) -> list[str]:
    """Bytes in, bytes out and commands for each sequence of each measure; nothing where no server counts."""
    last = system["rounds"][-1] if system["rounds"] else {}
    counts = [last[measure]["counted"] for measure in MEASURES if measure in last]
    if not all(counts):
        return []
    return [
        f"{c['total_net_input_bytes']:,.0f} / {c['total_net_output_bytes']:,.0f} / {c['total_commands_processed']:.2f}"
        for c in counts
    ]


def _speeds(systems: Mapping[str, System]) -> list[str]:
    def cells(system: System) -> list[str]:
        speeds = [_shown(per_s(measure)(system), "{:,.0f}") for measure in MEASURES]
        return [*speeds, *(_bytes(system, kind) for kind in ("used_bytes", "resident_bytes")), system["note"]]

    return [
        "## Speed and size", "",
        *_head("system", *MEASURES.values(), "bytes a sequence, used", "resident", ""),
        *_rows(systems, cells, 6), "",
        "Bytes: what the Redis server says it uses, and the growth of the resident memory of the process that holds",
        "the data, from empty to full, divided by the sequences. Uniform systems have no update to do.", "",
    ]  # fmt: skip


def _latencies(systems: Mapping[str, System]) -> list[str]:
    def cells(system: System) -> list[str]:
        return [_shown(latency(call, q)(system), "{:.3f}") for call in CALLS for q in (0, 1)]

    names = [
        f"{call}, {quantile}" for call in ("insert of 1", "sample of 64", "update of 64") for quantile in ("p50", "p99")
    ]
    return ["## Latency of one call, ms", "", *_head("system", *names), *_rows(systems, cells, 6), ""]


def _ratios(systems: Mapping[str, System]) -> list[str]:
    lines = ["## Ours : theirs, paired by round", ""]
    for name in [name for name in OURS if systems.get(name, {}).get("rounds")]:
        lines += _head(f"{systems[name]['title']} :", *MEASURES.values())
        for other, system in systems.items():
            if other not in OURS and system["rounds"]:
                ratios = [ratio(systems[name], system, per_s(measure)) for measure in MEASURES]
                lines.append(f"| {system['title']} | " + " | ".join(str(r or "") for r in ratios) + " |")
        lines.append("")
    return lines


def _cpu(systems: Mapping[str, System]) -> list[str]:
    def cell(system: System, measure: str) -> str:
        costs = [list(_cpu_us(system, measure, who).values()) for who in CPU]
        return " + ".join(f"{Spread.of(values).median:.0f}" for values in costs if values)

    return [
        "## CPU of client + server, µs a sequence", "",
        *_head("system", *PLAIN.values()), *_rows(systems, lambda s: [cell(s, measure) for measure in MEASURES], 3), "",
    ]  # fmt: skip


def _sizes(systems: Mapping[str, System]) -> list[str]:
    sizes = sorted({int(size) for system in systems.values() for size in system["sizes"]})
    if not sizes:
        return []
    lines = ["## Cost against size, sequences of about 100 bytes, µs a sequence", ""]
    for measure, title in (("sample", "sample and update, by 64"), ("insert_batch", "insert, by 64")):
        lines += _head(title, *(f"{size:,}" for size in sizes))
        lines += [
            f"| {system['title']} | " + " | ".join(_size_cell(system, size, measure) for size in sizes) + " |"
            for system in systems.values()
            if system["sizes"]
        ]
        lines.append("")
    return lines


def _size_cell(system: System, size: int, measure: str) -> str:
    found = system["sizes"].get(str(size))
    if not found:
        return "not run"
    if found["filled"]["stopped"]:
        return f"filled {found['filled']['stopped']}"
    return _shown(cost_at(size, measure)(system), "{:.1f}")


def aims(systems: Mapping[str, System]) -> list[str]:
    """Each aim, reached or missed, with the figure."""
    lines = []
    for name in OURS:
        if systems.get(name, {}).get("rounds"):
            ours = systems[name]
            lines += [_ahead(ours, systems[peer]) for peer in BEATEN if peer in systems]
            lines += [_fast_enough(ours, measure) for measure in ("sample", "insert_batch")]
            if RAW[name] in systems:
                lines.append(_near_raw(ours, systems[RAW[name]]))
    lines += [_grows_slowly(systems[name]) for name in OURS if systems.get(name, {}).get("sizes")]
    return lines


def _ahead(ours: System, peer: System) -> str:
    note = f" ({peer['note']})" if peer["note"] else ""
    title = f"{ours['title']}, ahead of {peer['title']}{note} on every row"
    found = [(row.title, r) for row in _compared(ours, peer) if (r := ratio(ours, peer, row.values))]
    behind = [f"{row} {r}" for row, r in found if r.median <= 1]
    if not found:
        return f"- {title}: not measured ({peer.get('error', 'no round')})"
    least = min(found, key=lambda pair: pair[1].median)
    if not behind:
        return f"- {title}: reached on all {len(found)}; least {least[0]} {least[1]}"
    return f"- {title}: **missed** on {len(behind)} of {len(found)}: {'; '.join(behind)}"


def _compared(ours: System, peer: System) -> list[Row]:
    """All rows of the tables on which two systems can stand beside each other."""
    rows = [Row(title, per_s(measure)) for measure, title in MEASURES.items()]
    rows += [
        Row(f"{call} {quantile}", _inverse(latency(call, q)))
        for call in CALLS
        for q, quantile in enumerate(("p50", "p99"))
    ]
    both_used = all("used_bytes" in system.get("filled", {}) for system in (ours, peer))
    rows.append(Row("bytes a sequence", _inverse(_bytes_of("used_bytes" if both_used else "resident_bytes"))))
    rows += [
        Row(f"{PLAIN[measure]}, at {int(size):,}", _inverse(cost_at(int(size), measure)))
        for size in ours["sizes"]
        for measure in ("sample", "insert_batch")
    ]
    return rows


def _fast_enough(ours: System, measure: str) -> str:
    reached = Spread.of(list(per_s(measure)(ours).values()))
    cpu_us = sum(Spread.of(list(_cpu_us(ours, measure, who).values())).median for who in CPU)
    verdict = "reached" if reached.median >= LEAST_PER_S else "**missed**"
    return (
        f"- {ours['title']}, {MEASURES[measure]} at least {LEAST_PER_S:,}: {verdict}, {_text(reached, '{:,.0f}')};"
        f" client and server one after the other, never waiting for a core, would give {1e6 / cpu_us:,.0f}"
    )


def _near_raw(ours: System, raw: System) -> str:
    found = {title: r for measure, title in MEASURES.items() if (r := ratio(raw, ours, per_s(measure)))}
    verdict = "reached" if found and all(r.median <= MOST_OF_RAW for r in found.values()) else "**missed**"
    figures = "; ".join(f"{title} {r} times" for title, r in found.items())
    return f"- {ours['title']}, within {MOST_OF_RAW:g} times of raw GET/SET: {verdict}: {figures}"


def _grows_slowly(ours: System) -> str:
    costs = {
        int(size): Spread.of(list(values.values())).median
        for size in ours["sizes"]
        if (values := cost_at(int(size), "sample")(ours))
    }
    if len(costs) < 2:
        return f"- {ours['title']}, log-like growth: not measured"
    small, large = min(costs), max(costs)
    most = math.log(large) / math.log(small) * GROWTH_SLACK
    grown = costs[large] / costs[small]
    verdict = "reached" if grown <= most else "**missed**"
    return (
        f"- {ours['title']}, log-like growth (a sample with update at {large:,} costs at most log({large:,})/"
        f"log({small:,}) x {GROWTH_SLACK} = {most:.2f} times that at {small:,}): {verdict}, {grown:.2f} times"
    )


def per_s(measure: str) -> Callable[[System], dict[int, float]]:
    """Sequences a second."""
    return lambda system: _values(system, lambda r: r[measure]["per_s"])


def latency(call: str, quantile: int) -> Callable[[System], dict[int, float]]:
    """Milliseconds; quantile 0 is p50, 1 is p99. Nothing for a call that the system does not have."""
    measure = CALLS[call]
    return lambda system: _values(
        system, lambda r: r[measure]["latency_us"][call][quantile] / 1e3 if call in r[measure]["latency_us"] else None
    )


def cost_at(size: int, measure: str) -> Callable[[System], dict[int, float]]:
    """Microseconds a sequence in a replay of `size` small ones."""
    return lambda system: _values(system["sizes"].get(str(size), {"rounds": []}), lambda r: 1e6 / r[measure]["per_s"])


def _cpu_us(system: System, measure: str, who: str) -> dict[int, float]:
    return _values(system, lambda r: r[measure][who])


def ratio(ours: System, other: System, values: Callable[[System], dict[int, float]]) -> Spread | None:
    """Ours divided by the other's in the same round; None where they share none."""
    mine, theirs = values(ours), values(other)
    shared = [mine[number] / theirs[number] for number in mine if number in theirs]
    return Spread.of(shared) if shared else None


def _values(holder: Mapping[str, Any], value: Callable[[Any], float | None]) -> dict[int, float]:
    return {r["round"]: found for r in holder["rounds"] if (found := value(r)) is not None}


def _bytes_of(kind: str) -> Callable[[System], dict[int, float]]:
    return lambda system: {0: system["filled"][kind]} if system.get("filled", {}).get(kind, 0) > 0 else {}


def _inverse(values: Callable[[System], dict[int, float]]) -> Callable[[System], dict[int, float]]:
    return lambda system: {number: 1 / value for number, value in values(system).items()}


def _bytes(system: System, kind: str) -> str:
    return _shown(_bytes_of(kind)(system), "{:,.0f}")


def _shown(values: Mapping[int, float], form: str) -> str:
    return _text(Spread.of(list(values.values())), form) if values else ""


def _text(spread: Spread, form: str) -> str:
    middle, low, high = (form.format(value) for value in (spread.median, spread.low, spread.high))
    return middle if low == middle == high else f"{middle} ({low} to {high})"


def _head(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _rows(systems: Mapping[str, System], cells: Callable[[System], list[str]], width: int) -> list[str]:
    """A line for each system; one that failed says why in its first cell."""
    lines = []
    for system in systems.values():
        shown = cells(system) if system["rounds"] else [""] * width
        if "error" in system:
            shown[0] = f"{shown[0]} **failed: {system['error'].replace('|', '/')}**".strip()
        lines.append(f"| {system['title']} | " + " | ".join(shown) + " |")
    return lines
