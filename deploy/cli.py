"""The command line: run | prune | transfer | teach | resume | status | replay-info | report | compare | export |
doctor.

Exit codes: 0 done, 2 the user's mistake (one clear line), 1 ours, 130 interrupted (state saved).
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from deploy.folder import CampaignFolder, copy_of
from deploy.process_list import REDIS_VARIABLE, hide_password
from deploy.storage_hold import refuse_held
from env.errors import UserError, ZerooutError

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compress a trained convolutional network by removing whole filters, chosen by a recurrent Q-learner.",
)
_INTERRUPTED = 130  # as a shell says it: 128 + SIGINT
_PLAIN_WIDTH = 120  # characters, where the output is not a terminal
_LOOK_S, _URI_LOOK_S = 2.0, 10.0  # between two looks of `status --watch`: at a URI nothing changes more often
_CAMPAIGNS = Path(__file__).parent / "campaigns"
_DEFAULT_CONFIG, _IMAGES_CONFIG = _CAMPAIGNS / "digits.toml", _CAMPAIGNS / "images.toml"
_FIRST_GUESSES = (0.5, 0.75, 0.9, 0.95)  # of `prune --max-drop`
_RULE = "taylor"  # of `prune` and `transfer`
_TRANSFER_RATE = 0.02  # a fifth of that from scratch: what was learned elsewhere is to be kept

ConfigArgument = Annotated[
    Path | None, typer.Argument(metavar="[CONFIG.toml]", help="The campaign; left out, a demonstration on digits.")
]
FolderArgument = Annotated[str, typer.Argument(metavar="DIR", help="A campaign's folder, or its URI.")]
OutOption = Annotated[
    str,
    typer.Option(
        "--out",
        metavar="DIR",
        help="The campaign's folder, or a URI to keep it at (s3://BUCKET/NAME); the same campaign there is resumed.",
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one value of the configuration.")
]
RedisOption = Annotated[
    str,
    typer.Option(
        "--redis",
        envvar=REDIS_VARIABLE,
        show_envvar=True,
        help="redis:// or rediss:// URL of a server that all hosts reach; left out, the campaign starts its own.",
    ),
]
RayOption = Annotated[
    str | None, typer.Option("--ray-address", help="A running Ray cluster; left out, a local Ray is started.")
]
ModelOption = Annotated[
    str, typer.Option("--model", help="vgg16, resnet18, resnet34, resnet56, small, or package.module:factory of yours.")
]
WeightsOption = Annotated[
    Path | None,
    typer.Option("--weights", help="Its trained state dict (.safetensors, or by torch.save); left out, it is trained."),
]
DataOption = Annotated[
    str, typer.Option("--data", help="digits, cifar10, or a folder of images with one folder for each class.")
]
ControllerOption = Annotated[
    Path | None,
    typer.Option(
        "--controller",
        help="controller.safetensors of an earlier campaign's folder, also of another network: what its Controller has "
        "learned is where this one starts. Left out: on VGG16 and ResNet18 what comes with Zeroout, else nothing.",
    ),
]
ControlsOption = Annotated[
    bool,
    typer.Option(
        "--controls",
        help="Also play random search, Taylor, gamma, balanced L1, the cross-entropy method and the Controller as it "
        "began, its learner off, each with as many episodes; ask Torch-Pruning for its best of five criteria; train a "
        "network from scratch whose widths are all smaller alike. All are recovered alike: some ten times the work.",
    ),
]

MethodOption = Annotated[
    str | None,
    typer.Option(
        help="Who ranks the filters: balanced-l1, balanced, taylor, gamma, hrank, fpgm, l2, uniform-l1 or random; "
        "taylor where nothing says otherwise."
    ),
]
AllocationOption = Annotated[
    str | None,
    typer.Option(
        help="How a method's scores divide what goes between the layers: global (the lowest anywhere), uniform "
        "(equal shares) or balanced (least harm by narrowness); left out, what is usual with the method."
    ),
]
LikeOption = Annotated[
    Path | None,
    typer.Option(
        "--like",
        metavar="FILE",
        help="Instead of an allocation: the .safetensors of a network that was pruned before, as wide as whose layers "
        "these end, or in proportion; without --compression, where that one did.",
    ),
]
CompressionOption = Annotated[
    list[float] | None, typer.Option(help="Share to remove, e.g. 0.9; may be given several times.")
]
MeasureOption = Annotated[str, typer.Option(help="What it is a share of: parameters, macs or bytes.")]
MaxDropOption = Annotated[
    float | None, typer.Option(help="Instead of a share: points of validation accuracy that may be lost, e.g. 1.0.")
]
StepsOption = Annotated[int, typer.Option(help="Prune so many times, retraining a little after each.")]


@app.command()
def run(
    out: OutOption,
    config: ConfigArgument = None,
    model: ModelOption = "",
    weights: WeightsOption = None,
    data: DataOption = "",
    overrides: SetOption = None,
    redis: RedisOption = "",
    ray_address: RayOption = None,
    controller: ControllerOption = None,
    controls: ControlsOption = False,
) -> None:
    """Run a campaign: prepare, search, recover, export, report.

    Examples: `zeroout run --out runs/demo` compresses a small network on embedded digits;
    `zeroout run --model package.module:factory --weights weights.pt --data FOLDER --out runs/mine` your own.
    """
    from deploy.config import load

    extra = _what(model, weights, data)
    if controller is not None:
        extra.append(f"controller.weights={json.dumps(str(controller.absolute()))}")
    if controls:
        extra.append('search.controls=["random", "taylor", "gamma", "balanced-l1", "cem", "untrained"]')
        extra.append('peers=["torch-pruning", "uniform"]')
    if ray_address:
        extra.append(f"cluster.ray_address={json.dumps(ray_address)}")
    asked = load(config or _default_config(data), [*extra, *(overrides or [])])
    _campaign(out, lambda _path, _progress: asked, redis)


@app.command()
def prune(
    out: OutOption,
    config: ConfigArgument = None,
    model: ModelOption = "",
    weights: WeightsOption = None,
    data: DataOption = "",
    method: MethodOption = None,
    allocation: AllocationOption = None,
    like: LikeOption = None,
    replace: Annotated[
        str | None,
        typer.Option(
            help="Before pruning, treat the weakest filters of each layer and train on: 1 (copies of the strongest, "
            "once each), 2 (copies of the single strongest), 3 (copies in proportion to their importance above those "
            "that go); or, to compare, reinit, noise or none (that training alone)."
        ),
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Of each layer's filters, for --replace; 0.1 where nothing says otherwise.")
    ] = None,
    compression: CompressionOption = None,
    measure: MeasureOption = "parameters",
    max_drop: MaxDropOption = None,
    steps: StepsOption = 10,
    overrides: SetOption = None,
) -> None:
    """Prune by one rule, without learning: in this process, in minutes, with the same folder and files as `run`.

    Examples: `zeroout prune --model resnet18 --weights weights.pt --data FOLDER --compression 0.9 --out runs/pruned`;
    `zeroout prune --max-drop 1.0 --out runs/small` finds the smallest network that loses at most one point;
    `zeroout prune --method hrank --replace 1 --steps 1 --out runs/replaced` copies filters before it prunes.
    """
    from deploy.config import load

    extra = [
        *_what(model, weights, data),
        *_given({"replacement.how": replace, "replacement.share": share}),
        *_by_rule(config, method, allocation, like, compression, measure, max_drop, steps),
    ]
    asked = _ruled(load(config or _default_config(data), [*extra, *(overrides or [])]))
    if share is not None and not asked.replacement.how:
        raise UserError("--share", expected="--replace beside it", got="none", remedy="say what is to be replaced")
    _campaign(out, lambda _path, _progress: asked, "")


@app.command()
def transfer(
    out: OutOption,
    config: ConfigArgument = None,
    model: ModelOption = "",
    weights: Annotated[
        Path | None,
        typer.Option("--weights", help="Its state dict as trained for other classes (.safetensors, or by torch.save)."),
    ] = None,
    from_classes: Annotated[int | None, typer.Option(help="How many classes these weights were trained for.")] = None,
    data: DataOption = "",
    classes: Annotated[
        str, typer.Option(help="The new classes: names in --data, separated by commas; left out, all of them.")
    ] = "",
    images_per_class: Annotated[
        int | None,
        typer.Option(
            min=1, help="Train on exactly so many images of each class; validation and test keep all of theirs."
        ),
    ] = None,
    treat: Annotated[
        str | None,
        typer.Option(
            help="What becomes of the weakest filters of each layer before the training: none, 1 (copies of the "
            "strongest, once each), 2 (copies of the single strongest), 3 (copies in proportion to importance), prune "
            "(gone for good), reinit (fresh weights) or noise; none where nothing says otherwise."
        ),
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Of each layer's filters, for --treat; 0.1 where nothing says otherwise.")
    ] = None,
    method: MethodOption = None,
    allocation: AllocationOption = None,
    like: LikeOption = None,
    compression: CompressionOption = None,
    measure: MeasureOption = "parameters",
    max_drop: MaxDropOption = None,
    steps: StepsOption = 10,
    overrides: SetOption = None,
) -> None:
    """Move a trained network to other classes, with few images of each, then prune it by one rule as `prune` does.

    The weights come along, all but the last layer, which is made anew for the new classes. The weakest filters, by what
    they do on the new images, are treated as --treat says; the network is trained on (section baseline of CONFIG),
    and that is the baseline which is pruned and recovered. Folder and files are the same as of `run` and `prune`.

    Example: `zeroout transfer --model resnet18 --weights imagenette.pt --from-classes 10 --data FOLDER --classes
    cat,dog,fox --images-per-class 20 --treat 1 --compression 0.9 --out runs/animals`.

    Without a CONFIG the trainings are fitted to few images: the batch size is at most the largest power of two that
    leaves four minibatches in an epoch (8 for 50 images), epochs are added until there are 300 updates (150 in the
    recovery), and the learning rate is 0.02. With a CONFIG, or --set, they are what you say.
    """
    from deploy.config import load

    extra = _what(model, weights, data)
    extra += _given(
        {
            "transfer.classes": from_classes,
            "transfer.how": treat,
            "transfer.share": share,
            "data.classes": classes or None,
            "data.train_per_class": images_per_class,
        }
    )
    extra += _by_rule(config, method, allocation, like, compression, measure, max_drop, steps)
    if config is None:
        extra += [f"{section}.learning_rate={_TRANSFER_RATE}" for section in ("baseline", "recovery")]
    asked = _ruled(load(config or _default_config(data), [*extra, *(overrides or [])]))
    _require_source(asked)
    if share is not None and treat is None and asked.transfer.how == "none":
        raise UserError("--share", expected="--treat beside it", got="none", remedy="say what becomes of the filters")

    def fitted(_path: Path, progress: Any) -> Any:
        from deploy.transfer import for_few_images
        from env.data import load_dataset

        if config is not None:
            return asked
        images = len(load_dataset(asked.data, progress=partial(progress.share, "images")).train)
        return _ruled(load(_default_config(data), [*extra, *for_few_images(asked, images), *(overrides or [])]))

    _campaign(out, fitted, "")


def _require_source(config: Any) -> None:
    """UserError where a transfer does not say what comes from where."""
    for option, given, expected in (
        ("--weights", config.network.weights, "the state dict of the network that moves to the new classes"),
        ("--from-classes", config.transfer.classes, "how many classes the network was trained for"),
    ):
        if not given:
            raise UserError(option, expected=expected, got="nothing", remedy="zeroout transfer --help has an example")


def _given(values: Mapping[str, Any]) -> list[str]:
    """Overrides for the options that were given; None is for one that was not, so that the file's value stays."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]


