"""How quick, large and accurate the exported networks are beside the original, kept as `export/table.json`.

Called by `zeroout export` only, which prints it by `deploy/export_table.py`. All networks take turns, call by call, in
one run: where the cores are shared with other work, what slows one slows its neighbours too.
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
import torch
from torch import Tensor

from deploy.description import image_shape
from deploy.export import points_of
from deploy.folder import CampaignFolder, read_json, versions, write_json
from deploy.formats import INT8, Source, format_of, load_exported, network_of
from deploy.quantize import BASELINE
from env.channels import costs_of
from env.compact_file import form_of_file, network_from_file
from env.copies import adopt
from env.errors import UserError

__all__ = ["ACCURACIES", "BATCHES", "RUNTIMES", "Latency", "latency", "measure", "seconds_by_round", "write_table"]

BATCHES = (1, 32)  # images
_WARM_UP = 3  # calls of each network, outside the timing
_LEAST = 5  # timed calls of each network, however slow
_BUDGET_S = 30.0  # seconds for each batch size, after which no further round begins
RUNTIMES = {
    "safetensors": "torch, eager",
    "pt2": "torch.export",
    "onnx": "onnxruntime",
    INT8: "onnxruntime, int8",
}
ACCURACIES = ("val_accuracy", "test_accuracy")

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
    """What `seconds_by_round`, of the same arguments, says of each call."""
    timed = seconds_by_round(calls, images, repeats=repeats, budget_s=budget_s, clock=clock)
    return {name: latency(seconds) for name, seconds in timed.items()}


def seconds_by_round(
    calls: Mapping[str, Call],
    images: Mapping[str, Tensor],
    *,
    repeats: int,
    budget_s: float = _BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
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
    return times


def latency(seconds: Sequence[float]) -> Latency:
    """The median and quartiles of at least one time in seconds."""
    first, middle, third = np.quantile(1000 * np.array(seconds), (0.25, 0.5, 0.75)).tolist()
    return Latency(median_ms=middle, quartile1_ms=first, quartile3_ms=third, n=len(seconds))


def write_table(folder: CampaignFolder, paths: Sequence[Path], *, repeats: int) -> Record:
    """Measure exported files beside the original in the same runtimes, and write `export/table.json`.

    Args:
        folder: a finished campaign.
        paths: what `deploy.export.export` and `deploy.quantize.export_int8` wrote.
        repeats: timed calls of each network at each batch size; with 0 the table has sizes and no times.

    Returns:
        What table.json holds: `machine`, `versions`, `threads`, `repeats`, and `rows`, for the original and each file:
        `network`, `format`, `runtime`, `parameters`, `macs`, `bytes`, `val_accuracy` and `test_accuracy` (a float
        network's are those of result.json, those in int8 were measured on the file; null where nobody knows), and where
        timed `latency` and `speedup` by batch size (the original's float median in the same runtime, divided by this
        one's). The baseline in int8 is the original's row of that format. Where skip convolutions were added to the
        original, what was trained is another network than was given: then it stands in rows of its own, `baseline`.

    Raises:
        UserError: repeats below 0.

    """
    if repeats < 0:
        raise UserError("--repeats", expected="at least 0", got=str(repeats), remedy="0 measures nothing")
    with tempfile.TemporaryDirectory() as scratch, _one_thread():
        entrants = [*_originals(folder, paths, Path(scratch)), *_exported(folder, paths, Path(scratch))]
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
    facts = read_json(folder.result_json)["baseline"]
    trained = _baseline(folder, _shape(paths[0]))
    source = _as_given(trained)
    if source is not trained:  # nobody has judged it without what was added
        facts = {**facts, **dict.fromkeys(ACCURACIES)}
    for name in dict.fromkeys(_float(format_of(path)) for path in paths):
        yield _entrant("original", _written(scratch / f"original.{name}", source), facts, source.image_shape)


def _baseline(folder: CampaignFolder, shape: tuple[int, int, int]) -> Source:
    """The network that the campaign has compressed."""
    model = str(folder.baseline / "model.safetensors")
    return Source(network_from_file(model), form_of_file(model), shape)


def _as_given(trained: Source) -> Source:
    """The baseline without the skip convolutions that were added to it: what the user had is what it costs.

    The same object where none were added. Where a transfer has removed filters of it, the whole network with fresh
    weights, which costs the same.
    """
    form = replace(trained.form, network=replace(trained.form.network, skips="coupled"))
    given, tensors = form.build(), {**dict(trained.network.named_parameters()), **dict(trained.network.named_buffers())}
    if any(tensors[name].shape != tensor.shape for name, tensor in given.named_parameters()):
        return Source(given.eval(), form, trained.image_shape)
    added = len(tensors) > len([*given.parameters(), *given.buffers()])
    return Source(adopt(given, tensors), form, trained.image_shape) if added else trained


def _exported(folder: CampaignFolder, paths: Sequence[Path], scratch: Path) -> Iterator[_Entrant]:
    """The exported files, those of one network side by side, the baseline first."""
    points = {str(point["target"]): point for point in points_of(folder)}
    networks = list(dict.fromkeys([BASELINE, *map(network_of, paths)]))
    for path in sorted(paths, key=lambda path: networks.index(network_of(path))):
        network = network_of(path)
        if network == BASELINE:
            yield from _baseline_int8(folder, path, scratch)
        else:
            yield _entrant(network, path, points[network] | _judged(path), _shape(path))


def _baseline_int8(folder: CampaignFolder, path: Path, scratch: Path) -> Iterator[_Entrant]:
    """The baseline in int8; before it in float too, where that is another network than the original."""
    facts = read_json(folder.result_json)["baseline"]
    trained = _baseline(folder, _shape(path))
    if _as_given(trained) is trained:
        yield _entrant("original", path, facts | _judged(path), trained.image_shape)
        return
    facts = facts | costs_of(trained.network, torch.zeros(1, *trained.image_shape))
    yield _entrant(BASELINE, _written(scratch / f"{BASELINE}.onnx", trained), facts, trained.image_shape)
    yield _entrant(BASELINE, path, facts | _judged(path), trained.image_shape)


def _judged(path: Path) -> Record:
    """The accuracies of an int8 file, from the description beside it; nothing for another one."""
    if format_of(path) != INT8:
        return {}
    facts = read_json(_description(path))["files"][path.name]
    return {key: facts[key] for key in ACCURACIES}


def _written(path: Path, source: Source) -> Path:
    path.write_bytes(source.encode(format_of(path)))
    return path


def _entrant(network: str, path: Path, facts: Record, shape: tuple[int, ...]) -> _Entrant:
    name = format_of(path)
    row = {"network": network, "format": name, "runtime": RUNTIMES[name], "bytes": path.stat().st_size}
    row |= {key: int(facts[key]) for key in ("parameters", "macs")}
    row |= {key: facts.get(key) for key in ACCURACIES}
    return _Entrant(row, load_exported(path, name, threads=1), shape)


def _time(entrants: Sequence[_Entrant], repeats: int) -> None:
    """Add `latency` and `speedup` to every row."""
    calls = {str(index): entrant.call for index, entrant in enumerate(entrants)}
    for batch in BATCHES:
        images = {str(index): _images(entrant, batch) for index, entrant in enumerate(entrants)}
        measured = measure(calls, images, repeats=repeats)
        original: dict[str, float] = {}
        for index, entrant in enumerate(entrants):
            row, found = entrant.row, measured[str(index)]
            row.setdefault("latency", {})[str(batch)] = asdict(found)
            # the originals come first
            speedup = original.setdefault(_float(row["format"]), found.median_ms) / found.median_ms
            row.setdefault("speedup", {})[str(batch)] = speedup


def _images(entrant: _Entrant, batch: int) -> Tensor:
    """Random images; for eager torch with channels innermost in memory, as Zeroout itself judges networks."""
    images = torch.randn(batch, *entrant.shape, generator=torch.Generator().manual_seed(batch))
    eager = entrant.row["format"] == "safetensors"
    return images.contiguous(memory_format=torch.channels_last) if eager else images


def _shape(path: Path) -> tuple[int, int, int]:
    """Channels, height and width, from the description beside an exported file."""
    return image_shape(read_json(_description(path)))


def _float(name: str) -> str:
    """The format in float that one in int8 is made of, and measured against; every other one is float itself."""
    return "onnx" if name == INT8 else name


def _description(path: Path) -> Path:
    return path.with_name(f"{network_of(path)}.json")


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
