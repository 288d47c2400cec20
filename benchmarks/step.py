"""Step speed: what retraining and evaluation cost on a compact network, beside three other ways to the same function.

`python -m benchmarks.step --help` says what is compared and how.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from env.augment import normalise
from env.captured import captured
from env.channels import ChannelPlan
from env.cpu_layers import keep_freed_memory
from env.data import DataConfig, Dataset
from env.networks import resnet18, vgg16
from env.retraining import augmented, choices, evaluate, make_optimizer, retrain, seeded, update
from env.splits import Split
from env.zero_out import attach_zero_out

RESULTS = Path(__file__).parent / "results"
NETWORKS: dict[str, Callable[..., nn.Module]] = {"vgg16": vgg16, "resnet18": resnet18}
POINTS = (0.0, 0.5, 0.7, 0.9, 0.95)
BATCH, STEP_MINIBATCHES, JUDGED = 64, 20, 250
RATE, MOMENTUM, DECAY = 1e-4, 0.9, 5e-4  # the rate is low: labels are random, and no round may diverge
AUGMENT = DataConfig(flip=True, shift_pixels=4)
MIN_WIDTH = 2  # filters that every layer keeps, as in a campaign

EPILOG = """\
The ways, each on the same images with the same augmentation, each with its optimizer made anew every round:
  masked  the full network, masks behind every layer in training and evaluation (the source's way); our own step
  naive   the compact network as one would first write it: NCHW images, torch.optim.SGD, no tricks
  ours    the compact network by env/retraining.py: retrain() and evaluate() as a campaign calls them
  native  a network built anew from fresh layers of exactly those widths, by the same step as ours: the floor
  graph, compiled   (CUDA only) our update as one CUDA graph, and by torch.compile

Filters go by a random ranking over all layers (seed 0) until the compression is reached; 2 stay in every layer.
Rounds are interleaved, in turning order, so that whatever else runs on the machine meets all ways alike. A ratio is
the median over rounds of the other way's time divided by ours in the same round: above 1, ours is quicker. CPU
seconds stand beside wall seconds where cores are shared. Not timed: imports, the first round (warm-up), reading data.
All ways run in one process, whose freed memory is kept (env/cpu_layers.py): the others profit from that too.

examples:
  python -m benchmarks.step                          both networks, one thread, as an actor runs them
  python -m benchmarks.step --network vgg16 --quick  a look, in a minute; writes nothing
  python -m benchmarks.step --threads 2 --rounds 40
"""


@dataclass
class Way:
    """One way to retrain and judge."""

    train: Callable[[int], object]  # takes a seed
    judge: Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one number."""
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        return cls(middle, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass
class Bench:
    """What all measurements of a run share."""

    device: torch.device
    precision: str
    minibatches: int  # in a round
    rounds: int
    data: Dataset

    def now(self) -> tuple[float, float]:
        """Wall and CPU seconds, the device idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def random_data(device: torch.device) -> Dataset:
    """Random 32x32 images: their content does not matter to speed."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return Split(images, torch.randint(10, (count,), generator=generator))

    classes = tuple(str(index) for index in range(10))
    third = (0.5, 0.5, 0.5)
    return Dataset(
        train=split(2048), validation=split(JUDGED), test=split(1), classes=classes, mean=third, std=third
    ).to(device)


def random_mask(plan: ChannelPlan, compression: float) -> Tensor:
    """Keep mask bool [F]: the shortest prefix of a random ranking whose removal reaches `compression`."""
    ranking = torch.rand(plan.units, generator=torch.Generator().manual_seed(0))
    for layer in plan.layers:
        mine = ranking[layer.first : layer.first + layer.units]
        mine[mine.argsort(descending=True)[:MIN_WIDTH]] = 2.0
    order, full = ranking.argsort(), int(plan.parameters(plan.widths))

    def without(count: int) -> Tensor:
        return torch.ones(plan.units, dtype=torch.bool).index_fill(0, order[:count], False)

    low, high = 0, int((ranking < 2).sum())
    while low < high:
        middle = (low + high) // 2
        if 1 - int(plan.parameters(plan.kept_per_layer(without(middle)))) / full >= compression:
            high = middle
        else:
            low = middle + 1
    return without(high)


def native_copy(compact: nn.Module) -> nn.Module:
    """The same structure with fresh layers of the same sizes."""
    network = copy.deepcopy(compact)
    for path, module in list(network.named_modules()):
        fresh: nn.Module
        if isinstance(module, nn.Conv2d):
            size, stride, padding = module.kernel_size[0], module.stride[0], int(module.padding[0])
            bias = module.bias is not None
            fresh = nn.Conv2d(module.in_channels, module.out_channels, size, stride, padding, bias=bias)
        elif isinstance(module, nn.BatchNorm2d):
            fresh = nn.BatchNorm2d(module.num_features)
        elif isinstance(module, nn.Linear):
            fresh = nn.Linear(module.in_features, module.out_features)
        else:
            continue
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, fresh.to(next(compact.parameters()).device))
    return network


def our_way(bench: Bench, network: nn.Module) -> Way:
    """The product's own functions."""
    data = bench.data

    def train(seed: int) -> float:
        return retrain(
            network, data, AUGMENT, minibatches=bench.minibatches, batch_size=BATCH, learning_rate=RATE,
            momentum=MOMENTUM, weight_decay=DECAY, precision=bench.precision, seed=seed,
        )  # fmt: skip

    return Way(train, lambda: evaluate(network, data.validation, data.mean, data.std, precision=bench.precision))


def naive_way(bench: Bench, network: nn.Module) -> Way:
    """What one would write first."""
    data = bench.data
    arithmetic = torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.precision == "bfloat16")

    def train(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
        network.train()
        for chosen in choices(len(data.train), BATCH, bench.minibatches, generator, bench.device):
            batch = data.train.take(chosen)
            images = augmented(batch, data, AUGMENT, generator)
            optimizer.zero_grad()
            with arithmetic:
                loss = F.cross_entropy(network(images), batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def judge() -> float:
        network.eval()
        with torch.no_grad(), arithmetic:
            logits = network(normalise(data.validation.images, data.mean, data.std))
            return float((logits.argmax(1) == data.validation.labels).sum())

    return Way(train, judge)


def graph_way(bench: Bench, network: nn.Module) -> Way:
    """Our update recorded as a CUDA graph; recording is paid for when the way is made."""
    data = bench.data
    network.train()
    optimizer = make_optimizer(network, RATE, momentum=MOMENTUM, weight_decay=DECAY)

    def once(images: Tensor, labels: Tensor) -> Tensor:
        return update(network, optimizer, images, partial(F.cross_entropy, target=labels), precision=bench.precision)

    play = captured(once, network)

    def train(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with seeded(bench.device, seed):
            for chosen in choices(len(data.train), BATCH, bench.minibatches, generator, bench.device):
                batch = data.train.take(chosen)
                play(augmented(batch, data, AUGMENT, generator), batch.labels)

    for seed in range(4):  # of at least one minibatch each
        train(seed)
    return Way(train, our_way(bench, network).judge)


def ways(bench: Bench, network: nn.Module, plan: ChannelPlan, keep_mask: Tensor) -> dict[str, Way]:
    """All ways for one mask, by name."""
    masked = copy.deepcopy(network)
    attach_zero_out(masked, plan, keep_mask)
    compact = plan.compact(network, keep_mask)
    made = {
        "masked": our_way(bench, masked),
        "naive": naive_way(bench, copy.deepcopy(compact)),
        "native": our_way(bench, native_copy(compact)),
        "ours": our_way(bench, compact),
    }
    if bench.device.type == "cuda":
        made["graph"] = graph_way(bench, copy.deepcopy(compact))
        torch._dynamo.reset()
        made["compiled"] = our_way(bench, torch.compile(copy.deepcopy(compact)))  # type: ignore[arg-type]
    return made


def timed(bench: Bench, made: Mapping[str, Way]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{"train" or "judge": {way: [(wall, CPU) seconds of each round]}}; the first round is thrown away."""
    times: dict[str, dict[str, list[tuple[float, float]]]] = {
        what: {name: [] for name in made} for what in ("train", "judge")
    }
    names = list(made)
    for turn in range(bench.rounds + 1):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for what in times:
            for name in order:
                wall, cpu = bench.now()
                made[name].train(turn) if what == "train" else made[name].judge()
                ended_wall, ended_cpu = bench.now()
                if turn:
                    times[what][name].append((ended_wall - wall, ended_cpu - cpu))
    return times


def ratio(times: Mapping[str, list[tuple[float, float]]], other: str, clock: int) -> Spread:
    """How many times as quick as `other` ours is, paired by round; clock 0 is wall, 1 is CPU."""
    return Spread.of([a[clock] / b[clock] for a, b in zip(times[other], times["ours"], strict=True)])


def compacting(bench: Bench, network: nn.Module, plan: ChannelPlan, keep_mask: Tensor) -> tuple[float, float]:
    """Median (wall, CPU) seconds from a mask to a network and optimizer ready to train."""
    seconds = []
    for _ in range(bench.rounds + 1):
        wall, cpu = bench.now()
        make_optimizer(plan.compact(network, keep_mask).train(), RATE, momentum=MOMENTUM, weight_decay=DECAY)
        ended_wall, ended_cpu = bench.now()
        seconds.append((ended_wall - wall, ended_cpu - cpu))
    return statistics.median(s[0] for s in seconds[1:]), statistics.median(s[1] for s in seconds[1:])


def measured(bench: Bench, name: str, width: float, points: Sequence[float]) -> list[dict[str, object]]:
    """One row for each compression."""
    torch.manual_seed(0)
    network = NETWORKS[name](width=width).to(bench.device)
    plan = ChannelPlan(network, torch.zeros(1, 3, 32, 32, device=bench.device))
    rows: list[dict[str, object]] = []
    for point in points:
        keep_mask = random_mask(plan, point)
        kept = plan.kept_per_layer(keep_mask)
        times = timed(bench, ways(bench, network, plan, keep_mask))
        step = [statistics.median(t[clock] for t in times["train"]["ours"]) / bench.minibatches for clock in (0, 1)]
        compact_s = compacting(bench, network, plan, keep_mask)
        others = [other for other in times["train"] if other != "ours"]
        work = {"train": bench.minibatches * BATCH, "judge": JUDGED}
        rows.append(
            {
                "network": name,
                "compression": 1 - int(plan.parameters(kept)) / int(plan.parameters(plan.widths)),
                "point": point,
                "widths": kept.tolist(),
                "megamacs": int(plan.macs(kept)) / 1e6,
                # forward, gradient of the images, gradient of the weights: 2 operations for each MAC
                "gflop_per_cpu_s": 6 * BATCH * int(plan.macs(kept)) / step[1] / 1e9,
                "images_per_s": {
                    what: {way: work[what] / statistics.median(t[0] for t in ts) for way, ts in by_way.items()}
                    for what, by_way in times.items()
                },
                "ratios": {
                    what: {
                        way: {clock: asdict(ratio(by_way, way, index)) for index, clock in enumerate(("wall", "cpu"))}
                        for way in others
                    }
                    for what, by_way in times.items()
                },
                "compact_ms": compact_s[0] * 1e3,
                "compact_share": compact_s[1] / (STEP_MINIBATCHES * step[1]),
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


def spread(row: Mapping[str, object], what: str, way: str, clock: str = "wall") -> Spread:
    """A stored ratio."""
    return Spread(**row["ratios"][what][way][clock])  # type: ignore[index]


def line(row: Mapping[str, object]) -> str:
    """The row as a line of the first table."""
    speed: Mapping[str, Mapping[str, float]] = row["images_per_s"]  # type: ignore[assignment]
    cells = [f"{row['network']}", f"{row['compression']:.1%}", f"{row['megamacs']:.2f}"]
    cells += [" / ".join(f"{speed[what][way]:.0f}" for what in ("train", "judge")) for way in speed["train"]]
    cells += [str(spread(row, "train", way)) for way in ("masked", "naive", "native")]
    cells += [f"{row['compact_ms']:.0f} ms, {row['compact_share']:.1%}"]
    return "| " + " | ".join(cells) + " |"


def judged(rows: Sequence[Mapping[str, object]], clock: str, device: str) -> list[str]:
    """Each aim, and where it is missed."""
    aims: list[tuple[str, list[str]]] = []
    for what in ("train", "judge"):
        for title, others, least in (
            ("at least as quick as the quicker of masked and naive", ("masked", "naive"), 1.0),
            ("at least 0.9 x native", ("native",), 0.9),
        ):
            slow = [
                f"{row['network']} {row['point']:.0%}: {spread(row, what, way, clock)} of {way}"
                for row in rows
                for way in others
                if spread(row, what, way, clock).median < least
            ]
            aims.append((f"{what}: {title}", slow))
    dear = [
        f"{r['network']} {r['point']:.0%}: {r['compact_share']:.1%}"
        for r in rows
        if float(str(r["compact_share"])) >= 0.05
    ]
    aims.append((f"compacting below 5 % of {STEP_MINIBATCHES} minibatches", dear))
    if device == "cuda":
        slow = [
            f"{row['network']}: {spread(row, 'train', 'masked', clock)}"
            for row in rows
            if row["point"] == 0.9 and spread(row, "train", "masked", clock).median < 3
        ]
        aims.append(("train: at least 3 x masked at 90 %", slow))
    return [f"- {title}: " + (f"**missed** at {'; '.join(missed)}" if missed else "reached") for title, missed in aims]


def matmul_gflops(bench: Bench) -> float:
    """Operations per second of a large float32 matrix product, the most this machine gives: the floor's measure."""
    one, other = torch.randn(2, 1024, 1024, device=bench.device)
    best = 0.0
    for _ in range(10):
        wall, cpu = bench.now()
        one @ other
        ended_wall, ended_cpu = bench.now()
        spent = ended_cpu - cpu if bench.device.type == "cpu" else ended_wall - wall
        best = max(best, 2 * 1024**3 / spent / 1e9)
    return best


def report(rows: Sequence[Mapping[str, object]], about: Mapping[str, object], command: str) -> str:
    """The Markdown page."""
    names = list(rows[0]["images_per_s"]["train"])  # type: ignore[index]
    head = ["network", "compression", "MMAC", *(f"{n}, images/s" for n in names)]
    head += ["ours : masked", "ours : naive", "ours : native", "compacting"]
    lines = [
        "# Step speed",
        "",
        f"`{command}`",
        "",
        "; ".join(f"{key} {value}" for key, value in about.items()),
        "",
        "Images/s are retraining / evaluation (medians). Ratios are of retraining, wall time, paired by round: median",
        "(quartiles); above 1 ours is quicker. Compacting: mask to optimizer, and its share of a step of",
        f"{STEP_MINIBATCHES} minibatches of {BATCH}. What the ways are: `python -m benchmarks.step --help`.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *map(line, rows),
        "",
        "## The same by CPU seconds, and evaluation",
        "",
        "| network | compression | train : masked | : naive | : native | evaluation : masked | : naive | : native "
        "| GFLOP/CPU s, retraining |",
        "|" + "---|" * 9,
        *(
            f"| {row['network']} | {row['compression']:.1%} | "
            + " | ".join(
                str(spread(row, w, o, "cpu")) for w in ("train", "judge") for o in ("masked", "naive", "native")
            )
            + f" | {row['gflop_per_cpu_s']:.0f} |"
            for row in rows
        ),
        "",
    ]
    for clock in ("wall", "cpu"):
        lines += [f"## Aims, by {clock} time", "", *judged(rows, clock, str(about["device"])), ""]
    return "\n".join(lines)


def cpu_name() -> str:
    """The processor's own name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = (
        [s.partition(":")[2].strip() for s in info.read_text().splitlines() if s.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--network", choices=NETWORKS, help="only this one (default: both)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1, as an actor has)")
    parser.add_argument("--rounds", type=int, default=24, help="n of every median (default 24)")
    parser.add_argument("--minibatches", type=int, default=3, help="of 64, in a round (default 3)")
    parser.add_argument("--quick", action="store_true", help="3 rounds at 0 and 90 %%; writes nothing")
    given = parser.parse_args()
    if min(given.threads, given.rounds, given.minibatches) < 1:
        parser.error("--threads, --rounds and --minibatches are at least 1")
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    bench = Bench(
        device=device, precision="bfloat16" if gpu else "float32", minibatches=given.minibatches,
        rounds=3 if given.quick else given.rounds, data=random_data(device),
    )  # fmt: skip
    keep_freed_memory()  # for all ways alike, from the first round on
    names = [given.network] if given.network else list(NETWORKS)
    about = {
        "device": device.type, "machine": torch.cuda.get_device_name() if gpu else cpu_name(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
        "threads": given.threads, "load at the start": round(os.getloadavg()[0], 1), "torch": torch.__version__,
        "Python": platform.python_version(), "precision": bench.precision, "width": 1.0 if gpu else 0.25,
        "n": bench.rounds, "minibatches a round": bench.minibatches,
        "float32 matrix product GFLOP/s": round(matmul_gflops(bench)),
    }  # fmt: skip
    rows = [
        row
        for name in names
        for row in measured(bench, name, 1.0 if gpu else 0.25, (0.0, 0.9) if given.quick else POINTS)
    ]
    command = (
        f"python -m benchmarks.step --threads {given.threads} --rounds {bench.rounds} --minibatches {bench.minibatches}"
    )
    page = report(rows, about, command + (f" --network {given.network}" if given.network else ""))
    print(page)
    if not given.quick:
        suffix = "" if not given.network else f"-{given.network}"
        suffix += "" if given.threads == 1 else f"-{given.threads}-threads"
        base = RESULTS / f"step-{device.type}{suffix}"
        base.with_suffix(".md").write_text(page)
        base.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