def _rule(config: Path | None, method: str | None) -> list[str]:
    """Overrides for the rule that decides: the option's, else the file's, else the usual one.

    Of a file whose Controller decides, nobody that would be compared with it stays.
    """
    from deploy.config import load

    if config is not None and load(config).search.alone:
        return _given({"search.method": method})
    return [f'search.method="{method or _RULE}"', "search.controls=[]", "peers=[]"]


def _ruled(config: Any) -> Any:
    """The same configuration; UserError where --set lets the Controller decide."""
    if not config.search.alone:
        raise UserError(
            "search.method", expected="a rule", got="'controller'", remedy="leave it out; the Controller is zeroout run"
        )
    return config


def _by_rule(
    config: Path | None,
    method: str | None,
    allocation: str | None,
    like: Path | None,
    compression: list[float] | None,
    measure: str,
    max_drop: float | None,
    steps: int,
) -> list[str]:
    """Overrides for one episode of one rule, from the options of the same names."""
    targets = sorted(compression or (_as_in(like, measure) if max_drop is None else _FIRST_GUESSES))
    for target in targets:
        if not 0.0 < target < 1.0:
            option = "--compression" if compression or like is None else f"what is removed in --like {like}"
            raise UserError(option, expected="a share inside (0, 1)", got=str(target), remedy="give e.g. 0.9")
    if steps < 1:
        raise UserError("--steps", expected="at least 1", got=str(steps), remedy="leave it out, or give e.g. 10")
    return [
        *_rule(config, method),
        *_given({"search.allocation": allocation, "search.like": str(like.absolute()) if like else None}),
        "search.episodes=1",
        f"episode.targets={json.dumps(targets)}",
        f"episode.measure={json.dumps(measure)}",
        f"episode.waypoints={max(steps, len(targets))}",
        f"max_drop={-1.0 if max_drop is None else max_drop}",
    ]


