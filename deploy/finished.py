"""Finished campaigns as their folders hold them: settings and results, checked, each with a name of its own.

Called by `zeroout compare`; deploy/compare.py puts them beside each other.
"""

import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.config import CampaignConfig, dump
from deploy.folder import CampaignFolder, flat, read_json
from deploy.frontier import measure_name
from env.errors import UserError

__all__ = ["BASELINE_NUMBERS", "POINT_NUMBERS", "Campaign", "read_campaigns", "unique_names"]

Record = dict[str, Any]

#: Keys of result.json that are numbers, of the baseline and of each point.
BASELINE_NUMBERS = ("parameters", "macs", "val_accuracy", "test_accuracy")
POINT_NUMBERS = ("compression", *BASELINE_NUMBERS)


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """A finished campaign: what its files hold."""

    name: str  # no other campaign beside it has the same
    folder: str  # as the user gave it
    settings: Record  # of campaign.toml, by "section.key"; what is not in the file has its default
    result: Record  # result.json
    versions: Record  # versions.json, empty where there is none

    @property
    def seed(self) -> int:
        """The seed of everything random in it."""
        return int(self.result["seed"] if "seed" in self.result else self.settings["seed"])

    @property
    def network(self) -> str:
        """The network before it was pruned: its name, and its factory where it is the user's own."""
        return str(self.settings["network.factory"] or self.settings["network.name"])

    @property
    def measure(self) -> str:
        """What its compression is a share of, in words."""
        return measure_name({"measure": self.settings["episode.measure"], **self.result})

    @property
    def width(self) -> float | None:
        """What multiplies the network's channels; None for a network of the user's own."""
        return None if self.settings["network.factory"] else float(self.settings["network.width"])


def read_campaigns(asked: Mapping[str, CampaignFolder]) -> tuple[list[Campaign], list[str]]:
    """Return the finished campaigns in the order given, and the names of those that have no result yet.

    Args:
        asked: the folders by what the user typed; one that is named twice is taken once.

    Raises:
        UserError: a campaign's file is broken, or none is finished.

    """
    by_place: dict[str, str] = {}
    for text, folder in asked.items():
        by_place.setdefault(str(folder.path.resolve()), text)
    given = list(by_place.values())
    names = unique_names([text if "://" in text else place for place, text in by_place.items()])
    done = [asked[text].result_json.is_file() for text in given]
    if not any(done):
        raise UserError(
            ", ".join(given),
            expected="at least one finished campaign (it has a result.json)",
            got="none that is finished",
            remedy=f"zeroout status {given[0]} shows how far it is, zeroout resume {given[0]} goes on with it",
        )
    there = list(zip(names, given, done, strict=True))
    finished = [_read(name, text, asked[text]) for name, text, is_done in there if is_done]
    return finished, [name for name, _, is_done in there if not is_done]


def unique_names(places: Sequence[str]) -> list[str]:
    """Return the last part of each path or URI, and as many before it as set it apart; `places` are all different."""
    parts = [place.rstrip("/").split("/") for place in places]
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        grow = [
            names.count(name) > 1 and length < len(part)
            for name, length, part in zip(names, lengths, parts, strict=True)
        ]
        if not any(grow):
            return names
        lengths = [length + more for length, more in zip(lengths, grow, strict=True)]


def _read(name: str, text: str, folder: CampaignFolder) -> Campaign:
    versions = read_json(folder.versions_json) if folder.versions_json.is_file() else {}
    return Campaign(
        name=name,
        folder=text,
        settings=_settings(folder.campaign_toml),
        result=_checked(folder.result_json),
        versions=versions if isinstance(versions, dict) else {},
    )


def _settings(path: Path) -> Record:
    """The file's values over the defaults; of an older version's file the keys that are no more stay."""
    try:
        values = dict(flat(tomllib.loads(path.read_text(encoding="utf-8"))))
    except ValueError as error:
        raise UserError(str(path), expected="valid TOML", got=str(error), remedy="mend that line") from error
    defaults = _defaults()
    for key in defaults.keys() & values.keys():
        kind = type(defaults[key])
        if kind is float and type(values[key]) is int:
            values[key] = float(values[key])
        if type(values[key]) is not kind:
            raise UserError(
                f"{path}, {key}", expected=f"a value like {defaults[key]!r}", got=repr(values[key]), remedy="mend it"
            )
    return {**defaults, **values}


@functools.cache
def _defaults() -> Record:
    return dict(flat(tomllib.loads(dump(CampaignConfig()))))


def _checked(path: Path) -> Record:
    """A result.json whose numbers are all there."""
    result = read_json(path)
    parts = result if isinstance(result, dict) else {}
    points = parts.get("points")
    if not isinstance(points, list):
        raise _not_a_result(path, "points", points)
    for where, part, keys in (
        ("baseline", parts.get("baseline"), BASELINE_NUMBERS),
        *((f"points[{number}]", point, POINT_NUMBERS) for number, point in enumerate(points)),
    ):
        for key in keys:
            value = part.get(key) if isinstance(part, dict) else None
            if not isinstance(value, int | float):
                raise _not_a_result(path, f"{where}.{key}", value)
    return parts


def _not_a_result(path: Path, key: str, value: object) -> UserError:
    return UserError(
        f"{path}, {key}",
        expected="a list" if key == "points" else "a number",
        got="nothing" if value is None else repr(value),
        remedy="restore the file, or move it away and resume: the stage that makes it runs again",
    )
