"""A campaign of six tiny episodes, its ledger and its replay."""

import numpy as np
import pytest
import redis

from actors.player import Brief
from actors.schedule import ScheduleConfig
from agents.controller import ControllerConfig
from env.compact_file import NetworkForm, network_to_bytes
from env.compression import EpisodeConfig
from env.data import DataConfig, Dataset, load_dataset
from env.measure import Measure
from env.networks import NetworkConfig
from learner.learner import LearnerConfig
from learner.replay.ledger import Ledger
from learner.replay.replay import Replay, ReplayConfig
from learner.sequence import SequenceConfig

DATA = DataConfig(train_limit=100, validation_share=0.1)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset(DATA)


@pytest.fixture
def brief(redis_url: str, prefix: str) -> Brief:
    """A campaign of six tiny episodes: three of the search (a teacher's, then the Controller's), three of cem."""
    form = NetworkForm(network=NetworkConfig(width=0.25), channels=1, classes=10, image_size=8)
    network = form.build()
    return Brief(
        form=form,
        baseline=network_to_bytes(network, form),
        image_shape=(1, 8, 8),
        measure=Measure("parameters", sum(parameter.numel() for parameter in network.parameters())),
        data=DATA,
        episode=EpisodeConfig(
            targets=(0.5, 0.8),
            waypoints=3,
            batch_size=16,
            step_minibatches=1,
            recovery_minibatches=1,
            step_images=40,
            score_images=32,
        ),
        controller=ControllerConfig(hidden_size=5),
        sequences=SequenceConfig(burn_in=1, unroll_length=2, sequence_period=1),
        learner=LearnerConfig(),
        replay=ReplayConfig(min_sequences=1),
        schedule=ScheduleConfig(episodes=3, actors=2, teacher_share=0.34, controls=("cem",)),
        seed=3,
        campaign="tiny-0000",
        redis_url=redis_url,
        prefix=prefix,
        lease_s=60.0,
    )


@pytest.fixture
def ledger(client: redis.Redis, brief: Brief) -> Ledger:
    opened = Ledger(client, brief.prefix)
    opened.open("test", brief.schedule.total)
    return opened


@pytest.fixture
def replay(client: redis.Redis, brief: Brief) -> Replay:
    return Replay(client, brief.prefix, brief.replay, np.random.default_rng(0))