def _as_in(like: Path | None, measure: str) -> tuple[float, ...]:
    """The target where none is given: how far the network went that this one is to be like."""
    if like is None:
        return (0.9,)
    from deploy.like import removed_in

    return (removed_in(str(like), measure),)


def _what(model: str, weights: Path | None, data: str) -> list[str]:
    """The network and the images of the command line as overrides; paths are made absolute, for resume."""
    extra = []
    if model:
        extra.append(f"network.{'factory' if ':' in model else 'name'}={json.dumps(model)}")
    if weights is not None:
        extra.append(f"network.weights={json.dumps(str(weights.absolute()))}")
    if data in ("digits", "cifar10"):
        extra.append(f"data.source={json.dumps(data)}")
        if data == "cifar10":
            extra.append('data.path=""')
    elif data:
        extra += ['data.source="folder"', f"data.path={json.dumps(str(Path(data).expanduser().absolute()))}"]
    return extra


def _default_config(data: str) -> Path:
    return _DEFAULT_CONFIG if data in ("", "digits") else _IMAGES_CONFIG


@app.command()
def resume(
    folder: FolderArgument,
    redis: RedisOption = "",
    refill_replay: Annotated[
        bool,
        typer.Option(
            "--refill-replay",
            help="Go on although Redis has lost what earlier episodes had stored: those that are left fill the replay.",
        ),
    ] = False,
) -> None:
    """Go on with a campaign after anything at all has died; of a finished one only exports and report are made anew."""
    from deploy.config import load

    def resumed(path: Path, _progress: Any) -> Any:
        return load(CampaignFolder.open(path).campaign_toml)

    _campaign(folder, resumed, redis, existing=True, refill_replay=refill_replay)


