"""The report's sections that show more than they say: the frontier, the layers, learning, throughput.

Called by deploy/report.py. Each returns HTML, with everything that its picture shows in words or numbers too, or an
empty text where there is nothing to show.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from deploy.figures import count, percent
from deploy.folder import CampaignFolder, read_json
from deploy.page import disclosure, picture, raw_table, strip, table, text
from deploy.progress import duration
from deploy.published import Published

__all__ = ["forms", "frontier_section", "layers_section", "learning_section", "throughput_section"]

Record = dict[str, Any]


def forms(draw: Callable[[Any], bytes]) -> dict[tuple[bool, bool], bytes]:
    """A picture's four forms by (dark, narrow); `draw` is given the deploy.canvas.Form."""
    from deploy.canvas import Form

    return {(dark, narrow): draw(Form(dark=dark, narrow=narrow)) for dark in (False, True) for narrow in (False, True)}


def frontier_section(records: Sequence[Record], result: Record | None, published: Sequence[Published]) -> str:
    """Accuracy against compression: all episodes, the groups and heuristics, the result, what others published."""
    from deploy.charts import frontier_image  # matplotlib: see deploy/report.py

    drawn = forms(lambda form: frontier_image(records, result, published=published, form=form))
    title = "Accuracy against compression"
    note = (
        "Thin lines: every episode on its way (the newest 300 of a group), on validation images, before any recovery. "
        "Symbols: the best of each group and of each heuristic after the short recovery of an episode. Stars: the "
        "result, on the test images."
    )
    description = f"{title}: {len(records)} episodes, and the results as in the table"
    return f"<h2>{title}</h2>{picture(description, drawn)}<p class=dim>{note}</p>{_published_table(published)}"


def _published_table(published: Sequence[Published]) -> str:
    if not published:
        return (
            "<p class=dim>No published points are marked: those of the source and of its rivals are for VGG16 and "
            "ResNets at full width on the official CIFAR-10, and cannot be compared with this campaign's.</p>"
        )
    rows = [
        [p.who, percent(p.compression), percent(p.accuracy), "" if p.change is None else f"{p.change:+.2f}", p.note]
        for p in published
    ]
    note = (
        "As their authors give them, for this network on CIFAR-10: trained otherwise, each from a baseline of its own. "
        "Where only a change was published, it is drawn from this campaign's baseline."
    )
    shown = table("Published", ("published by", "removed", "test", "change", ""), rows)
    return f"<h3>Published</h3>{shown}<p class=dim>{note}</p>"


def layers_section(campaign: CampaignFolder, result: Record | None) -> str:
    """What was kept of each layer, for each exported network of the result."""
    points = (result or {}).get("points") or []
    described = [(point, layers) for point in points if (layers := _layers(campaign, point))]
    if not described:
        return ""
    tables = [
        disclosure(_kept_in_all(point, layers), _layer_table(layers) + _agreement(point), is_open=number == 0)
        for number, (point, layers) in enumerate(described)
    ]
    note = "Each bar is a layer, from its first filter to its last; what is coloured was kept."
    return f"<h2>What was kept, layer by layer</h2><p class=dim>{note}</p>{''.join(tables)}"


def _layers(campaign: CampaignFolder, point: Record) -> list[Record]:
    """What the export says about each layer of a network (env.compact_file.describe_layers); empty before it."""
    description = campaign.export / f"{point.get('target')}.json"
    return list(read_json(description).get("layers", [])) if description.is_file() else []


def _kept_in_all(point: Record, layers: Sequence[Record]) -> str:
    after, before = (sum(layer[key] for layer in layers) for key in ("after", "before"))
    return f"{percent(point['target'], 1)} removed: {after:,} of {before:,} filters kept"


def _layer_table(layers: Sequence[Record]) -> str:
    rows = [
        [
            text(str(layer["name"])),
            f"{layer['after']:,} of {layer['before']:,}",
            percent(layer["after"] / layer["before"], 0),
            strip(layer["kept"], layer["after"], layer["before"]),
        ]
        for layer in layers
    ]
    return raw_table("Filters kept of each layer", ("layer", "filters kept", "share", "which"), rows)


def _agreement(point: Record) -> str:
    """How far each importance agrees with what was kept (deploy/agreement.py); empty where that is not known."""
    found = dict(point.get("agreement") or {})
    if not found:
        return ""
    chance = found.pop("chance")
    shares = ", ".join(f"{name} {percent(share, 0)}" for name, share in sorted(found.items(), key=lambda kv: -kv[1]))
    said = (
        f"Of the filters kept, so many are among the highest of their layer by each importance of the network before "
        f"it was pruned, on images drawn anew: {shares}. As many chosen at random: {percent(chance, 0)}."
    )
    return f"<p class=dim>{text(said)}</p>"


def learning_section(records: Sequence[Record]) -> str:
    """The return of every episode, by group."""
    from deploy.charts import learning_image

    description = f"Learning: the return of each of {len(records)} episodes, by group"
    return f"<h2>Learning</h2>{picture(description, forms(lambda form: learning_image(records, form=form)))}"


def throughput_section(actors: Sequence[Record], records: Sequence[Record]) -> str:
    """How fast each actor (as in `deploy.status.read_status`) played, and what took its time."""
    if not actors:
        return ""
    from deploy.charts import throughput_image

    header = ("actor", "episodes", "steps", "time playing", "episodes a minute", "steps a minute")
    shown = table("Throughput", header, [_actor_row(actor) for actor in actors])
    drawn = forms(lambda form: throughput_image(records, form=form))
    description = "Throughput: steps a minute of each actor, episode by episode"
    return f"<h2>Throughput</h2>{shown}{_phases(records)}{picture(description, drawn)}"


def _actor_row(actor: Record) -> list[str]:
    seconds, rates = actor["seconds"], ["", ""]
    if seconds > 0:
        rates = [f"{60 * actor[what] / seconds:.1f}" for what in ("episodes", "steps")]
    return [actor["name"], count(actor["episodes"]), count(actor["steps"]), duration(seconds), *rates]


def _phases(records: Sequence[Record]) -> str:
    spent: Counter[str] = Counter()
    for record in records:
        spent.update(record.get("phases") or {})
    if spent.total() <= 0:
        return ""
    shares = ", ".join(f"{phase} {percent(seconds / spent.total(), 0)}" for phase, seconds in spent.most_common())
    return f"<p class=dim>Where the time went: {text(shares)}.</p>"
