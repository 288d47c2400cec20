"""Images a second of a whole training, on the device that is there: recorded, kernel by kernel, and as by the book.

`python -m benchmarks.training --help` says what is compared and how.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.campaigns import commit
from benchmarks.ledger import Row
from benchmarks.step import cpu_name, random_mask
from deploy.folder import versions, write_atomic
from env.augment import augment
from env.channels import ChannelPlan
from env.data import DataConfig, Dataset
from env.networks import resnet18, resnet34, vgg16
from env.retraining import evaluate
from env.splits import Split
from env.training import TrainConfig, train

RESULTS = Path(__file__).parent / "results"
NETWORKS = {"vgg16": vgg16, "resnet18": resnet18, "resnet34": resnet34}
WAYS = ("ours", "tuned", "eager", "book")
TRAIN, VALIDATION, SIDE = 47_500, 2_500, 32  # images of CIFAR-10, as campaigns split them
AUGMENT = DataConfig(flip=True, shift_pixels=4)

EPILOG = """\
The ways:
  ours    env.training.train: on a GPU recorded as a CUDA graph after three updates
  tuned   the same with cuDNN's own search for algorithms (torch.backends.cudnn.benchmark)
  eager   the same, kernel by kernel
  book    a plain loop in the same arithmetic, channels_last: images drawn and augmented on the device by the same
          function, SGD as torch makes it, zero_grad, backward, step; the loss read every 50 minibatches

The shapes: the whole network, one whose filters were taken out at random, and that one with each layer's filters
rounded up to a multiple of 8, which tensor cores like.

An epoch is 47,500 images in minibatches of --batch, and the judgement of 2,500. Two of --epochs + 2 are not timed.
Share of the peak: operations of forward and backward (6 a MAC) over what a product of two bfloat16 matrices of 8192
rows gives here in the same run.

examples:
  python -m benchmarks.training                        on a GPU, some minutes
  python -m benchmarks.training --networks vgg16 --ways ours eager
  python -m benchmarks.training --width 0.1 --images 640 --batch 32 --precision float32       a look, on a CPU
"""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is the same for all networks."""

    device: torch.device
    data: Dataset
    config: TrainConfig

    def finish(self) -> float:
        """The time when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def epoch_s(self, way: str, network: nn.Module) -> float:
        """Seconds of an epoch."""
        marks: list[float] = []
        run: Callable[..., object] = book if way == "book" else train
        tuned = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True)
        as_it_is = patch("env.training.captured", lambda update, network: update) if way == "eager" else nullcontext()
        with as_it_is, tuned if way == "tuned" else nullcontext():
            run(network, self.data, AUGMENT, self.config, seed=0, on_epoch=lambda _: marks.append(self.finish()))
        timed = [later - before for before, later in itertools.pairwise(marks[1:])]
        return sorted(timed)[len(timed) // 2]


def book(
    network: nn.Module,
    data: Dataset,
    augmentation: DataConfig,
    config: TrainConfig,
    *,
    seed: int,
    on_epoch: Callable[[object], object],
) -> None:
    """A training as one writes it down first."""
    device = data.train.images.device
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        network.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay,
        nesterov=True,
    )  # fmt: skip
    count = len(data.train) // config.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.epochs * count)
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(config.epochs):
        network.train()
        order = torch.randperm(len(data.train), generator=generator, device=device)
        for index in range(count):
            batch = data.train.take(order[index * config.batch_size : (index + 1) * config.batch_size])
            images = augment(
                batch.images, flip=augmentation.flip, shift_pixels=augmentation.shift_pixels, mean=data.mean,
                std=data.std, generator=generator,
            )  # fmt: skip
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss = F.cross_entropy(network(images.to(memory_format=torch.channels_last)), batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if index % 50 == 0:
                float(loss.detach())
        evaluate(network, data.validation, data.mean, data.std, precision=config.precision)
        on_epoch(None)


def kernels(bench: Bench, network: nn.Module) -> str:
    """What an update of `network` asks the device for: times, names and shares of its time, the longest first."""
    few = replace(bench.data, train=images(bench.config.batch_size * 20, bench.device))
    activities = [ProfilerActivity.CUDA if bench.device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as seen:
        train(network, few, AUGMENT, replace(bench.config, epochs=3), seed=0)
        bench.finish()
    return seen.key_averages().table(sort_by=f"self_{bench.device.type}_time_total", row_limit=30)


def images(count: int, device: torch.device) -> Split:
    """Noise in CIFAR-10's shape."""
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return Split(pixels.to(device), torch.randint(10, (count,), generator=generator).to(device))


