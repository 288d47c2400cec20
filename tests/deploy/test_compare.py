"""Campaigns beside each other: the numbers are result.json's, seeds are summed up, what does not compare is said."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Zeroout
from finished_campaign import TINY, finished
from PIL import Image
from rich.console import Console

from deploy import compare_chart
from deploy.canvas import Form
from deploy.compare import Series, identity, over_seeds, rows
from deploy.compare_chart import comparison_image
from deploy.compare_table import compared, render
from deploy.config import dump, parse
from deploy.finished import Campaign, read_campaigns, unique_names
from deploy.folder import CampaignFolder, read_json, write_json

BASELINE = {"parameters": 1000, "macs": 50_000, "val_accuracy": 0.82, "test_accuracy": 0.80}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four pictures a page take seconds; other tests here look at real ones."""
    dot = io.BytesIO()
    Image.new("1", (1, 1)).save(dot, "PNG")
    monkeypatch.setattr(compare_chart, "png", lambda figure, form: dot.getvalue())


def point(target: float, test: float, **changed: Any) -> dict[str, Any]:
    return {
        "target": target, "group": "gamma", "policy": "gamma", "episode": 0, "compression": target + 0.001,
        "parameters": round(1000 * (1 - target)), "macs": 20_000, "val_accuracy": test + 0.01, "test_accuracy": test,
        "model": f"recovered/gamma-{target}.safetensors", **changed,
    }  # fmt: skip


def campaign(
    path: Path,
    points: list[dict[str, Any]] | None,
    *,
    toml: str = "",
    seed: int = 0,
    baseline: dict[str, Any] = BASELINE,
    **changed: Any,
) -> CampaignFolder:
    """A campaign of `--method gamma` on disk; without points it is not finished."""
    sections = toml if "[search]" in toml else f'{toml}\n[search]\nmethod = "gamma"\n'
    folder = CampaignFolder.create(path, dump(parse(f"seed = {seed}\n{sections}")))
    if points is not None:
        result = {"baseline": baseline, "measure": "parameters", "points": points, "episodes": 1, "seed": seed}
        write_json(folder.result_json, result | changed)
    return folder


def read(*folders: CampaignFolder) -> list[Campaign]:
    return read_campaigns({str(folder.path): folder for folder in folders})[0]


def three_seeds(tmp_path: Path) -> list[Campaign]:
    accuracies = {0: (0.78, 0.70), 1: (0.74, 0.71), 2: (0.79, 0.75)}
    return read(
        *(
            campaign(tmp_path / f"gamma-s{seed}", [point(0.8, high), point(0.9, low)], seed=seed)
            for seed, (high, low) in accuracies.items()
        )
    )


