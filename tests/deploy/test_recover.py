"""Recovery: the chosen networks are retrained, with the baseline as teacher where that is asked."""

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from deploy.config import dump, parse
from deploy.folder import CampaignFolder
from deploy.prepare import preflight, prepare
from deploy.progress import PlainProgress
from deploy.recover import Recovery
from env.channels import ChannelPlan

CAMPAIGN = """
[network]
width = 0.25
[data]
validation_share = 0.2
[baseline]
epochs = 3
batch_size = 64
[episode]
targets = [0.5]
[recovery]
epochs = 3
batch_size = 64
learning_rate = 0.05
"""


def test_the_baseline_teaches_the_compact_network(tmp_path: Path) -> None:
    config = parse(CAMPAIGN)
    folder = CampaignFolder.create(tmp_path / "out", dump(config))
    dataset = preflight(config)
    # every label of the recovery is wrong: what is right can only be learnt from the teacher
    wrong = replace(dataset, train=replace(dataset.train, labels=torch.zeros_like(dataset.train.labels)))
    accuracies = []
    with (tmp_path / "log").open("w") as log:
        progress = PlainProgress(Console(file=log))
        baseline = prepare(folder, config, dataset, progress)
        plan = ChannelPlan(baseline.network, torch.zeros(1, *dataset.image_shape))
        for share in (0.0, 1.0):
            taught = replace(config, recovery=replace(config.recovery, distillation=share))
            half = plan.compact(baseline.network, torch.arange(plan.units) % 2 == 0)
            model = folder.recovered / f"{share}.safetensors"
            origin = {"target": 0.5, "group": "search", "policy": "taylor", "episode": 0}
            facts = Recovery(folder, taught, wrong, baseline, progress).recovered(half, model, origin)
            accuracies.append(facts["validation"]["accuracy"])
    assert accuracies[0] < 0.2
    assert accuracies[1] > 0.8
    assert not any(module.training for module in baseline.network.modules())
