"""The third stage: the best network of each group is retrained alike, judged on validation, then once on test.

Its products are `recovered/GROUP-TARGET.safetensors` with a `.json` beside each, and result.json.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agents.ladder import TOLERANCE
from deploy.agreement import agreement, importances, keep_mask_of
from deploy.candidates import candidate_path
from deploy.config import CampaignConfig
from deploy.folder import CampaignFolder, read_json, write_atomic, write_json
from deploy.frontier import PEERS
from deploy.peers import left_out
from deploy.prepare import Baseline, default_device, train_shown
from deploy.progress import Progress
from deploy.recover_on_ray import Retraining, may_share, retrained_together
from deploy.replace import FACTS
from env.channels import ChannelPlan, costs_of
from env.compact_file import network_from_file, network_to_bytes
from env.data import Dataset
from env.errors import first_line
from env.retraining import Metrics, evaluate
from env.seeds import derive_seed
from env.splits import Split

__all__ = ["LIMIT", "Recovery"]

_PEERS_STEP = "the least that this peer could take and reach the target"
LIMIT = "limit.json"  # in `recovered/`: which network deploy/limit.py found, and why


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A network to recover, where it is to be kept, and where it came from."""

    network: nn.Module
    model: Path
    origin: Mapping[str, Any]


@dataclass(frozen=True)
class Recovery:
    """The third stage of one campaign; `dataset` is on the device where networks are retrained."""

    folder: CampaignFolder
    config: CampaignConfig
    dataset: Dataset
    baseline: Baseline
    progress: Progress

    def run(self) -> None:
        """Recover the best network of every group and target, several at once where the campaign's Ray has GPUs."""
        targets = self.config.episode.targets
        for together in [(target,) for target in targets] if self.config.has_limit else [targets]:
            if self.config.has_limit and self._nothing_holds():
                return  # what loses too much needs no further recoveries
            wanted = [(group, target) for target in together for group in self.config.groups]
            missing = [self._candidate(*place) for place in wanted if self._is_missing(*place)]
            if len(missing) > 1 and may_share(self.config):
                self._recover_together(missing)
            for each in missing:
                self.recovered(each.network, each.model, each.origin)

    def recovered(self, network: nn.Module, model: Path, origin: Mapping[str, Any]) -> dict[str, Any]:
        """Retrain `network` as the configuration says, judge it on validation, and keep it as `model`.

        Returns what the `.json` beside it holds: `origin` (with "group" and "target"), costs, compression and
        validation. What is there already is read, not made again.
        """
        if _complete(model):
            facts: dict[str, Any] = read_json(model.with_suffix(".json"))
            return facts
        asked = self._retraining(network, model, origin)
        recovery, device = self.config.recovery, default_device()
        self.progress.stage("recover", f"{asked.name}, {recovery.epochs} epochs")
        train_shown(
            network.to(device),
            self.dataset,
            self.config,
            recovery,
            name=asked.name,
            section="recovery",
            seed=asked.seed,
            teacher=self._teacher.to(device) if self._teacher else None,
            checkpoint=asked.checkpoint,
            folder=self.folder,
            progress=self.progress,
        )
        return self._keep(network, model, origin)

    def _recover_together(self, missing: Sequence[_Candidate]) -> None:
        """Recover as many of these as the campaign's Ray can, side by side."""
        asked = [self._retraining(each.network, each.model, each.origin) for each in missing]
        made = retrained_together(
            asked,
            folder=self.folder,
            config=self.config,
            dataset=self.dataset,
            form=self.baseline.form,
            teacher=self._teacher,
            progress=self.progress,
        )
        of = {retraining.checkpoint: each for retraining, each in zip(asked, missing, strict=True)}
        with contextlib.closing(made):
            for retraining, network in made:
                each = of[retraining.checkpoint]
                facts = self._keep(network.to(default_device()), each.model, each.origin)
                self.progress.note(f"{retraining.name}: recovered, accuracy {facts['validation']['accuracy']:.2%}")

    def _is_missing(self, group: str, target: float) -> bool:
        """Whether a network is not recovered yet; a peer may have made none to recover (deploy/peers.py)."""
        there = group not in self.config.peers or _complete(candidate_path(self.folder, group, target))
        return there and not _complete(self._model(group, target))

    def _candidate(self, group: str, target: float) -> _Candidate:
        path = candidate_path(self.folder, group, target)
        origin = {"target": target, "group": group, **read_json(path.with_suffix(".json"))}
        return _Candidate(network=network_from_file(str(path)), model=self._model(group, target), origin=origin)

    @property
    def _teacher(self) -> nn.Module | None:
        return self.baseline.network if self.config.recovery.distillation else None

    def _retraining(self, network: nn.Module, model: Path, origin: Mapping[str, Any]) -> Retraining:
        model.parent.mkdir(exist_ok=True)
        return Retraining(
            name=f"{origin['group']} {origin['target']:.2%}",
            network=network,
            seed=derive_seed(self.config.seed, "final recovery", str(origin["target"])),  # the same for all groups
            checkpoint=model.with_suffix(".pt"),
        )

    def _keep(self, network: nn.Module, model: Path, origin: Mapping[str, Any]) -> dict[str, Any]:
        """Judge a network that is recovered, on the device, and write it with what is known of it."""
        measure, costs = self.baseline.measure, self._costs(network)
        facts = {
            **origin,
            "compression": 1.0 - costs[measure.name] / measure.given,
            **costs,
            "validation": asdict(self._judge(network, self.dataset.validation)),
        }
        write_atomic(model, network_to_bytes(network, self.baseline.form))
        write_json(model.with_suffix(".json"), facts)
        return facts

    def facts(self) -> list[dict[str, Any]]:
        """What is known of the groups' recovered networks, rising by target."""
        models = (self._model(group, target) for target in self.config.episode.targets for group in self.config.groups)
        return [read_json(model.with_suffix(".json")) for model in models if _complete(model)]

    def drop(self, facts: Mapping[str, Any]) -> float:
        """Points of validation accuracy that a recovered network lost against the baseline."""
        return 100.0 * (self.baseline.validation.accuracy - float(facts["validation"]["accuracy"]))

    def _nothing_holds(self) -> bool:
        """Whether the highest target that was recovered loses too much in every group."""
        facts = self.facts()
        return bool(facts) and all(
            self.drop(row) > self.config.max_drop for row in facts if row["target"] == facts[-1]["target"]
        )

    def _model(self, group: str, target: float) -> Path:
        return self.folder.recovered / f"{group}-{target}.safetensors"

    def _judge(self, network: nn.Module, split: Split) -> Metrics:
        dataset, precision = self.dataset, self.config.recovery.precision
        return evaluate(network, split, dataset.mean, dataset.std, precision=precision)

    def _costs(self, network: nn.Module) -> dict[str, int]:
        """Parameters, MACs and bytes, counted on the compact network itself."""
        example = torch.zeros(1, *self.dataset.image_shape, device=next(network.parameters()).device)
        return costs_of(network, example)

    def result(self) -> dict[str, Any]:
        """Choose by validation, open the test split once, write result.json; an existing one is left as it is."""
        if self.folder.result_json.is_file():
            result: dict[str, Any] = read_json(self.folder.result_json)
            return result
        self.progress.stage("recover", "the test split, once")
        records = self.folder.read_episodes()
        compared = [self.point(self._model(facts["group"], facts["target"])) for facts in self.facts()]
        result = {
            "baseline": self.as_given(),
            **self._transfer(),
            **self._replacement(),
            "measure": self.baseline.measure.name,
            **self._chosen(compared),
            "comparison": compared,
            **({"left_out": missing} if (missing := left_out(self.folder, self.config)) else {}),
            "episodes": len(records),
            "seconds": round(sum(record["seconds"] for record in records), 1),
            "seed": self.config.seed,
        }
        self._compare_with_importances(result["points"], records)
        write_json(self.folder.result_json, result)
        return result

    def as_given(self) -> dict[str, Any]:
        """The baseline's row of result.json; opens the test split."""
        test = self._judge(self.baseline.network.to(default_device()), self.dataset.test)
        accuracies = {"val_accuracy": self.baseline.validation.accuracy, "test_accuracy": test.accuracy}
        return {**accuracies, **self.baseline.given}

    def _compare_with_importances(self, points: list[dict[str, Any]], records: Sequence[Mapping[str, Any]]) -> None:
        """Add to each point how far the importances agree with what was kept, where its mask is known.

        It is there for people alone, so whatever goes wrong with it (somebody's network may hold anything) is noted.
        """
        try:
            plan, scores = importances(self.config, self.dataset, self.baseline)
        except Exception as error:
            self.progress.note(f"the importances cannot be compared with what was kept: {first_line(error)}")
            return
        for point in points:
            keep_mask = keep_mask_of(records, point, plan.units)
            if keep_mask is not None:
                point["agreement"] = agreement(plan, keep_mask, scores)

    def _transfer(self) -> dict[str, Any]:
        """How the baseline came to be where it was moved to these classes, and its size; nothing where it was not."""
        if not self.config.transfer.classes:
            return {}
        facts, measure = read_json(self.folder.baseline / "baseline.json")["transfer"], self.baseline.measure
        keys = ("classes", "how", "share", "importance", "parameters", "macs")
        removed = 1.0 - facts[measure.name] / measure.given
        return {"transfer": {**{key: facts[key] for key in keys}, "compression": removed}}

    def _replacement(self) -> dict[str, Any]:
        """What filter replacement made of the baseline before anything was pruned; nothing where there was none."""
        if self.baseline.replaced is None:
            return {}
        test = self._judge(self.baseline.replaced.to(default_device()), self.dataset.test)
        config, facts = self.config.replacement, read_json(self.folder.baseline / FACTS)
        accuracies = {"val_accuracy": facts["validation"]["accuracy"], "test_accuracy": test.accuracy}
        return {"replacement": {"how": config.how, "share": config.share, **accuracies}}

    def _chosen(self, compared: list[dict[str, Any]]) -> dict[str, Any]:
        """The best point of each target; with max_drop the one network that was looked for, and why it is that."""
        if self.config.has_limit:
            limit = read_json(self.folder.recovered / LIMIT)
            points = [self.point(self.folder.path / limit["model"])] if limit["model"] else []
            return {"points": points, "max_drop": self.config.max_drop, "limit": limit["reason"]}
        points = [
            max((p for p in compared if p["target"] == target), key=lambda point: float(point["val_accuracy"]))
            for target in self.config.episode.targets
        ]
        return {"points": points}

    def point(self, model: Path) -> dict[str, Any]:
        """A row of result.json."""
        facts = read_json(model.with_suffix(".json"))
        network = network_from_file(str(model)).to(default_device())
        keys = ("target", "group", "policy", "episode", "compression", "parameters", "macs", "bytes")
        point = {
            **{key: facts[key] for key in keys},
            "policy": self._named(str(facts["policy"])),
            "val_accuracy": facts["validation"]["accuracy"],
            "test_accuracy": self._judge(network, self.dataset.test).accuracy,
            "model": str(model.relative_to(self.folder.path)),
        }
        if abs(point["compression"] - point["target"]) > point["target"] * TOLERANCE and "probe" not in facts:
            is_peer = facts["group"] in PEERS
            point["why_not_exact"] = _PEERS_STEP if is_peer else self._why_not_exact(network)
        return point

    def _named(self, policy: str) -> str:
        """Who chose the filters, and what was done to them before: all that tells a method from others."""
        before = []
        if self.config.transfer.classes:
            before.append(f"transfer, {self.config.transfer.how}")
        if self.config.replacement.how:
            before.append(f"replacement {self.config.replacement.how}")
        return f"{policy} after {' and '.join(before)}" if before else policy

    def _why_not_exact(self, network: nn.Module) -> str:
        """What a single filter of the compact network weighs: targets between two such steps cannot be met."""
        plan = ChannelPlan(network.cpu(), torch.zeros(1, *self.dataset.image_shape))
        measure, whole = self.baseline.measure, plan.widths
        less = whole - torch.eye(len(whole), dtype=torch.int64)
        shares = measure.compression(plan, less) - measure.compression(plan, whole)
        return (
            f"no exchange of filters that was tried in the last step came nearer; at this size one filter is "
            f"{float(shares.min()):.2%} to {float(shares.max()):.2%} of the {measure.name}"
        )


def _complete(model: Path) -> bool:
    return model.is_file() and model.with_suffix(".json").is_file()