class Cells(HTMLParser):
    """The tables of a page as rows of cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[str] = []
        self._within = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self._within = tag in ("td", "th")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif self._within:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._within = False

    def handle_data(self, data: str) -> None:
        if self._within:
            self.tables[-1][-1][-1] += data


# what is gathered


def test_the_rows_are_result_jsons_numbers_sorted_by_size_and_then_by_accuracy(tmp_path: Path) -> None:
    low = campaign(tmp_path / "low", [point(0.5, 0.70), point(0.9, 0.60, compression=0.9001)])
    high = campaign(tmp_path / "high", [point(0.5, 0.75, compression=0.5004), point(0.9, 0.66, compression=0.9016)])
    found = rows(read(low, high))
    assert [(row["campaign"], row["target"]) for row in found] == [
        ("high", 0.5), ("low", 0.5), ("high", 0.9), ("low", 0.9),
    ]  # fmt: skip
    known = read_json(high.result_json)["points"][0]
    assert {key: found[0][key] for key in known.keys() - {"episode"}} == {
        key: value for key, value in known.items() if key != "episode"
    }
    assert found[0]["change"] == pytest.approx(-5.0)
    assert found[0]["baseline"] == BASELINE
    assert (found[0]["method"], found[0]["network"], found[0]["width"]) == ("gamma", "small", 1.0)
    assert (found[0]["folder"], found[0]["seed"]) == (str(high.path), 0)


def test_a_target_that_was_missed_is_sorted_by_what_was_reached(tmp_path: Path) -> None:
    missed = campaign(tmp_path / "missed", [point(0.9, 0.79, compression=0.7, why_not_exact="wide layers")])
    met = campaign(tmp_path / "met", [point(0.8, 0.60)])
    assert [row["campaign"] for row in rows(read(met, missed))] == ["missed", "met"]


def test_the_numbers_of_a_finished_campaign_on_digits(zeroout: Zeroout, tmp_path: Path) -> None:
    folder = finished(tmp_path / "digits", TINY, (0.5, 0.8))
    result = read_json(folder.result_json)
    shown = json.loads(zeroout("compare", folder.path, "--json").output)
    keys = ("target", "compression", "parameters", "macs", "val_accuracy", "test_accuracy", "policy", "model")
    assert [[row[key] for key in keys] for row in shown["rows"]] == [[p[key] for key in keys] for p in result["points"]]
    assert [row["change"] for row in shown["rows"]] == pytest.approx([-20.0, -20.0])
    assert (shown["rows"][0]["network"], shown["rows"][0]["width"]) == ("brought:depthwise", None)
    assert (shown["seeds"], shown["reservations"], shown["differences"], shown["unfinished"]) == ([], [], {}, [])


# seeds


def test_campaigns_that_differ_in_the_seed_alone_are_summed_up(tmp_path: Path) -> None:
    (series,) = over_seeds(three_seeds(tmp_path))
    assert series.name == "gamma (3 seeds)"
    first, second = series.points
    assert (first["target"], first["n"], second["target"], second["n"]) == (0.8, 3, 0.9, 3)
    # 0.78, 0.74, 0.79: mean 0.77, squares of what is left 1 + 9 + 4 = 14 over n - 1 = 2: 7, all in hundredths
    assert first["test_accuracy"]["mean"] == pytest.approx(0.77)
    assert first["test_accuracy"]["sd"] == pytest.approx(0.01 * 7**0.5)
    assert first["change"] == {"mean": pytest.approx(-3.0), "sd": pytest.approx(7**0.5)}
    # 0.70, 0.71, 0.75: mean 0.72, 4 + 1 + 9 = 14 again
    assert second["test_accuracy"] == {"mean": pytest.approx(0.72), "sd": pytest.approx(0.01 * 7**0.5)}
    assert second["parameters"] == {"mean": 100, "sd": 0}
    assert second["policies"] == ["gamma"]


def test_each_change_is_from_the_campaigns_own_baseline(tmp_path: Path) -> None:
    baselines = [{**BASELINE, "test_accuracy": accuracy} for accuracy in (0.80, 0.82)]
    both = read(*(campaign(tmp_path / f"{n}", [point(0.9, 0.7)], seed=n, baseline=b) for n, b in enumerate(baselines)))
    assert [row["change"] for row in rows(both)] == pytest.approx([-10.0, -12.0])
    (series,) = over_seeds(both)
    assert series.points[0]["change"] == {"mean": pytest.approx(-11.0), "sd": pytest.approx(2**0.5)}


@pytest.mark.parametrize(
    ("toml", "together"),
    [
        ("[cluster]\ngpus_per_actor = 1", True),
        ("[replay]\nshards = 4", True),
        ("[data]\ncache = '/elsewhere'", True),
        ("[network]\nwidth = 0.5", False),
        ("[recovery]\nepochs = 3", False),
        ("[network]\nweights = 'here.pt'", False),  # where the other has none
        ("[search]\nmethod = 'taylor'", False),
    ],
)
def test_only_where_and_with_which_seed_a_campaign_runs_may_differ(tmp_path: Path, toml: str, together: bool) -> None:
    both = read(
        campaign(tmp_path / "a", [point(0.9, 0.7)]), campaign(tmp_path / "b", [point(0.9, 0.7)], seed=1, toml=toml)
    )
    assert len(over_seeds(both)) == (1 if together else 2)


def test_each_seed_may_bring_weights_of_its_own() -> None:
    settings = {
        "data.source": "digits",
        "network.weights": "a.pt",
        "controller.weights": "",
        "seed": 1,
    }
    assert identity(settings) == identity({**settings, "network.weights": "b.pt", "seed": 2})
    assert identity(settings) != identity({**settings, "network.weights": ""})


def test_official_images_may_lie_anywhere_and_a_folder_is_its_images() -> None:
    def of(source: str, path: str) -> dict[str, Any]:
        return identity({"data.source": source, "data.path": path})

    assert of("cifar10", "/a") == of("cifar10", "/b")
    assert of("folder", "/a") != of("folder", "/b")


def test_networks_that_each_seed_found_within_max_drop_are_summed_up_wherever_they_lie(tmp_path: Path) -> None:
    limit = {"max_drop": 1.0, "limit": "90.00 % removed loses 0.90"}
    found = [[point(0.8, 0.79)], [point(0.9, 0.79)], []]
    both = read(
        *(campaign(tmp_path / f"{n}", points, seed=n, toml="max_drop = 1.0", **limit) for n, points in enumerate(found))
    )
    (series,) = over_seeds(both)
    (only,) = series.points
    assert (only["target"], only["n"]) == (None, 2)
    assert only["compression"]["mean"] == pytest.approx(0.851)
    assert compared(both, []).notes == ["2 gave no network back: 90.00 % removed loses 0.90."]


def test_one_seed_twice_is_no_second_seed(tmp_path: Path) -> None:
    both = read(*(campaign(tmp_path / name, [point(0.9, 0.7)], seed=4) for name in ("gamma-a", "gamma-b")))
    comparison = compared(both, [])
    assert comparison.series[0].name == "gamma (2 runs, 1 seed)"
    assert comparison.reservations == [
        "With care, the same seed too: repeats may spread less than seeds do (gamma-a, gamma-b)."
    ]


def test_series_whose_names_have_nothing_in_common_are_named_by_their_first(tmp_path: Path) -> None:
    both = read(*(campaign(tmp_path / name, [point(0.9, 0.7)], seed=n) for n, name in enumerate(("one", "two"))))
    assert over_seeds(both)[0].name == "one and others (2 seeds)"


# what does not compare


def reservation(tmp_path: Path, **other: Any) -> str:
    """The one sentence on two campaigns, of which the second is other."""
    both = read(campaign(tmp_path / "a", [point(0.9, 0.7)]), campaign(tmp_path / "b", [point(0.9, 0.7)], **other))
    (sentence,) = compared(both, []).reservations
    return sentence


def test_other_images_are_said(tmp_path: Path) -> None:
    sentence = reservation(tmp_path, toml="[data]\nsource = 'folder'\npath = '/my/images'\nsplit_seed = 3")
    assert sentence == (
        "Not comparable, different images: each accuracy is of its own test images "
        "(source digits in a | folder /my/images in b; split_seed 0 in a | 3 in b)."
    )


def test_other_classes_of_the_same_images_are_said(tmp_path: Path) -> None:
    sentence = reservation(tmp_path, toml="[data]\nclasses = '3,8'\ntrain_per_class = 9")
    assert "(classes '' in a | 3,8 in b; train_per_class 0 in a | 9 in b)" in sentence


def test_another_baseline_is_said(tmp_path: Path) -> None:
    sentence = reservation(tmp_path, seed=1, baseline={**BASELINE, "test_accuracy": 0.81})
    assert "small, 1,000 parameters, validation 82.00 %, test 80.00 % in a |" in sentence
    assert "test 81.00 % in b" in sentence
    assert "look at the changes" in sentence


def test_another_measure_is_said_in_the_table_too(tmp_path: Path) -> None:
    toml = "[episode]\nmeasure = 'macs'"
    assert "(measure parameters in a | MACs in b)" in reservation(tmp_path, toml=toml, measure="macs")
    both = read(CampaignFolder.open(tmp_path / "a"), CampaignFolder.open(tmp_path / "b"))
    named = re.findall(r"[\d.]+% of \w+", rendered(both, width=200))
    assert named == ["90.10% of parameters", "90.10% of MACs"]


def test_another_budget_is_said(tmp_path: Path) -> None:
    toml = "[episode]\nwaypoints = 5\nstep_minibatches = 4\nrecovery_minibatches = 10\n[recovery]\nepochs = 2"
    sentence = reservation(tmp_path, toml=toml, episodes=24)
    assert "episodes 1 in a | 24 in b" in sentence
    assert "retrained minibatches an episode 104 in a | 30 in b" in sentence  # 16 x 4 + 40, and 5 x 4 + 10
    assert "recovery epochs 10 in a | 2 in b" in sentence


def test_other_versions_are_said(tmp_path: Path) -> None:
    both = [campaign(tmp_path / name, [point(0.9, 0.7)]) for name in ("a", "b")]
    for folder, commit in zip(both, ("0123456789abcdef", "fedcba9876543210"), strict=True):
        write_json(folder.versions_json, {"zeroout": "0.1.0", "torch": "2.13.0", "commit": commit})
    assert "(commit 0123456789 in a | fedcba9876 in b)" in compared(read(*both), []).reservations[0]


def test_campaigns_that_compare_are_compared_without_a_word(tmp_path: Path) -> None:
    both = read(
        campaign(tmp_path / "gamma", [point(0.9, 0.7)]),
        campaign(tmp_path / "taylor", [point(0.9, 0.7)], toml="[search]\nmethod = 'taylor'"),
    )
    comparison = compared(both, [])
    assert comparison.reservations == []
    assert comparison.differences == {"search.method": {"gamma": "gamma", "taylor": "taylor"}}


def test_of_many_campaigns_a_few_are_named(tmp_path: Path) -> None:
    several = read(*(campaign(tmp_path / f"c{n}", [point(0.9, 0.7)], episodes=n // 8) for n in range(9)))
    (budget, _) = compared(several, []).reservations
    assert "episodes 0 in c0, c1, c2 and 5 more | 1 in c8" in budget


# what is read


def test_names_are_made_unique_by_what_stands_before_them() -> None:
    places = ["/runs/a/out", "/runs/b/out", "s3://bucket/b/out/", "/runs/other"]
    assert unique_names(places) == ["a/out", "runs/b/out", "bucket/b/out", "other"]


def test_a_folder_that_is_given_twice_is_one_campaign(zeroout: Zeroout, tmp_path: Path) -> None:
    campaign(tmp_path / "a", [point(0.9, 0.7)])
    shown = json.loads(zeroout("compare", tmp_path / "a", f"{tmp_path}/a/", tmp_path / "a" / ".", "--json").output)
    assert len(shown["rows"]) == 1


def test_a_uri_is_fetched(zeroout: Zeroout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = campaign(tmp_path / "kept", [point(0.9, 0.7)]).path.as_uri()
    (row,) = json.loads(zeroout("compare", uri, "--json").output)["rows"]
    assert (row["campaign"], row["folder"]) == ("kept", uri)


def test_an_unfinished_campaign_is_passed_over_with_a_line(zeroout: Zeroout, tmp_path: Path) -> None:
    done, begun = campaign(tmp_path / "done", [point(0.9, 0.7)]), campaign(tmp_path / "begun", None)
    code, _, output = zeroout("compare", begun.path, done.path)
    assert code == 0
    assert "Not finished, passed over: begun." in output
    assert json.loads(zeroout("compare", begun.path, done.path, "--json").output)["unfinished"] == ["begun"]


def test_an_older_versions_configuration_is_read(tmp_path: Path) -> None:
    old = campaign(tmp_path / "old", [point(0.9, 0.7)])
    old.campaign_toml.write_text("seed = 1\n[search]\nmethod = 'gamma'\n[controller]\nfilter_size = 32\n")
    comparison = compared(read(old, campaign(tmp_path / "new", [point(0.9, 0.7)])), [])
    assert comparison.differences == {"controller.filter_size": {"old": 32, "new": None}}


def a_mistake(run: Zeroout, *arguments: object) -> str:
    """Run a comparison that must be refused: one line, exit 2; returns the line."""
    code, error, _ = run("compare", *arguments)
    lines = [line for line in error.splitlines() if line]
    assert (code, len(lines)) == (2, 1), error
    assert all(word in lines[0] for word in ("zeroout: ", "expected ", "got "))
    return lines[0]


def test_what_is_no_finished_campaign_is_named(zeroout: Zeroout, tmp_path: Path) -> None:
    fine, begun = campaign(tmp_path / "fine", [point(0.9, 0.7)]), campaign(tmp_path / "begun", None)
    assert "zeroout resume" in a_mistake(zeroout, begun.path)
    assert "nowhere" in a_mistake(zeroout, fine.path, tmp_path / "nowhere")
    assert "campaign.toml" in a_mistake(zeroout, fine.path, tmp_path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "valid JSON"),
        ("[]", "points"),
        ('{"points": []}', "baseline.parameters"),
        (json.dumps({"baseline": BASELINE, "points": [{"compression": 0.9}]}), "points[0].parameters"),
        (json.dumps({"baseline": BASELINE, "points": [None]}), "points[0].compression"),
        (json.dumps({"baseline": {**BASELINE, "test_accuracy": "0.8"}, "points": []}), "baseline.test_accuracy"),
    ],
)
def test_a_broken_result_is_named(zeroout: Zeroout, tmp_path: Path, content: str, named: str) -> None:
    folder = campaign(tmp_path / "broken", [])
    folder.result_json.write_text(content)
    line = a_mistake(zeroout, folder.path)
    assert "result.json" in line
    assert named in line


@pytest.mark.parametrize(
    ("content", "named"), [("[network", "campaign.toml"), ("[episode]\nwaypoints = 'many'", "episode.waypoints")]
)
def test_a_broken_configuration_is_named(zeroout: Zeroout, tmp_path: Path, content: str, named: str) -> None:
    folder = campaign(tmp_path / "broken", [])
    folder.campaign_toml.write_text(content)
    assert named in a_mistake(zeroout, folder.path)


def test_files_that_cannot_be_written_are_named_first_and_no_result_is_written_over(
    zeroout: Zeroout, tmp_path: Path
) -> None:
    folder = campaign(tmp_path / "fine", [point(0.9, 0.7)])
    before = folder.result_json.read_bytes()
    assert ".html" in a_mistake(zeroout, folder.path, "--out", folder.result_json)
    assert ".png" in a_mistake(zeroout, folder.path, "--png", folder.result_json)
    assert "whose folder is not" in a_mistake(zeroout, folder.path, "--png", tmp_path / "none" / "x.png")
    (tmp_path / "x.html").mkdir()
    assert "a folder" in a_mistake(zeroout, folder.path, "--out", tmp_path / "x.html")
    assert folder.result_json.read_bytes() == before


# what is shown


def rendered(campaigns: list[Campaign], *, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    render(compared(campaigns, []), console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_terminal_shows_the_networks_and_the_seeds(tmp_path: Path) -> None:
    text = rendered(three_seeds(tmp_path), width=140)
    lines = [line.split() for line in text.splitlines()]
    row = ["gamma-s2", "gamma", "small", "2", "80.10%", "200", "20,000", "80.00%", "79.00%", "-1.00"]
    assert row in lines
    seeds = ["gamma", "(3", "seeds)", "gamma", "small", "3", "80.10", "±", "0.00%", "77.00", "±", "2.65%"]
    assert [*seeds, "-3.00", "±", "2.65"] in lines


def test_in_a_narrow_terminal_every_number_is_whole(tmp_path: Path) -> None:
    long = campaign(tmp_path / ("a-long-[bold]name" * 4), [point(0.9, 0.7, parameters=12_345_678, macs=313_201_664)])
    text = rendered(read(long), width=80)
    assert all(number in text for number in ("12,345,678", "313,201,664", "90.10%", "70.00%", "-10.00"))
    assert "[" in text  # folded, but not taken for a style
    assert "Validation accuracies are shown" in text
    assert max(map(len, text.splitlines()[:12])) <= 80


def test_the_policy_that_decided_is_named_where_it_was_not_the_method(tmp_path: Path) -> None:
    learned = campaign(
        tmp_path / "a", [point(0.9, 0.7, policy="taylor", group="taylor")], toml="[search]\nmethod = 'controller'"
    )
    assert "controller: taylor" in rendered(read(learned), width=140)


@pytest.mark.usefixtures("undrawn")
def test_the_page_holds_the_numbers_and_needs_nothing_else(zeroout: Zeroout, tmp_path: Path) -> None:
    three_seeds(tmp_path)
    other = campaign(
        tmp_path / "o<script>", [point(0.95, 0.5, compression=0.95042)], toml="[recovery]\nepochs = 3", episodes=7
    )
    folders = [*(tmp_path / f"gamma-s{seed}" for seed in range(3)), other.path]
    code, _, output = zeroout("compare", *folders, "--out", tmp_path / "page.html")
    assert (code, output.splitlines()[-1]) == (0, str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    page = Cells(text)
    networks, seeds, differing = page.tables
    header, *shown = networks
    assert len(shown) == 7
    last = dict(zip(header, shown[-1], strict=True))
    assert (last["campaign"], last["removed"], last["test"], last["change"]) == (
        "o<script>", "95.04 %", "50.00 %", "-30.00",
    )  # fmt: skip
    assert (last["baseline's test"], last["model"]) == ("80.00 %", "recovered/gamma-0.95.safetensors")
    assert [row[:2] + row[3:6] for row in seeds[1:]] == [
        ["gamma (3 seeds)", "gamma", "0, 1, 2", "3", "80.10 ± 0.00 %"],
        ["gamma (3 seeds)", "gamma", "0, 1, 2", "3", "90.10 ± 0.00 %"],
    ]
    assert [row[-2:] for row in seeds[1:]] == [["77.00 ± 2.65 %", "-3.00 ± 2.65"], ["72.00 ± 2.65 %", "-8.00 ± 2.65"]]
    assert differing[1:] == [["recovery.epochs", "10", "10", "10", "3"]]
    assert "script" not in page.tags
    assert "default-src 'none'" in text
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|srcset|href)="([^"]*)"', text))
    assert "better networks (episodes 1 in gamma-s0, gamma-s1, gamma-s2 | 7 in o&lt;script&gt;;" in text


def pixels(png: bytes) -> np.ndarray:
    """Return <uint8>[height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def has_colour(png: bytes, colour: str) -> bool:
    return bool((pixels(png) == tuple(bytes.fromhex(colour[1:]))).all(axis=2).any())


def test_the_picture_is_written_with_a_colour_for_each_series(zeroout: Zeroout, tmp_path: Path) -> None:
    three_seeds(tmp_path)
    campaign(tmp_path / "_other $1$", [point(0.9, 0.5)], toml="[recovery]\nepochs = 3")
    folders = [path for path in sorted(tmp_path.iterdir()) if path.is_dir()]
    code, error, output = zeroout("compare", *folders, "--png", tmp_path / "c.png", "--json")
    assert (code, error.strip()) == (0, str(tmp_path / "c.png"))
    assert len(json.loads(output)["rows"]) == 7
    png = (tmp_path / "c.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert pixels(png).shape[1] >= 1000
    assert all(has_colour(png, colour) for colour in ("#D55E00", "#0072B2"))
    assert not has_colour(png, "#56B4E9")


def test_the_spread_over_seeds_and_other_baselines_show(tmp_path: Path) -> None:
    several = three_seeds(tmp_path)
    (series,) = over_seeds(several)
    still = [{**point, "test_accuracy": {**point["test_accuracy"], "sd": 0.0}} for point in series.points]
    drawn = comparison_image([series])
    assert drawn != comparison_image([Series(name=series.name, campaigns=series.campaigns, points=tuple(still))])
    other = read(
        campaign(tmp_path / "x", [], toml="[recovery]\nepochs = 3", baseline={**BASELINE, "test_accuracy": 0.7})
    )
    assert has_colour(comparison_image(over_seeds([*several, *other])), "#0072B2")  # a line of its own


def test_pictures_for_the_dark_and_for_phones(tmp_path: Path) -> None:
    series = over_seeds(three_seeds(tmp_path))
    image = pixels(comparison_image(series, form=Form(dark=True, narrow=True)))
    assert image.mean() < 80
    assert image.shape[1] < image.shape[0]


def test_many_campaigns_and_one_without_a_network_are_drawn(tmp_path: Path) -> None:
    (one,) = over_seeds(read(campaign(tmp_path / "a", [point(0.9, 0.7)])))
    (empty,) = over_seeds(read(campaign(tmp_path / "b", [])))
    assert pixels(comparison_image([empty])).std() > 0
    comparison_image([Series(name=f"campaign {n}", campaigns=one.campaigns, points=one.points) for n in range(30)])
