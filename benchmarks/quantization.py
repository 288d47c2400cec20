"""Pruned, quantized, and both: what each costs in accuracy, and saves in bytes and time.

`python -m benchmarks.quantization --help` says what is compared and how.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.paired import difference, spread
from benchmarks.step import cpu_name
from deploy.compare import identity
from deploy.config import CampaignConfig, load
from deploy.export import chosen_points, model_of, points_of
from deploy.finished import read_campaigns
from deploy.folder import CampaignFolder, read_json, versions, write_atomic
from deploy.formats import Source, load_exported
from deploy.latency import ACCURACIES, BATCHES, latency, seconds_by_round
from deploy.quantize import CALIBRATION_IMAGES, accuracy, calibration_images, quantize
from env.compact_file import form_of_file, network_from_file
from env.data import Dataset, load_dataset
from env.errors import UserError

RESULTS = Path(__file__).parent / "results"
NETWORKS = ("baseline", "pruned", "baseline int8", "pruned int8")
BUDGET_S = 120.0  # seconds for each batch size of a campaign, after which no further round begins

EPILOG = f"""\
Of each finished campaign four ONNX files are made anew, in a folder that is removed; the campaign is only read:
  baseline       the network before anything was removed, float32
  pruned         what the campaign chose at --compression, float32
  baseline int8, pruned int8
                 the same two as `zeroout export --int8` writes them: weights int8 with a scale for each output channel,
                 activations uint8, calibrated on {CALIBRATION_IMAGES} training images drawn by the campaign's seed

What is counted:
  accuracy   of all four by onnxruntime on the same images, the campaign's validation and test splits. Nothing is
             chosen here by either. The largest difference between a float file and what the campaign itself has
             noted is given too.
  bytes      of the ONNX file, with the graph and without Zeroout's description
  latency    of a call with 1 and with 32 random images, one thread. The four take turns, call by call, each round begun
             by another; three calls of each go before, untimed. A ratio is of two times of the same round, the float
             baseline's divided by this one's: above 1, this one is quicker.
A campaign is one sample: the table gives mean, standard deviation and n over campaigns of accuracies and bytes, and of
the campaigns' median times and ratios the median, with the lowest and highest. Each campaign's own numbers, with
quartiles over its rounds, stand below it. Campaigns must differ in their seeds, and in nothing else.

examples:
  python -m benchmarks.quantization --campaign runs/seed-0 runs/seed-1 runs/seed-2 runs/seed-3 runs/seed-4
  python -m benchmarks.quantization --campaign runs/demo --rounds 20 --out /tmp
