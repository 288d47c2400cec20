"""The command line: `zeroout run | resume | status | report | export | doctor`.

Exit codes: 0 done, 2 the user's mistake (one clear line), 1 ours, 130 interrupted (state saved).
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from deploy.folder import CampaignFolder
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
_DEFAULT_CONFIG = Path(__file__).parent / "campaigns" / "digits.toml"

ConfigArgument = Annotated[
    Path | None, typer.Argument(metavar="[CONFIG.toml]", help="The campaign; left out, a demonstration on digits.")
]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A campaign's folder.")]
OutOption = Annotated[Path, typer.Option("--out", help="The campaign's folder; the same campaign there is resumed.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one value of the configuration.")
]
RedisOption = Annotated[
    str,
    typer.Option(
        "--redis",
        envvar="ZEROOUT_REDIS_URL",
        show_envvar=True,
        help="redis:// or rediss:// URL of a server that all hosts reach; left out, the campaign starts its own.",
    ),
]
RayOption = Annotated[
    str | None, typer.Option("--ray-address", help="A running Ray cluster; left out, a local Ray is started.")
]
ControlsOption = Annotated[
    bool,
    typer.Option(
        "--controls",
        help="Also play random search, Taylor, the cross-entropy method and the untrained Controller, each with as "
        "many episodes, and recover their best networks alike.",
    ),
]


@app.command()
def run(
    out: OutOption,
    config: ConfigArgument = None,
    overrides: SetOption = None,
    redis: RedisOption = "",
    ray_address: RayOption = None,
    controls: ControlsOption = False,
) -> None:
    """Run a campaign: prepare, search, recover, export, report.

    Examples: `zeroout run --out runs/demo` compresses a small network on embedded digits;
    `zeroout run deploy/campaigns/vgg16-quarter-cifar10.toml --set data.path=images --out runs/vgg`.
    """
    from deploy.config import load

    extra = list(overrides or [])
    if controls:
        extra.append('search.controls=["random", "taylor", "cem", "untrained"]')
    if ray_address:
        extra.append(f"cluster.ray_address={json.dumps(ray_address)}")
    _campaign(out, load(config or _DEFAULT_CONFIG, extra), redis)


@app.command()
def resume(folder: FolderArgument, redis: RedisOption = "") -> None:
    """Go on with a campaign after anything at all has died; of a finished one only exports and report are made anew."""
    from deploy.config import load

    campaign = CampaignFolder.open(folder)
    _campaign(folder, load(campaign.campaign_toml), redis)


@app.command()
def status(
    folder: FolderArgument,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until it is interrupted.")] = False,
) -> None:
    """Show how far a campaign is: actors, throughput, frontier, result."""
    from deploy.config import load
    from deploy.status import read_status, render_status
    from deploy.status import watch as watch_status

    campaign = CampaignFolder.open(folder)
    total = load(campaign.campaign_toml).search.total
    if as_json:
        typer.echo(json.dumps(read_status(campaign, episodes_total=total)))
    elif watch:
        watch_status(campaign, Console(), episodes_total=total)
    else:
        render_status(read_status(campaign, episodes_total=total), Console())


@app.command()
def report(folder: FolderArgument) -> None:
    """Write report.html and frontier.png anew, also of an unfinished campaign."""
    from deploy.report import write_report

    typer.echo(write_report(CampaignFolder.open(folder)))


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
) -> None:
    """Write a finished campaign's networks as files, each read back and compared with the network it came from.

    Prints the files, and a table of their sizes and latencies beside the original's (also in export/table.json).
    """
    from deploy.export import FORMATS
    from deploy.export import export as export_networks
    from deploy.latency import render_table, write_table

    campaign, failures = CampaignFolder.open(folder), list[ZerooutError]()
    formats = [file_format] if file_format else FORMATS
    paths = export_networks(campaign, compression=compression, formats=formats, warn=failures.append)
    for path in paths:
        typer.echo(path)
    table = write_table(campaign, paths, repeats=repeats)
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH).print(render_table(table))
    if failures:
        users = all(isinstance(failure, UserError) for failure in failures)
        _leave(2 if users else 1, "\n".join(f"zeroout: {failure}" for failure in failures))


@app.command()
def doctor(
    redis: RedisOption = "",
    data: Annotated[Path | None, typer.Option(help="A folder of images to look at.")] = None,
    model: Annotated[str | None, typer.Option(help="A network to look at.")] = None,
) -> None:
    """Check this machine; each line is ok, or what is wrong and what mends it."""
    from deploy.doctor import run_doctor

    raise typer.Exit(run_doctor(Console(), redis_url=redis or None, data_path=data, model=model))


def _campaign(out: Path, config: Any, redis_url: str) -> None:
    from deploy.campaign import run_campaign
    from deploy.progress import make_progress

    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    progress = make_progress(console)
    try:
        with _interruptible():
            result = run_campaign(out, config, redis_url=redis_url, progress=progress)
    except KeyboardInterrupt:
        progress.close()
        _leave(_INTERRUPTED, _how_to_go_on(out, redis_url))
    finally:
        progress.close()
    _print_result(console, CampaignFolder.open(out), result)


def _how_to_go_on(out: Path, redis_url: str) -> str:
    if not CampaignFolder(out).campaign_toml.is_file():
        return "interrupted before anything was begun"
    same = " with the same --redis" if redis_url else ""
    return f"interrupted; everything is saved. To go on: zeroout resume {out}{same}"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends a campaign as Ctrl+C does."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_result(console: Console, folder: CampaignFolder, result: dict[str, Any]) -> None:
    base = result["baseline"]
    table = Table("network", "parameters removed", "parameters", "MACs", "validation", "test", "test, change")
    table.add_row("baseline", "0.00 %", f"{base['parameters']:,}", f"{base['macs']:,}", *_accuracies(base), "")
    for point in result["comparison"]:
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
    console.print("* chosen, by validation accuracy; the test split was opened once, at the end", highlight=False)
    for name, path in (("report", folder.report_html), ("picture", folder.frontier_png), ("models", folder.export)):
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)


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
    try:
        app()
    except UserError as error:
        _leave(2, f"zeroout: {error}")
    except ZerooutError as error:
        _leave(1, f"zeroout: {error}")


if __name__ == "__main__":
    main()
