"""The best networks of a search, as they come from Redis into the folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from deploy.candidates import candidate_path, keep_better
from deploy.config import CampaignConfig, dump
from deploy.folder import CampaignFolder
from learner.replay.ledger import Candidate

NETWORK = save({"weight": torch.ones(3)})


@pytest.fixture
def campaign(tmp_path: Path) -> CampaignFolder:
    return CampaignFolder.create(tmp_path / "out", dump(CampaignConfig()))


def test_a_better_network_replaces_the_one_that_is_kept(campaign: CampaignFolder) -> None:
    better = save({"weight": torch.full((3,), 2.0)})
    for score, payload, kept in ((-1.0, NETWORK, NETWORK), (-2.0, better, NETWORK), (-0.5, better, better)):
        keep_better(campaign, [Candidate("search/0.9", score, payload, json.dumps({"episode": 4}))])
        path = candidate_path(campaign, "search", 0.9)
        assert path.read_bytes() == kept
    assert json.loads(path.with_suffix(".json").read_text()) == {"episode": 4, "score": -0.5}


@pytest.mark.parametrize(("payload", "meta"), [(b"garbage", "{}"), (b"", "{}"), (NETWORK, "{"), (NETWORK, "[]")])
def test_what_is_no_network_is_left_out_and_said_so(
    campaign: CampaignFolder, caplog: pytest.LogCaptureFixture, payload: bytes, meta: str
) -> None:
    keep_better(campaign, [Candidate("search/0.9", 1.0, payload, meta)])
    assert not candidate_path(campaign, "search", 0.9).exists()
    assert "search/0.9" in caplog.text
