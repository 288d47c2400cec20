"""Between the baseline and the search: filter replacement, the source's first method, and its controls.

Its products are `baseline/replaced.safetensors` and `replaced.json`. Compression and loss are still counted against the
baseline: what replacement is worth shows in what is left after pruning.
"""

import dataclasses
import logging
from dataclasses import asdict
from pathlib import Path

from torch import nn

from deploy.config import CampaignConfig
from deploy.folder import CampaignFolder, read_json, write_atomic, write_json
from deploy.prepare import Baseline, default_device, train_shown
from deploy.progress import Progress
from env.compact_file import network_from_file, network_to_bytes
from env.copies import duplicate
from env.data import Dataset
from env.errors import UserError, first_line
from env.recognizer import Recognizer
from env.replacement import treat
from env.retraining import Metrics, evaluate
from env.seeds import derive_seed

__all__ = ["FACTS", "replaced"]

FACTS = "replaced.json"  # in `baseline/`
_LOG = logging.getLogger(__name__)


def replaced(
    folder: CampaignFolder, config: CampaignConfig, dataset: Dataset, baseline: Baseline, progress: Progress
) -> Baseline:
    """The baseline with its weakest filters treated and trained on, as `config.replacement` says; or as it was."""
    if not config.replacement.how:
        return baseline
    model, facts = folder.baseline / "replaced.safetensors", folder.baseline / FACTS
    if not _made_so(model, facts, config):
        network = duplicate(baseline.network).to(default_device())
        found = _replace(network, folder, config, dataset.to(default_device()), baseline, progress)
        write_atomic(model, network_to_bytes(network, baseline.form))
        write_json(facts, {**asdict(config.replacement), **{name: asdict(metrics) for name, metrics in found.items()}})
    accuracy = read_json(facts)["validation"]["accuracy"]
    progress.note(f"after replacement {config.replacement.how}: validation accuracy {accuracy:.4f}")
    return dataclasses.replace(baseline, replaced=network_from_file(str(model)))


def _made_so(model: Path, facts: Path, config: CampaignConfig) -> bool:
    """Whether the product is there, whole, and made with these settings; else it is made anew, which is said."""
    if not (model.is_file() and facts.is_file()):
        return False
    try:
        network_from_file(str(model))
        found = read_json(facts)
        problem = "" if asdict(config.replacement).items() <= found.items() else "was made with other settings"
        float(found["validation"]["accuracy"])
    except (UserError, KeyError, TypeError, ValueError) as error:
        problem = f"cannot be read ({first_line(error)})"
    if problem:
        _LOG.warning("%s %s: the replacement is made anew", model, problem)
    return not problem


def _replace(
    network: nn.Module,
    folder: CampaignFolder,
    config: CampaignConfig,
    dataset: Dataset,
    baseline: Baseline,
    progress: Progress,
) -> dict[str, Metrics]:
    """Treat and train `network` in place; returns how it did on validation right after the one and the other."""
    replacement, form, precision = config.replacement, baseline.form, config.replacement_training.precision
    progress.stage("prepare", f"replacement {replacement.how}, {replacement.share:.0%} of each layer")
    recognizer = Recognizer(
        network, dataset, config.data, measure=baseline.measure, precision=precision, device=default_device()
    )
    fresh = form.build(seed=derive_seed(config.seed, "re-initialised"))
    treat(recognizer, replacement, fresh=fresh, seed=derive_seed(config.seed, "replacement"))
    at_once = evaluate(network, dataset.validation, dataset.mean, dataset.std, precision=precision)
    train_shown(
        network,
        dataset,
        config,
        config.replacement_training,
        name="replacement",
        section="replacement_training",
        seed=derive_seed(config.seed, "replacement training"),  # the same for all treatments
        checkpoint=folder.baseline / "replacement.pt",
        folder=folder,
        progress=progress,
        teacher=baseline.network.to(default_device()) if config.replacement_training.distillation else None,
    )
    trained = evaluate(network, dataset.validation, dataset.mean, dataset.std, precision=precision)
    return {"validation_at_once": at_once, "validation": trained}
