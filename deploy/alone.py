"""The second stage where one rule decides alone: its episodes are played in this process, without Ray and Redis."""

import copy
import time

from actors.deciders import decider, next_candidate
from actors.player import fresh_controller, ladder_of
from actors.records import candidates, episode_record
from actors.rollout import Rollout, StepReport, rollout
from actors.schedule import EpisodeOrder, order
from agents.policies import Policy, importance_of
from deploy.candidates import keep_better, require_candidates
from deploy.config import CampaignConfig
from deploy.controller_file import read_controller
from deploy.event_files import EventFiles
from deploy.folder import CampaignFolder
from deploy.like import widths_like
from deploy.prepare import Baseline, default_device
from deploy.progress import Progress
from env.compression import CompressionEnv
from env.data import Dataset
from env.recognizer import Recognizer

__all__ = ["play_alone"]


def play_alone(
    folder: CampaignFolder, config: CampaignConfig, dataset: Dataset, baseline: Baseline, progress: Progress
) -> None:
    """Play the rule's episodes that are not yet recorded, and keep the best network of each target."""
    progress.stage("search", f"{config.search.method}, {config.search.total} episode(s) in this process")
    recognizer = Recognizer(
        copy.deepcopy(baseline.start),
        dataset,
        config.data,
        measure=baseline.measure,
        precision=config.episode.precision,
        device=default_device(),
    )
    importance = importance_of(config.search.method)
    env = CompressionEnv(recognizer, config.episode, features=True, importance=importance, seed=config.seed)
    start, measure = read_controller(config.controller_start), baseline.measure.name
    like = None
    if config.search.like:
        like = widths_like(config.search.like, config.network, env.plan, baseline.start)
    controller = fresh_controller(config.controller, env.plan, measure, start=start, seed=config.seed).eval()
    records = folder.read_episodes()
    recorded = {record["id"] for record in records}
    with EventFiles(folder.tensorboard, records) as events:
        for episode in sorted(set(range(config.search.total)) - recorded):
            chosen = order(config.schedule, episode, seed=config.seed)
            started_s = time.perf_counter()
            offsets = next_candidate(
                chosen, folder.read_episodes, len(env.plan.layers), episodes=config.search.per_group
            )
            policy = decider(
                chosen,
                env.plan,
                measure,
                controller=controller,
                offsets=offsets,
                allocation=config.search.allocation,
                like=like,
            )
            played = _play(env, chosen, policy, config, progress)
            # networks first: a record says that its network is safe
            keep_better(folder, candidates(chosen, played, baseline.form))
            seconds = time.perf_counter() - started_s
            record = episode_record(chosen, played, actor="driver", seconds=seconds, offsets=offsets)
            folder.append_episode([record])
            events.episodes([record])
    require_candidates(folder, config)


def _play(
    env: CompressionEnv, chosen: EpisodeOrder, policy: Policy, config: CampaignConfig, progress: Progress
) -> Rollout:
    ladder = ladder_of(config.episode, env.plan, env.recognizer.measure)

    def show(now: StepReport) -> None:
        done = f"episode {chosen.episode + 1} of {config.search.total}, step {now.step} of {len(ladder)}"
        progress.note(f"{done}: {now.compression:.2%} removed, validation accuracy {now.accuracy:.4f} of a sample")

    return rollout(env, policy, ladder, seed=chosen.retraining_seed, on_step=show)