@app.command()
def teach(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Campaigns of any networks, finished or not.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the Controller is written (safetensors).")],
    redis: RedisOption = "",
    sets: SetOption = None,
) -> None:
    """Learn one Controller from what several campaigns have played; `run --controller FILE` begins with it.

    It learns from nothing, by the first campaign's settings; how long, replay.replay_ratio says. The campaigns may be
    of different networks, but for a Controller with controller.observation = "mask".
    """
    from deploy.teach import teach as learn

    campaigns = [_opened(folder) for folder in folders]
    taught = learn(campaigns, out, overrides=sets or (), redis_url=redis, say=typer.echo)
    typer.echo(f"{out}: learned from {taught.sequences} sequences in {taught.updates} updates")


@app.command()
def status(
    folder: FolderArgument,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on while it runs; with --json, a line whenever there is news.")
    ] = False,
) -> None:
    """Show how far a campaign is: actors, throughput, learner, replay, frontier, time left, result."""
    from deploy.config import load
    from deploy.status import read_status, render_status, watch_json
    from deploy.status import watch as watch_status

    where = copy_of(folder)
    look, interval_s = _looker(where), _URI_LOOK_S if "://" in where else _LOOK_S
    campaign = look()
    total = load(campaign.campaign_toml).search.total
    if as_json and watch:
        for line in watch_json(look, interval_s, episodes_total=total):
            typer.echo(line)
    elif as_json:
        typer.echo(json.dumps(read_status(campaign, episodes_total=total)))
    elif watch:
        watch_status(look, Console(), interval_s, episodes_total=total)
    else:
        render_status(read_status(campaign, episodes_total=total), Console())


