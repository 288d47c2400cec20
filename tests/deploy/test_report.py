"""The report says what result.json says, escapes what it shows, and is honest about who won."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deploy import charts
from deploy.folder import CampaignFolder, read_json, write_json
from deploy.frontier import Comparison
from deploy.report import comparison_sentence, verdict_sentence, write_report
from env.errors import UserError

EVIL = '<script>alert("x")</script>&'


@pytest.fixture(autouse=True)
def _pictures_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirteen pictures a report take seconds; test_charts.py and test_report_in_browser.py look at real ones."""
    dot = io.BytesIO()
    Image.new("1", (1, 1)).save(dot, "PNG")
    monkeypatch.setattr(charts, "png", lambda figure, form: dot.getvalue())


@pytest.fixture
def campaign(tmp_path: Path) -> CampaignFolder:
    folder = CampaignFolder.create(tmp_path / "night & day", f"name = '{EVIL}'\n[search]\nepisodes = 12\n")
    folder.append_episode([record(id, group) for id, group in enumerate(("search", "taylor", "random") * 6)])
    write_json(folder.versions_json, {"torch": "2.13.0", "commit": None})
    return folder


@pytest.fixture
def finished(campaign: CampaignFolder) -> CampaignFolder:
    write_json(campaign.result_json, RESULT)
    return campaign


def record(id: int, group: str) -> dict[str, Any]:
    loss = {"search": 1.30, "taylor": 1.40, "random": 1.60}[group] + 0.01 * (id % 7)
    targets = [
        {"target": t, "compression": t + 0.0004, "parameters": 9, "macs": 9, "accuracy": 1 - loss / 3,
         "cross_entropy": loss, "keep_bits": "AA=="}
        for t in (0.9, 0.95)
    ]  # fmt: skip
    return {
        "id": id, "group": group, "actor": "a", "policy": f"{group}{EVIL}", "epsilon": 0.1, "sigma": 0.0,
        "seed": id, "steps": 8, "seconds": 12.5, "weights_version": 1, "return": -loss,
        "curve": [[0.0, 0.81], [0.9, 0.6], [0.95, 0.5]], "targets": targets,
    }  # fmt: skip


RESULT: dict[str, Any] = {
    "baseline": {"val_accuracy": 0.8184, "test_accuracy": 0.8131, "parameters": 921_345, "macs": 19_876_543},
    "points": [
        {
            "target": 0.9, "compression": 0.90042, "parameters": 91_757, "macs": 4_321_987,
            "val_accuracy": 0.7852, "test_accuracy": 0.7717, "policy": f"controller{EVIL}", "group": "search",
            "episode": 3, "model": "export/90.safetensors",
        },
        {
            "target": 0.95, "compression": 0.95017, "parameters": 45_911, "macs": 2_345_678,
            "val_accuracy": 0.7321, "test_accuracy": 0.8201, "policy": "taylor", "group": "taylor",
            "episode": 4, "model": "export/95.safetensors",
        },
    ],
    "comparison": [
        {
            "target": 0.9, "compression": 0.90011, "parameters": 92_000, "macs": 4_400_000,
            "val_accuracy": 0.7744, "test_accuracy": 0.7633, "policy": "taylor", "group": "taylor",
        }
    ],
    "episodes": 18, "seconds": 5400.0, "seed": 7,
}  # fmt: skip


