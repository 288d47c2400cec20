"""Configuration: TOML to validated dataclasses and back."""

from pathlib import Path

import pytest

from deploy.config import CampaignConfig, dump, load, parse
from env.errors import UserError

CAMPAIGNS = sorted((Path(__file__).parents[2] / "deploy" / "campaigns").glob("*.toml"))


@pytest.mark.parametrize("path", CAMPAIGNS, ids=lambda path: path.stem)
def test_every_campaign_that_ships_is_valid_and_survives_a_round_trip(path: Path) -> None:
    config = load(path)
    assert parse(dump(config)) == config


def test_nothing_given_is_the_defaults() -> None:
    assert parse("") == CampaignConfig()
    assert (parse("").recovery.distillation, parse("").baseline.distillation) == (0.5, 0.0)
    assert parse("[recovery]\nepochs = 3").recovery.distillation == 0.5


def test_overrides_are_toml_values_or_plain_strings() -> None:
    config = parse(
        "", ["search.actors=5", "episode.targets=[0.8, 0.95]", "data.path=some/folder", "recovery.learning_rate=1"]
    )
    assert config.search.actors == 5
    assert config.episode.targets == (0.8, 0.95)
    assert config.data.path == "some/folder"
    assert config.recovery.learning_rate == 1.0


@pytest.mark.parametrize(
    ("text", "overrides", "what"),
    [
        ("sed = 1", [], "key sed"),
        ("[episode]\ntarget = 0.9", [], "key episode.target"),
        ("", ["search.actor=2"], "key search.actor"),
        ("seed = 1.5", [], "key seed"),
        ("[search]\nactors = true", [], "key search.actors"),
        ("[search]\nactors = 'two'", [], "key search.actors"),
        ("search = 3", [], "key search"),
        ("[episode]\ntargets = 0.9", [], "key episode.targets"),
        ("[episode]\ntargets = [1.0]", [], "episode.targets"),
        ("[episode]\ntargets = [0.0]", [], "episode.targets"),
        ("[episode]\ntargets = [0.9, 0.8]", [], "episode.targets"),
        ("[baseline]\nepochs = 0", [], "baseline.epochs"),
        ("[recovery]\nlearning_rate = -1", [], "recovery.learning_rate"),
        ("[replay]\nreplay_ratio = 0", [], "section [replay]"),
        ("[sequence]\nburn_in = 9", [], "sequence.burn_in"),
        ("[cluster]\nlease_s = 0", [], "cluster.lease_s"),
        ("[cluster]\ngpus_per_actor = -0.5", [], "cluster.gpus_per_actor"),
        ("", ["nonsense"], "--set"),
        ("", ["seed.x=1"], "key seed"),
        ("not toml", [], "config"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(text: str, overrides: list[str], what: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, overrides)
    assert caught.value.what == what
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


def test_an_unknown_key_is_answered_with_the_nearest_known_one() -> None:
    with pytest.raises(UserError, match=r"did you mean episode\.targets"):
        parse("[episode]\ntarget = [0.9]")


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a TOML file"):
        load(tmp_path / "none.toml")
