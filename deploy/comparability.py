"""Why the numbers of several campaigns may not stand beside each other, said in sentences.

Called by deploy/compare_table.py; pure functions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.compare import Series, identity
from deploy.figures import count, percent
from deploy.finished import Campaign

__all__ = ["differences", "network_name", "reservations"]

_MOST_NAMED = 3  # campaigns or values in a sentence; a long one is not read

Facts = dict[str, str]  # what is compared -> as it is shown


def reservations(campaigns: Sequence[Campaign], series: Sequence[Series]) -> list[str]:
    """Return one sentence for each reason not to compare accuracies, with what differs; empty where there is none.

    `series` are the campaigns as deploy.compare.over_seeds puts them together.
    """
    sentences = []
    for topic in _TOPICS:
        parts = _differing(campaigns, topic.facts)
        if parts:
            sentences.append(f"{topic.what}: {topic.therefore} ({'; '.join(parts)}).")
    return [*sentences, *filter(None, map(_repeated, series))]


def differences(campaigns: Sequence[Campaign]) -> dict[str, dict[str, Any]]:
    """Return {setting: {campaign: value}} of every setting that is not the same in all; where it is not known, None.

    Seeds and what says only where a campaign runs are left out (deploy.compare.identity).
    """
    settings = {campaign.name: identity(campaign.settings) for campaign in campaigns}
    keys = dict.fromkeys(key for of_one in settings.values() for key in of_one)
    found = {key: {name: of_one.get(key) for name, of_one in settings.items()} for key in keys}
    return {key: values for key, values in found.items() if len(set(map(_shown, values.values()))) > 1}


def network_name(network: Mapping[str, Any]) -> str:
    """Return a network in words, from its "network", "width" and "skips"."""
    width = "" if network["width"] in (None, 1.0) else f" x {network['width']:g}"
    return f"{network['network']}{width}{' with skip convolutions' if network['skips'] == 'convolution' else ''}"


def _images(campaign: Campaign) -> Facts:
    settings = campaign.settings
    source = settings["data.source"]
    # of images that come with Zeroout or from an official archive, the path says only where they lie
    facts = {"source": f"folder {settings['data.path']}" if source == "folder" else source}
    keys = ("image_size", "validation_share", "test_share", "split_seed", "train_limit", "classes", "train_per_class")
    return facts | {key: _shown(settings[f"data.{key}"]) for key in keys}


def _baseline(campaign: Campaign) -> Facts:
    baseline, settings = campaign.result["baseline"], campaign.settings
    name = network_name({"network": campaign.network, "width": campaign.width, "skips": settings["network.skips"]})
    accuracies = f"validation {percent(baseline['val_accuracy'])}, test {percent(baseline['test_accuracy'])}"
    return {"": f"{name}, {count(baseline['parameters'])} parameters, {accuracies}"}


def _measure(campaign: Campaign) -> Facts:
    return {"measure": campaign.measure}


def _budget(campaign: Campaign) -> Facts:
    settings = campaign.settings
    retrained = settings["episode.waypoints"] * settings["episode.step_minibatches"]
    recovered = len(settings["episode.targets"]) * settings["episode.recovery_minibatches"]
    return {
        "episodes": _shown(campaign.result.get("episodes", settings["search.episodes"])),
        "retrained minibatches an episode": _shown(retrained + recovered),
        "images a minibatch": _shown(settings["episode.batch_size"]),
        "epochs after replacement": _shown(
            settings["replacement_training.epochs"] if settings["replacement.how"] else 0
        ),
        "recovery epochs": _shown(settings["recovery.epochs"]),
        "distilled share of the recovery": _shown(settings["recovery.distillation"]),
    }


def _versions(campaign: Campaign) -> Facts:
    facts = {name: _shown(campaign.versions.get(name)) for name in ("zeroout", "commit", "torch")}
    return facts | {"commit": facts["commit"][:10]}


@dataclass(frozen=True)
class _Topic:
    """One thing in which campaigns have to agree."""

    what: str
    facts: Callable[[Campaign], Facts]
    therefore: str


_TOPICS = (
    _Topic("Not comparable, different images", _images, "each accuracy is of its own test images"),
    _Topic("Not comparable, different baselines", _baseline, "look at the changes, each from its own baseline"),
    _Topic(
        "Not comparable, different measures", _measure, "the same compression is not the same size; compare parameters"
    ),
    _Topic("Not comparable, different budgets", _budget, "more tries and more retraining make better networks"),
    _Topic("With care, different versions", _versions, "the same settings may not have done the same"),
)


def _differing(campaigns: Sequence[Campaign], facts: Callable[[Campaign], Facts]) -> list[str]:
    """The facts that are not the same in all campaigns, each with its values and who has them."""
    of_each = {campaign.name: facts(campaign) for campaign in campaigns}
    parts = []
    for fact in dict.fromkeys(fact for of_one in of_each.values() for fact in of_one):
        who: dict[str, list[str]] = {}
        for name, of_one in of_each.items():
            who.setdefault(of_one.get(fact, _shown(None)), []).append(name)
        if len(who) > 1:
            values = [f"{value} in {_few(names, ', ')}" for value, names in who.items()]
            parts.append(f"{fact} {_few(values, ' | ')}".strip())
    return parts


def _repeated(series: Series) -> str:
    """A sentence where a series holds one seed several times."""
    seeds = [campaign.seed for campaign in series.campaigns]
    again = [campaign.name for campaign in series.campaigns if seeds.count(campaign.seed) > 1]
    if not again:
        return ""
    return f"With care, the same seed too: repeats may spread less than seeds do ({_few(again, ', ')})."


def _few(texts: Sequence[str], between: str) -> str:
    rest = len(texts) - _MOST_NAMED
    return between.join(texts) if rest <= 1 else f"{between.join(texts[:_MOST_NAMED])} and {rest} more"


def _shown(value: Any) -> str:
    if value is None:
        return "not known"
    return value if isinstance(value, str) and value else repr(value)