"""

Record = dict[str, Any]


def chosen(folder: CampaignFolder, compression: float | None) -> Record:
    """The point of a campaign that is compared: the nearest to `compression`, else that of the highest target."""
    return max(chosen_points(folder, compression), key=lambda point: float(point["target"]))


def measured(folder: CampaignFolder, point: Record, rounds: int) -> Record:
    """Everything about one campaign and one of its points."""
    config = load(folder.campaign_toml)
    dataset = load_dataset(config.data)
    noted = {"baseline": read_json(folder.result_json)["baseline"], "pruned": point}
    models = {"baseline": "baseline/model.safetensors", "pruned": str(point["model"])}
    images = calibration_images(dataset, config.seed)
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for name, model in models.items():
            data = float_file(str(model_of(folder, folder.path / model)), dataset)
            for suffix, made in (("", data), (" int8", quantize(data, images))):
                files[name + suffix] = Path(scratch) / f"{name}{suffix}.onnx"
                files[name + suffix].write_bytes(made)
        networks: dict[str, Record] = {name: judged(files[name], dataset) for name in NETWORKS}
        times(files, networks, dataset, rounds)
    differences = [abs(networks[name][key] - noted[name][key]) for name in noted for key in ACCURACIES]
    return {
        "folder": folder.path.name,
        "seed": config.seed,
        "target": point["target"],
        "compression": point["compression"],
        "calibration_images": len(images),
        "images": {"validation": len(dataset.validation), "test": len(dataset.test)},
        "largest_difference_to_campaign": max(differences),
        "networks": networks,
    }


def float_file(model: str, dataset: Dataset) -> bytes:
    """A network of a campaign as a float ONNX file, without a description."""
    return Source(network_from_file(model), form_of_file(model), dataset.image_shape).encode("onnx")


def judged(path: Path, dataset: Dataset) -> Record:
    """Bytes and accuracies of one file."""
    run = load_exported(path, "onnx")
    splits = zip(ACCURACIES, (dataset.validation, dataset.test), strict=True)
    return {"bytes": path.stat().st_size} | {key: accuracy(run, split, dataset) for key, split in splits}


def times(files: Mapping[str, Path], networks: Mapping[str, Record], dataset: Dataset, rounds: int) -> None:
    """Add `latency` and `ratio`, each by batch size, to every network."""
    calls = {name: load_exported(files[name], "onnx", threads=1) for name in NETWORKS}
    for batch in BATCHES:
        images = torch.randn(batch, *dataset.image_shape, generator=torch.Generator().manual_seed(batch))
        fed = dict.fromkeys(NETWORKS, images)
        seconds = seconds_by_round(calls, fed, repeats=rounds, budget_s=BUDGET_S)
        for name, facts in networks.items():
            facts.setdefault("latency", {})[str(batch)] = asdict(latency(seconds[name]))
            facts.setdefault("ratio", {})[str(batch)] = ratio(seconds["baseline"], seconds[name])


def ratio(baseline: Sequence[float], other: Sequence[float]) -> Record:
    """Median and quartiles over rounds of the baseline's time divided by the other's in the same round."""
    first, middle, third = np.quantile(np.array(baseline) / np.array(other), (0.25, 0.5, 0.75)).tolist()
    return {"median": middle, "quartile1": first, "quartile3": third}


def summary(campaigns: Sequence[Record]) -> dict[str, Record]:
    """Each network over all campaigns."""
    return {name: over([campaign["networks"] for campaign in campaigns], name) for name in NETWORKS}


def over(campaigns: Sequence[Mapping[str, Record]], name: str) -> Record:
    """One network over all campaigns: mean and sd of what is counted, median and range of what is timed."""
    rows = [networks[name] for networks in campaigns]
    found: Record = {"n": len(rows)} | {key: mean_sd([row[key] for row in rows]) for key in ("bytes", *ACCURACIES)}
    for batch in map(str, BATCHES):
        found[f"batch_{batch}_ms"] = ranged([row["latency"][batch]["median_ms"] for row in rows])
        found[f"batch_{batch}_ratio"] = ranged([row["ratio"][batch]["median"] for row in rows])
    return found


def mean_sd(values: Sequence[float]) -> Record:
    """Mean, and the sample's standard deviation where there are two at least."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def ranged(values: Sequence[float]) -> Record:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def page(table: Record) -> str:
    """The page."""
    campaigns, machine = table["campaigns"], table["machine"]
    counted = campaigns[0]["images"]
    known = ", ".join(f"{name} {table['versions'][name]}" for name in ("torch", "onnx", "onnxruntime", "python"))
    noted = 100 * max(campaign["largest_difference_to_campaign"] for campaign in campaigns)
    batches = [f"batch {batch}, ms | quicker" for batch in BATCHES]
    lines = [
        "# Pruned, quantized, both",
        "",
        f"`{table['command']}`",
        "",
        f"{table['network']} on {table['data']}, target {campaigns[0]['target']:g} of {table['measure']}; "
        f"{len(campaigns)} campaign(s), seed {', '.join(str(campaign['seed']) for campaign in campaigns)}; "
        f"{counted['validation']:,} validation and {counted['test']:,} test images.",
        "",
        f"{machine['processor']}, {machine['cores']} cores, load at the start {machine['load']:.1f}; one thread;",
        f"{known}.",
        "",
        "Accuracy in %: mean (standard deviation) over campaigns. Test, from: points, paired by campaign (in how many",
        "it is higher, p of a paired t test). Times: median of the campaigns' medians (lowest to highest); quicker:",
        "times the float baseline's speed, paired by round. Counted is what `python -m benchmarks.quantization --help`",
        "says.",
        "",
        "| network | n | validation | test | test, from baseline | test, from itself in float | bytes | "
        f"{' | '.join(batches)} |",
        "|---|---|---|---|---|---|---|" + "---|---|" * len(BATCHES),
        *(row(name, table) for name in NETWORKS),
        "",
        f"Largest difference between a float file's accuracy here and what its campaign has noted: {noted:.2f} points.",
        "",
        "## Each campaign",
        "",
        "Times: median (quartiles) over rounds.",
        "",
        f"| seed | network | validation | test | bytes | {' | '.join(batches)} | rounds |",
        "|---|---|---|---|---|" + "---|---|" * len(BATCHES) + "---|",
        *(line(campaign, name) for campaign in campaigns for name in NETWORKS),
        "",
    ]
    return "\n".join(lines)