def peak(device: torch.device) -> float:
    """Operations a second of a large product of bfloat16 matrices; median of 10."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        since = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - since)
    return float(2 * side**3 / sorted(seconds[3:])[5])


def shapes(network: nn.Module, compression: float, device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    """The network, and two of its compact forms."""
    plan = ChannelPlan(network, torch.zeros(1, 3, SIDE, SIDE, device=device))
    keep_mask = random_mask(plan, compression)
    yield "whole", plan.compact(network, torch.ones_like(keep_mask))
    yield f"{compression:.0%} removed", plan.compact(network, keep_mask)
    yield "and rounded to 8", plan.compact(network, rounded(plan, keep_mask))


def rounded(plan: ChannelPlan, keep_mask: Tensor) -> Tensor:
    """The mask with more filters kept, so that each layer's number is a multiple of 8 where it has as many."""
    wider = keep_mask.clone()
    for layer in plan.layers:
        own = wider[layer.first : layer.first + layer.units]
        gone = (~own).nonzero().flatten()
        own[gone[: -int(own.sum()) % 8]] = True
    return wider


def measured(
    bench: Bench, name: str, width: float, ways: Sequence[str], compression: float, most: float
) -> Iterator[Row]:
    """A row for each shape of a network."""
    torch.manual_seed(0)
    network = NETWORKS[name](width=width).to(bench.device)
    for shape, compact in shapes(network, compression, bench.device):
        plan = ChannelPlan(compact, torch.zeros(1, 3, SIDE, SIDE, device=bench.device))
        macs = plan.costs(plan.widths)["macs"]
        for way in ways:
            fresh = plan.compact(compact, torch.ones(plan.units, dtype=torch.bool))
            seconds = bench.epoch_s(way, fresh)
            speed = len(bench.data.train) / seconds
            row = {
                "network": name, "width": width, "shape": shape, "macs": macs, "way": way,
                "epoch_s": round(seconds, 4), "images_per_s": round(speed), "of_peak": 6 * macs * speed / most,
            }  # fmt: skip
            print(f"{name} {shape}, {way}: {speed:,.0f} images/s, {row['of_peak']:.1%} of the peak", flush=True)
            yield row


def page(facts: Row, rows: Sequence[Row]) -> str:
    """The table, in Markdown."""
    lines = [
        "# Images a second of a whole training",
        "",
        f"`{facts['command']}` (`--help` says what the ways and shapes are)",
        "",
        f"{facts['machine']}, torch {facts['torch']}, {facts['precision']}, batch {facts['batch']}; a matrix product "
        f"of the same run: {facts['peak'] / 1e12:.3g} TFLOP/s. Medians of {facts['epochs']} epochs, the "
        "judgement of 2,500 images included.",
        "",
        "| network | shape | million MACs | way | images/s | of the peak | times eager |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        beside = [r for r in rows if (r["network"], r["shape"], r["way"]) == (row["network"], row["shape"], "eager")]
        ratio = f"{beside[0]['epoch_s'] / row['epoch_s']:.2f}" if beside else "-"
        lines.append(
            f"| {row['network']} | {row['shape']} | {row['macs'] / 1e6:.1f} | {row['way']} "
            f"| {row['images_per_s']:,} | {row['of_peak']:.1%} | {ratio} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=(__doc__ or "").splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--width", type=float, default=1.0, help="of the network as published (default 1.0)")
    parser.add_argument("--compression", type=float, default=0.95, help="of the compact shape (default 0.95)")
    parser.add_argument("--batch", type=int, default=256, help="default 256")
    parser.add_argument("--images", type=int, default=TRAIN, help=f"of an epoch (default {TRAIN:,})")
    parser.add_argument("--epochs", type=int, default=3, help="timed (default 3)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="default bfloat16")
    parser.add_argument("--kernels", action="store_true", help="where the time goes instead; writes nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default benchmarks/results")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    validation = images(VALIDATION, device)
    data = Dataset(
        train=images(given.images, device), validation=validation, test=validation,
        classes=tuple("0123456789"), mean=(0.5,) * 3, std=(0.25,) * 3,
    )  # fmt: skip
    config = TrainConfig(epochs=given.epochs + 2, batch_size=given.batch, learning_rate=0.05, precision=given.precision)
    most = peak(device)
    bench = Bench(device=device, data=data, config=config)
    if given.kernels:
        for name in given.networks:
            for shape, network in shapes(NETWORKS[name](width=given.width).to(device), given.compression, device):
                print(f"{name} {shape}\n{kernels(bench, network)}", flush=True)
        return
    rows = [
        row
        for name in given.networks
        for row in measured(bench, name, given.width, given.ways, given.compression, most)
    ]
    facts = {
        "command": " ".join(["python -m benchmarks.training", *sys.argv[1:]]), "machine": machine,
        "torch": versions()["torch"], "commit": commit(), "peak": most, "epochs": given.epochs,
        "precision": given.precision, "batch": given.batch,
    }  # fmt: skip
    kept = given.results / f"training-{device.type}"
    given.results.mkdir(parents=True, exist_ok=True)
    write_atomic(kept.with_suffix(".json"), json.dumps({**facts, "rows": rows}, indent=1))
    write_atomic(kept.with_suffix(".md"), page(facts, rows))
    print(page(facts, rows))


if __name__ == "__main__":
    main()