class Tables(HTMLParser):
    """Collects the tables as lists of rows of cells, and all tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[str] = []
        self._cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = True
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data


def test_the_numbers_are_those_of_result_json(finished: CampaignFolder) -> None:
    page = Tables(write_report(finished).read_text())
    header, baseline, *points = page.tables[0]
    result = read_json(finished.result_json)
    assert baseline[:7] == ["baseline", "", "921,345", "19,876,543", "81.84 %", "", "81.31 %"]
    assert len(points) == len(result["points"])
    for cells, point in zip(points, result["points"], strict=True):
        row = dict(zip(header, cells, strict=True))  # the second "change" is the test's
        assert float(row["target"].strip(" %")) == pytest.approx(100 * point["target"], abs=0.05)
        assert float(row["parameters removed"].strip(" %")) == pytest.approx(100 * point["compression"], abs=0.005)
        assert int(row["parameters"].replace(",", "")) == point["parameters"]
        assert int(row["MACs"].replace(",", "")) == point["macs"]
        assert float(row["validation"].strip(" %")) == pytest.approx(100 * point["val_accuracy"], abs=0.005)
        assert float(row["test"].strip(" %")) == pytest.approx(100 * point["test_accuracy"], abs=0.005)
        assert float(row["change"]) == pytest.approx(100 * (point["test_accuracy"] - 0.8131), abs=0.005)
        assert row["model"] == point["model"]
    assert [cells[5] for cells in points] == ["-3.32", "-8.63"]
    assert [cells[7] for cells in points] == ["-4.14", "+0.70"]


def test_measure_and_limit_are_named(finished: CampaignFolder) -> None:
    result = read_json(finished.result_json)
    write_json(finished.result_json, {**result, "measure": "macs", "max_drop": 1.5, "limit": "95 % <loses> 2"})
    page = write_report(finished).read_text()
    assert Tables(page).tables[0][0][1] == "MACs removed"
    assert "At most 1.5 points were to be lost on validation: 95 % &lt;loses&gt; 2." in page


def test_a_rule_alone_is_compared_with_nobody(finished: CampaignFolder) -> None:
    lines = finished.episodes_jsonl.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    alone = [record for record in records if record["group"] == "taylor"]
    finished.episodes_jsonl.write_text("".join(json.dumps(record) + "\n" for record in alone))
    page = write_report(finished).read_text()
    assert alone
    assert "Who chose better?" not in page
    assert "Result" in page


def test_the_controls_recovered_alike_stand_beside_the_result(finished: CampaignFolder) -> None:
    page = Tables(write_report(finished).read_text())
    rows = next(table for table in page.tables if table[1][0] == "result")[1:]
    assert [(row[0], row[1]) for row in rows] == [
        ("result", "90.0 %"),
        ("beside it", "90.0 %"),
        ("result", "95.0 %"),
    ]
    assert rows[1][2:] == ["taylor", "77.44 %", "-4.40", "76.33 %", "-4.98"]


def test_every_group_stands_in_the_table_of_each_target(finished: CampaignFolder) -> None:
    page = Tables(write_report(finished).read_text())
    tables = [table for table in page.tables if table[0][0] == "group"]
    assert len(tables) == 2
    assert [[row[0], row[1]] for row in tables[0][1:]] == [["search", "6"], ["taylor", "6"], ["random", "6"]]
    assert tables[0][1][2] == "1.300"


def test_the_report_needs_no_other_file_and_no_network(finished: CampaignFolder) -> None:
    text = write_report(finished).read_text()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    links = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert len(links) == 1 + 3 * 4  # an empty icon, and three pictures in light and dark, for desk and phone
    assert links.pop(0) == "data:,"
    for link in links:
        kind, data = link.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert finished.frontier_png.read_bytes().startswith(b"\x89PNG")


def test_what_was_kept_of_each_layer_is_shown_where_it_was_exported(finished: CampaignFolder) -> None:
    assert "layer by layer" not in write_report(finished).read_text()
    layers = [
        {"name": f"conv{EVIL}", "modules": [], "before": 6, "after": 3, "kept": [0, 1, 5]},
        {"name": "later", "modules": [], "before": 7, "after": 2, "kept": None},
    ]
    finished.export.mkdir()
    write_json(finished.export / "0.95.json", {"layers": layers})
    text = write_report(finished).read_text()
    table = next(table for table in Tables(text).tables if table[0][0] == "layer")
    assert [row[:3] for row in table[1:]] == [[f"conv{EVIL}", "3 of 6", "50 %"], ["later", "2 of 7", "29 %"]]
    assert "95.0 % removed: 5 of 13 filters kept" in text
    assert 'd="M0 0h2v1h-2zM5 0h1v1h-1z"' in text
    assert 'd="M0 0h2v1h-2z"' in text  # nobody knows which two: the first


def test_throughput_stands_by_actor(finished: CampaignFolder) -> None:
    page = Tables(write_report(finished).read_text())
    table = next(table for table in page.tables if table[0][0] == "actor")
    assert table[1:] == [["a", "18", "144", "4 min", "4.8", "38.4"]]  # episodes of 8 steps and 12.5 s


def test_where_the_time_went_is_said(campaign: CampaignFolder) -> None:
    campaign.append_episode([record(99, "search") | {"phases": {"retrain": 6.0, "score": 2.0}}])
    assert "Where the time went: retrain 75 %, score 25 %." in write_report(campaign).read_text()


def test_published_points_are_shown_only_where_they_can_be_compared(finished: CampaignFolder) -> None:
    assert "No published points are marked" in write_report(finished).read_text()
    finished.campaign_toml.write_text("[network]\nname = 'vgg16'\n[data]\nsource = 'cifar10'\n")
    text = write_report(finished).read_text()
    assert "No published points are marked" not in text
    table = next(table for table in Tables(text).tables if table[0][0] == "published by")
    assert ["the source (2022)", "92.00 %", "92.45 %", "-1.07", ""] in table


def test_a_broken_configuration_is_named(finished: CampaignFolder) -> None:
    finished.campaign_toml.write_text("[network")
    with pytest.raises(UserError, match=r"campaign\.toml"):
        write_report(finished)


def test_everything_shown_is_escaped(finished: CampaignFolder) -> None:
    text = write_report(finished).read_text()
    assert "script" not in Tables(text).tags
    assert EVIL not in text
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;" in text
    assert "<title>night &amp; day · Zeroout</title>" in text


def test_the_configuration_and_versions_are_shown(finished: CampaignFolder) -> None:
    text = write_report(finished).read_text()
    assert "episodes = 12" in text
    assert "2.13.0" in text
    assert "not known" in text


def test_a_finished_campaign_is_not_called_unfinished(finished: CampaignFolder) -> None:
    text = write_report(finished).read_text()
    assert "not finished" not in text
    assert "18 episodes, 1 h 30 min, seed 7" in text


def test_an_unfinished_campaign_says_so(campaign: CampaignFolder) -> None:
    text = write_report(campaign).read_text()
    assert "This campaign is not finished" in text
    assert "stage: search" in text
    assert "No network has been recovered" in text


def test_a_campaign_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    text = write_report(CampaignFolder.create(tmp_path / "new", "seed = 1\n").path).read_text()
    assert "stage: prepare" in text
    assert "nothing to compare yet" in text


def test_a_folder_that_is_no_campaign_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"campaign\.toml"):
        write_report(tmp_path)


def test_a_broken_result_is_named(finished: CampaignFolder) -> None:
    finished.result_json.write_text("{")
    with pytest.raises(UserError, match=r"result\.json"):
        write_report(finished)


def comparison(ahead: float, noise: float | None = 0.05, target: float = 0.9) -> Comparison:
    best = {"search": 1.4 - ahead, "taylor": 1.4, "random": 1.6}
    return Comparison(
        target=target, episodes=20, best=best, policy="controller", rival="taylor", ahead=ahead, noise=noise
    )


@pytest.mark.parametrize(
    ("ahead", "noise", "words"),
    [
        (0.2, 0.05, "the Controller's search won against Taylor"),
        (-0.2, 0.05, "the Controller's search lost to Taylor"),
        (0.06, 0.05, "lie within noise"),
        (-0.06, 0.05, "lie within noise"),
        (0.2, None, "too few episodes"),
    ],
)
def test_the_sentence_on_one_target_is_honest(ahead: float, noise: float | None, words: str) -> None:
    sentence = comparison_sentence(comparison(ahead, noise))
    assert words in sentence
    assert sentence.startswith("At 90.0 % removed, the best of 20 episodes each")
    assert f"{1.4 - ahead:.3f} against 1.400" in sentence
    assert sentence == verdict_sentence([comparison(ahead, noise)])


def test_the_sentence_names_the_policy_that_chose_the_searchs_best() -> None:
    assert "(the search's was chosen by controller)" in comparison_sentence(comparison(0.2))


def test_the_sentence_on_several_targets_counts_victories_and_defeats() -> None:
    sentence = verdict_sentence([comparison(0.2), comparison(-0.2, target=0.95), comparison(-0.3, target=0.97)])
    assert sentence == (
        "Of 3 compression targets, each at an equal number of episodes, the Controller's search beat the best "
        "control at 1, lost to it at 2 and lay within noise of it at 0."
    )


def test_without_episodes_nobody_won() -> None:
    assert "nothing to compare yet" in verdict_sentence([])