def row(name: str, table: Record) -> str:
    """A line of the first table."""
    campaigns, facts = table["campaigns"], table["summary"][name]
    cells = [name, str(facts["n"]), *(spread(by_seed(campaigns, name, key)) for key in ACCURACIES)]
    for other in ("baseline", name.removesuffix(" int8")):
        change = difference(by_seed(campaigns, name, "test_accuracy"), by_seed(campaigns, other, "test_accuracy"))
        cells.append("" if name == other else str(change))
    cells.append(f"{facts['bytes']['mean']:,.0f}")
    for batch in BATCHES:
        for key in (f"batch_{batch}_ms", f"batch_{batch}_ratio"):
            known = facts[key]
            cells.append(f"{known['median']:.3g} ({known['lowest']:.3g} to {known['highest']:.3g})")
    return f"| {' | '.join(cells)} |"


def by_seed(campaigns: Sequence[Record], name: str, key: str) -> dict[int, float]:
    """An accuracy of one network in each campaign, in percent."""
    return {campaign["seed"]: 100 * campaign["networks"][name][key] for campaign in campaigns}


def line(campaign: Record, name: str) -> str:
    """A line of the second table."""
    facts = campaign["networks"][name]
    cells = [str(campaign["seed"]), name, *(f"{100 * facts[key]:.2f}" for key in ACCURACIES), f"{facts['bytes']:,}"]
    for batch in map(str, BATCHES):
        took, quicker = facts["latency"][batch], facts["ratio"][batch]
        cells.append(f"{took['median_ms']:.3g} ({took['quartile1_ms']:.3g} to {took['quartile3_ms']:.3g})")
        cells.append(f"{quicker['median']:.2f} ({quicker['quartile1']:.2f} to {quicker['quartile3']:.2f})")
    cells.append("/".join(dict.fromkeys(str(took["n"]) for took in facts["latency"].values())))
    return f"| {' | '.join(cells)} |"


def alike(folders: Sequence[CampaignFolder]) -> None:
    """See that a mean over these campaigns means something.

    Raises:
        UserError: one is not finished, two differ in more than their seeds, or do not even in those.

    """
    for folder in folders:
        points_of(folder)  # which says what is wrong with one that is not finished
    campaigns, _ = read_campaigns({str(folder.path): folder for folder in folders})
    first = identity(campaigns[0].settings)
    for campaign in campaigns:
        other = identity(campaign.settings)
        differing = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        if differing:
            key = differing[0]
            raise UserError(
                f"{campaign.folder}, {key}",
                expected=f"{first.get(key)!r}, as in {campaigns[0].folder}",
                got=repr(other.get(key)),
                remedy="give campaigns that differ in their seed alone; zeroout compare shows what differs",
            )
    seeds = [campaign.seed for campaign in campaigns]
    if len(set(seeds)) < len(folders):
        raise UserError(
            "--campaign",
            expected="campaigns of different seeds",
            got=f"{len(folders)} of seeds {seeds}",
            remedy="leave out what is there twice",
        )


def network_name(config: CampaignConfig) -> str:
    """The network in words."""
    return config.network.factory or f"{config.network.name} at width {config.network.width:g}"


def arguments() -> argparse.Namespace:
    """What was asked for; says what is wrong with it, and exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantization",
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--campaign", nargs="+", required=True, metavar="DIR", help="finished campaigns, one of a seed")
    parser.add_argument("--compression", type=float, help="the target that is compared (default: the highest)")
    parser.add_argument("--rounds", type=int, default=100, help="timed calls of each network (default 100)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where quantization.md and .json go")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {given.rounds}")
    if not given.out.is_dir():
        parser.error(f"--out must be a folder that is there, got {given.out}")
    return given


def main() -> None:
    """The command."""
    given = arguments()
    try:
        table = compared(given)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    text = page(table)
    print(text)
    write_atomic(given.out / "quantization.md", text)
    write_atomic(given.out / "quantization.json", json.dumps(table, indent=1) + "\n")


def compared(given: argparse.Namespace) -> Record:
    """All that the page says, for quantization.json."""
    torch.set_num_threads(1)
    folders = [CampaignFolder.open(path) for path in given.campaign]
    alike(folders)
    config = load(folders[0].campaign_toml)
    machine = {"processor": cpu_name(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    campaigns = []
    for folder in folders:
        print(folder.path, flush=True)
        campaigns.append(measured(folder, chosen(folder, given.compression), given.rounds))
    return {
        "command": " ".join(["python -m benchmarks.quantization", *sys.argv[1:]]),
        "machine": machine,
        "versions": versions() | {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime")},
        "network": network_name(config),
        "data": config.data.source,
        "measure": config.episode.measure,
        "threads": 1,
        "summary": summary(campaigns),
        "campaigns": campaigns,
    }


if __name__ == "__main__":
    main()