@app.command("replay-info")
def replay_info(
    folder: FolderArgument,
    redis: RedisOption = "",
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until it is interrupted.")] = False,
) -> None:
    """Show a running campaign's replay: size, rates, ages, priorities, who waits for whom."""
    from deploy.replay_info import read_replay_info, render_replay_info, watch_replay_info

    campaign = _opened(folder)
    if as_json:
        typer.echo(json.dumps(read_replay_info(campaign, redis)))
    elif watch:
        watch_replay_info(campaign, Console(), redis)
    else:
        render_replay_info(read_replay_info(campaign, redis), Console())


@app.command()
def report(folder: FolderArgument) -> None:
    """Write report.html and frontier.png anew, also of an unfinished campaign."""
    from deploy.report import write_report

    typer.echo(write_report(_opened(folder)))


@app.command()
def compare(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", help="Folders of finished campaigns (of run or prune), or their URIs."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.html", help="Also write table and picture as one page.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE.png", help="Also write the picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Put finished campaigns beside each other, sum up those that differ in the seed, and say what does not compare.

    Example: `zeroout compare runs/* --out comparison.html`.
    """
    from deploy.compare_page import check_file, write_page, write_picture
    from deploy.compare_table import compared, render
    from deploy.finished import read_campaigns

    check_file("--out", out, ".html")
    check_file("--png", png, ".png")
    comparison = compared(*read_campaigns({folder: _opened(folder) for folder in folders}))
    if as_json:
        typer.echo(json.dumps(comparison.as_json()))
    else:
        render(comparison, Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH))
    for path, write in ((out, write_page), (png, write_picture)):
        if path is not None:
            write(path, comparison)
            typer.echo(path, err=as_json)


@app.command()
def export(
    folder: FolderArgument,
    compression: Annotated[float | None, typer.Option(help="Only this target; all by default.")] = None,
    file_format: Annotated[
        str | None, typer.Option("--format", help="safetensors, onnx or pt2 (torch.export); all by default.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=0, help="Timed calls of each network at each batch size; 0 measures nothing.")
    ] = 50,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Also as TARGET.int8.onnx, and the original as baseline.int8.onnx: quantized after training, without "
            "retraining. Needs the campaign's images: 512 of its training images say which values occur, and each file "
            "is judged on validation and test beside its float network. ONNX is then among the formats.",
        ),
    ] = False,
) -> None:
    """Write a finished campaign's networks as files, each read back and compared with the network it came from.

    Prints the files, and a table of their sizes and latencies beside the original's (also in export/table.json).

    Example: `zeroout export runs/demo --int8` writes every network in int8 too, and prints what that costs in accuracy.
    """
    from deploy.export import export as export_networks
    from deploy.export_table import render_int8, render_table
    from deploy.formats import FORMATS
    from deploy.latency import write_table
    from deploy.quantize import export_int8

    campaign, failures = _opened(folder), list[ZerooutError]()
    # in int8 a network is judged beside itself in float
    formats = dict.fromkeys([file_format, *(["onnx"] if int8 else [])]) if file_format else FORMATS
    paths = export_networks(campaign, compression=compression, formats=list(formats), warn=failures.append)
    if int8:
        paths += export_int8(campaign, compression=compression, warn=failures.append)
    for path in paths:
        typer.echo(path)
    table = write_table(campaign, paths, repeats=repeats)
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    console.print(render_table(table))
    if int8:
        console.print(render_int8(table))
    if failures:
        users = all(isinstance(failure, UserError) for failure in failures)
        _leave(2 if users else 1, "\n".join(f"zeroout: {failure}" for failure in failures))


@app.command()
def doctor(
    redis: RedisOption = "",
    ray_address: Annotated[
        str, typer.Option(help="Of a Ray cluster that runs, HOST:PORT or auto: looks at each of its nodes too.")
    ] = "",
    out: Annotated[str, typer.Option(help="Where the campaign's folder will lie: a folder, or a URI.")] = ".",
    data: Annotated[Path | None, typer.Option(help="A folder of images to look at.")] = None,
    model: ModelOption = "",
    weights: WeightsOption = None,
    width: Annotated[float, typer.Option(help="Of --model: multiplies its channels.")] = 1.0,
    skips: Annotated[str, typer.Option(help="Of --model: coupled or convolution.")] = "coupled",
    channels: Annotated[int, typer.Option(min=1, help="Of --model's images: 3 in colour, 1 in gray.")] = 3,
    image_size: Annotated[int, typer.Option(min=1, help="Of --model's images, in pixels.")] = 32,
    classes: Annotated[int, typer.Option(min=1, help="Of --model's images.")] = 10,
) -> None:
    """Check this machine, and with --model a network; each line is ok, or what is wrong and what mends it.

    On a cluster: `zeroout doctor --ray-address auto --redis rediss://...` asks every node for its versions, its GPUs,
    the way to Redis and its metrics.

    Example: `zeroout doctor --model package.module:factory --image-size 224 --classes 1000` lists which filters can be
    pruned, which live or die together, and what is left out and why.
    """
    from deploy.doctor import run_doctor

    def look() -> Any:
        from deploy.network_report import look_at
        from env.networks import NetworkConfig

        named = {"factory": model} if ":" in model else {"name": model}
        config = NetworkConfig(**named, width=width, skips=skips, weights=str(weights or ""))
        return look_at(config, channels=channels, classes=classes, image_size=image_size)

    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    code = run_doctor(
        console,
        redis_url=redis or None,
        ray_address=ray_address,
        data_path=data,
        model=look if model else None,
        out=out,
    )
    raise typer.Exit(code)


def _opened(folder: str) -> CampaignFolder:
    """A campaign's folder, to look at; of one at a URI a copy."""
    return _looker(copy_of(folder))()


def _looker(where: str) -> Callable[[], CampaignFolder]:
    """What opens a campaign for each of many looks."""
    if "://" not in where:
        return partial(CampaignFolder.open, where)
    look = _storage().looker(where)
    return lambda: CampaignFolder(look())


def _storage() -> Any:
    from deploy import storage  # imports pyarrow, which a folder of this machine needs not

    return storage


def _campaign(
    out: str, config: Callable[[Path, Any], Any], redis_url: str, *, existing: bool = False, refill_replay: bool = False
) -> None:
    """Run or resume (`existing`) the campaign of --out; `config` is asked for it when its folder is there."""
    from deploy.campaign import interruptible, run_campaign
    from deploy.progress import make_progress

    out = copy_of(out)
    if "://" not in out:
        refuse_held(Path(out))
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    progress = make_progress(console)
    try:
        place = _storage().kept(out, existing=existing) if "://" in out else contextlib.nullcontext(Path(out))
        with interruptible(), place as path:
            result = run_campaign(
                path, config(path, progress), redis_url=redis_url, progress=progress, refill_replay=refill_replay
            )
    except KeyboardInterrupt:
        progress.close()
        _leave(_INTERRUPTED, _how_to_go_on(out, redis_url))
    finally:
        progress.close()
    _print_result(console, CampaignFolder.open(path), result)


def _how_to_go_on(out: str, redis_url: str) -> str:
    if "://" not in out and not CampaignFolder(Path(out)).campaign_toml.is_file():
        return "interrupted before anything was begun"
    same = " with the same --redis" if redis_url else ""
    return f"interrupted; everything is saved. To go on: zeroout resume {out}{same}"


def _print_result(console: Console, folder: CampaignFolder, result: dict[str, Any]) -> None:
    base = result["baseline"]
    from deploy.frontier import measure_name, transfer_sentence

    removed = f"{measure_name(result)} removed"
    table = Table("network", removed, "parameters", "MACs", "validation", "test", "test, change")
    table.add_row("baseline", "0.00 %", f"{base['parameters']:,}", f"{base['macs']:,}", *_accuracies(base), "")
    if "replacement" in result:
        row = result["replacement"]
        change = f"{100 * (row['test_accuracy'] - base['test_accuracy']):+.2f} points"
        table.add_row(f"after replacement {row['how']}", "0.00 %", "", "", *_accuracies(row), change)
    # what max_drop found need not be among the first guesses
    found = [point for point in result["points"] if point not in result["comparison"]]
    for point in sorted([*result["comparison"], *found], key=lambda point: float(point["compression"])):
        mark = " *" if point in result["points"] else ""
        table.add_row(
            f"{point['group']} ({point['policy']}){mark}",
            f"{point['compression']:.2%}",
            f"{point['parameters']:,}",
            f"{point['macs']:,}",
            *_accuracies(point),
            f"{100 * (point['test_accuracy'] - base['test_accuracy']):+.2f} points",
        )
    console.print(table)
    if "transfer" in result:
        console.print(transfer_sentence(result), highlight=False, soft_wrap=True)
    if "limit" in result:
        _print_limit(console, result)
    else:
        console.print("* chosen, by validation accuracy; the test split was opened once, at the end", highlight=False)
    for point in result["points"]:
        if "why_not_exact" in point:
            line = f"{point['target']:.2%} was asked, {point['compression']:.2%} reached: {point['why_not_exact']}"
            console.print(line, highlight=False, soft_wrap=True)
    for name, path in (("report", folder.report_html), ("picture", folder.frontier_png), ("models", folder.export)):
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
    missing = _not_exported(folder, result)
    if missing:
        line = f"not among the models: {', '.join(missing)}; zeroout export {folder.path} says why"
        console.print(line, highlight=False, soft_wrap=True)


def _not_exported(folder: CampaignFolder, result: dict[str, Any]) -> list[str]:
    """Names of the files that could not be written."""
    from deploy.formats import FORMATS

    names = [f"{point['target']}.{name}" for point in result["points"] for name in FORMATS]
    return [name for name in names if not (folder.export / name).is_file()]


def _print_limit(console: Console, result: dict[str, Any]) -> None:
    """What `max_drop` found: one network, and why it is that."""
    asked = f"at most {result['max_drop']:g} points of validation accuracy were to be lost"
    console.print(f"{asked}: {result['limit']}", highlight=False, soft_wrap=True)
    for point in result["points"]:
        change = 100 * (point["test_accuracy"] - result["baseline"]["test_accuracy"])
        removed = f"{point['compression']:.2%} removed, {point['parameters']:,} parameters"
        line = f"* chosen: {removed}, test {change:+.2f} points"
        console.print(line, highlight=False, soft_wrap=True)


def _accuracies(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['val_accuracy']:.2%}", f"{row['test_accuracy']:.2%}"


def _leave(code: int, line: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(line, highlight=False, markup=False)
    # a local Ray or a thread of it must not hold an ending program
    sys.stdout.flush()
    sys.stderr.flush()
    if code == _INTERRUPTED:
        os._exit(code)
    sys.exit(code)


def main() -> None:
    """The `zeroout` command."""
    hide_password()
    # last, so that a user's `env` does not stand before ours; Ray's workers take this path over
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        app()
    except UserError as error:
        _leave(2, f"zeroout: {error}")
    except ZerooutError as error:
        _leave(1, f"zeroout: {error}")


if __name__ == "__main__":
    main()
