"""How quick the exported networks are beside the original: measured, printed, kept as `export/table.json`.

Called by `zeroout export` only. All networks take turns, call by call, in one run: where the cores are shared with
other work, what slows one slows its neighbours too.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import torch
from rich.table import Table
from torch import Tensor

from deploy.description import image_shape
from deploy.export import points_of
from deploy.folder import CampaignFolder, read_json, versions, write_json
from deploy.formats import Source, load_exported
from env.channels import adopt
from env.compact_file import form_of_file, network_from_file
from env.errors import UserError

__all__ = ["BATCHES", "Latency", "measure", "render_table", "write_table"]

BATCHES = (1, 32)  # images
_WARM_UP = 3  # calls of each network, outside the timing
_LEAST = 5  # timed calls of each network, however slow
_BUDGET_S = 30.0  # seconds for each batch size, after which no further round begins
_RUNTIMES = {"safetensors": "torch, eager", "pt2": "torch.export", "onnx": "onnxruntime"}

Record = dict[str, Any]
Call = Callable[[Tensor], object]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of one call: the median of n calls, and the quartiles around it."""

    median_ms: float
    quartile1_ms: float
    quartile3_ms: float
    n: int


def measure(
    calls: Mapping[str, Call],
    images: Mapping[str, Tensor],
    *,
    repeats: int,
    budget_s: float = _BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Time each of `calls` on its own of `images`, in turns: one call of each in a round, each round begun by another.

    Args:
        calls: what is timed, by name.
        images: float32 [B, C, H, W], for each name.
        repeats: rounds; fewer, but at least 5, where `budget_s` is used up before.
        budget_s: seconds after which no further round begins.
        clock: seconds, for tests.

    """
    names = list(calls)
    for name in names:
        for _ in range(_WARM_UP):
            calls[name](images[name])
    times: dict[str, list[float]] = {name: [] for name in names}
    begun = clock()
    for turn in range(repeats):
        if turn >= _LEAST and clock() - begun > budget_s:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            calls[name](images[name])
            times[name].append(clock() - start)
    return {name: _latency(seconds) for name, seconds in times.items()}


def write_table(folder: CampaignFolder, paths: Sequence[Path], *, repeats: int) -> Record:
    """Measure exported files beside the original in the same runtimes, and write `export/table.json`.

    Args:
        folder: a finished campaign.
        paths: what `deploy.export.export` wrote.
        repeats: timed calls of each network at each batch size; with 0 the table has sizes and no times.

    Returns:
        What table.json holds: `machine`, `versions`, `threads`, `repeats`, and `rows`, for the original and each file:
        `network`, `format`, `runtime`, `parameters`, `macs`, `bytes`, and where timed `latency` and `speedup` by batch
        size (the original's median in the same runtime, divided by this one's).

    Raises:
        UserError: repeats below 0.

    """
    if repeats < 0:
        raise UserError("--repeats", expected="at least 0", got=str(repeats), remedy="0 measures nothing")
    with tempfile.TemporaryDirectory() as scratch, _one_thread():
        entrants = [*_originals(folder, paths, Path(scratch)), *_exported(folder, paths)]
        if repeats and entrants:
            _time(entrants, repeats)
    table = {
        "machine": _machine(),
        "versions": versions() | {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime")},
        "threads": 1,
        "repeats": repeats,
        "rows": [entrant.row for entrant in entrants],
    }
    write_json(folder.export / "table.json", table)
    return table


def render_table(table: Record) -> Table:
    """The rows of `write_table` for people: sizes, median milliseconds with quartiles, speed-up, n."""
    shown = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=_caption(table), caption_justify="left")
    for heading in ("network", "runtime"):
        shown.add_column(heading, no_wrap=True)
    headings = ["parameters", "MACs", "bytes"]
    if table["repeats"]:
        headings += [heading for batch in BATCHES for heading in (f"batch {batch}", "quartiles", "")] + ["n"]
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in table["rows"]:
        sizes = [f"{row['parameters']:,}", f"{row['macs'] / 1e6:,.1f} M", f"{row['bytes']:,}"]
        shown.add_row(row["network"], row["runtime"], *sizes, *_timings(row))
    return shown


@dataclass(frozen=True)
class _Entrant:
    """A row of the table, and what is timed for it on images of `shape` (C, H, W)."""

    row: Record
    call: Call
    shape: tuple[int, ...]


def _originals(folder: CampaignFolder, paths: Sequence[Path], scratch: Path) -> Iterator[_Entrant]:
    """The network as it was given, in each runtime of the exported files."""
    if not paths:
        return
    given = read_json(folder.result_json)["baseline"]
    source = _original(folder, _shape(paths[0]))
    for name in dict.fromkeys(_format(path) for path in paths):
        path = scratch / f"original.{name}"
        path.write_bytes(source.encode(name))
        yield _entrant("original", path, given, source.image_shape)


def _original(folder: CampaignFolder, shape: tuple[int, int, int]) -> Source:
    """The baseline without the skip convolutions that were added to it: what the user had is what it costs."""
    model = str(folder.baseline / "model.safetensors")
    form, trained = form_of_file(model), network_from_file(model)
    given = replace(form, network=replace(form.network, skips="coupled"))
    tensors = {**dict(trained.named_parameters()), **dict(trained.named_buffers())}
    return Source(adopt(given.build(), tensors), given, shape)


def _exported(folder: CampaignFolder, paths: Sequence[Path]) -> Iterator[_Entrant]:
    points = {str(point["target"]): point for point in points_of(folder)}
    for path in paths:
        yield _entrant(path.stem, path, points[path.stem], _shape(path))


def _entrant(network: str, path: Path, sizes: Record, shape: tuple[int, ...]) -> _Entrant:
    name = _format(path)
    row = {"network": network, "format": name, "runtime": _RUNTIMES[name], "bytes": path.stat().st_size}
    row |= {key: int(sizes[key]) for key in ("parameters", "macs")}
    return _Entrant(row, load_exported(path, name, threads=1), shape)


def _time(entrants: Sequence[_Entrant], repeats: int) -> None:
    """Add `latency` and `speedup` to every row."""
    calls = {str(index): entrant.call for index, entrant in enumerate(entrants)}
    for batch in BATCHES:
        images = {str(index): _images(entrant, batch) for index, entrant in enumerate(entrants)}
        measured = measure(calls, images, repeats=repeats)
        original: dict[str, float] = {}
        for index, entrant in enumerate(entrants):
            row, latency = entrant.row, measured[str(index)]
            row.setdefault("latency", {})[str(batch)] = asdict(latency)
            # the originals come first
            speedup = original.setdefault(row["runtime"], latency.median_ms) / latency.median_ms
            row.setdefault("speedup", {})[str(batch)] = speedup


def _images(entrant: _Entrant, batch: int) -> Tensor:
    """Random images; for eager torch with channels innermost in memory, as Zeroout itself judges networks."""
    images = torch.randn(batch, *entrant.shape, generator=torch.Generator().manual_seed(batch))
    eager = entrant.row["format"] == "safetensors"
    return images.contiguous(memory_format=torch.channels_last) if eager else images


def _latency(seconds: Sequence[float]) -> Latency:
    first, middle, third = np.quantile(1000 * np.array(seconds), (0.25, 0.5, 0.75)).tolist()
    return Latency(median_ms=middle, quartile1_ms=first, quartile3_ms=third, n=len(seconds))


def _shape(path: Path) -> tuple[int, int, int]:
    """Channels, height and width, from the description beside an exported file."""
    return image_shape(read_json(path.with_suffix(".json")))


def _format(path: Path) -> str:
    return path.suffix.removeprefix(".")


def _timings(row: Record) -> Iterator[str]:
    """The row's cells for each batch size, and how often was measured."""
    if "latency" not in row:
        return
    for batch in map(str, BATCHES):
        known = row["latency"][batch]
        yield f"{known['median_ms']:.3g}"
        yield f"{known['quartile1_ms']:.3g}-{known['quartile3_ms']:.3g}"
        yield "" if row["network"] == "original" else f"{row['speedup'][batch]:.2f}x"
    yield "/".join(dict.fromkeys(str(known["n"]) for known in row["latency"].values()))


def _caption(table: Record) -> str:
    machine, known = table["machine"], table["versions"]
    where = f"{machine['processor']}, {machine['cores']} cores, torch {known['torch']}, "
    how = (
        "median milliseconds of n calls, one thread, all networks by turns in one run; x: how much quicker than the "
        "original in the same runtime"
    )
    return f"{where}onnxruntime {known['onnxruntime']}; {how if table['repeats'] else 'latency not measured'}"


def _machine() -> Record:
    """Name of the processor and number of its cores that this process may use."""
    found = None
    with contextlib.suppress(OSError):  # only Linux has it
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    processor = found[1].strip() if found else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": processor, "cores": cores, "platform": platform.platform()}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
