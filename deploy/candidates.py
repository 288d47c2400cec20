"""The best network of each group at each target, as the search leaves them in the folder for the recovery."""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from deploy.config import CampaignConfig
from deploy.folder import CampaignFolder, read_json, write_atomic, write_json
from deploy.frontier import frontier
from env.errors import UserError
from learner.replay.ledger import Candidate

__all__ = ["candidate_path", "keep_better", "missing", "require_candidates", "write_frontier"]

_log = logging.getLogger(__name__)


def candidate_path(folder: CampaignFolder, group: str, target: float) -> Path:
    """Where the best network of a group at a target is kept."""
    return folder.candidates / f"{group}-{target}.safetensors"


def keep_better(folder: CampaignFolder, candidates: Iterable[Candidate]) -> None:
    """Write each network whose slot in the folder holds none that is as good.

    They come from Redis, where others may write too: what is no network is left out, with a warning in the log.
    """
    for candidate in candidates:
        group, _, target = candidate.slot.partition("/")
        path = candidate_path(folder, group, float(target))
        path.parent.mkdir(exist_ok=True)
        facts = path.with_suffix(".json")
        kept = read_json(facts).get("score", -math.inf) if facts.is_file() and path.is_file() else -math.inf
        if not candidate.score > kept:
            continue
        facts_of_it = _facts(candidate)  # reads the whole network: not of those that stand in the folder already
        if facts_of_it is None:
            _log.warning("%s: what is stored is no network of a campaign, and left out", candidate.slot)
            continue
        write_atomic(path, candidate.payload)
        write_json(facts, {**facts_of_it, "score": candidate.score})


def _facts(candidate: Candidate) -> dict[str, Any] | None:
    """What is kept beside a network; None where that, or the network, is not what an actor writes."""
    try:
        load_tensors(candidate.payload)
        facts = json.loads(candidate.meta)
    except (SafetensorError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def missing(folder: CampaignFolder, config: CampaignConfig) -> Iterator[tuple[str, float]]:
    """The groups and targets without a network in the folder."""
    for group in config.search.groups:
        for target in config.episode.targets:
            if not candidate_path(folder, group, target).is_file():
                yield group, target


def require_candidates(folder: CampaignFolder, config: CampaignConfig) -> None:
    """UserError where no episode of a group reached a target: there is nothing to recover."""
    for group, target in missing(folder, config):
        raise UserError(
            f"target {target} of group {group}",
            expected="at least one episode that reached it",
            got="none",
            remedy="raise episode.max_steps, or lower episode.step_learning_rate if networks collapsed",
        )


def write_frontier(folder: CampaignFolder, config: CampaignConfig, records: Sequence[dict[str, Any]]) -> None:
    """Write frontier.json from all episodes that are recorded; whoever has them read need not read them again."""
    rows = frontier(records, config.episode.targets)
    write_json(folder.frontier_json, {"episodes_total": config.search.total, "targets": rows})
