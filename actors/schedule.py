"""Who plays which episode, and how: a pure function of the episode's number.

A campaign is one or more groups of equally many episodes: `search`, where the Controller learns, and after it the
controls at the same budget (mission.md). Nothing here is remembered by a process, so any actor may play any episode.
"""

import math
from dataclasses import dataclass

from agents.policies import ALLOCATIONS, HEURISTICS, SCORING
from env.errors import UserError
from env.seeds import derive_seed

__all__ = [
    "CONTROLS",
    "METHODS",
    "TAUGHT_SIGMA",
    "UNTAUGHT_SIGMA",
    "EpisodeOrder",
    "ScheduleConfig",
    "epsilon_ladder",
    "order",
]

#: Groups that a campaign can compare the Controller with.
CONTROLS = ("random", "taylor", "balanced", "balanced-l1", "gamma", "hrank", "fpgm", "l2", "cem", "untrained")

#: How far a Controller explores that has been taught before.
TAUGHT_SIGMA = 0.3
#: How far one that begins with nothing does.
UNTAUGHT_SIGMA = 0.8

#: Who can decide in a campaign: the Controller that learns, or one of the others alone, without learner and replay.
METHODS = (
    "controller", "taylor", "balanced", "balanced-l1", "gamma", "uniform-l1", "hrank", "fpgm", "l2", "random", "cem",
    "untrained",
)  # fmt: skip

#: The teachers' first round; later rounds add Taylor with random layer offsets, since these repeat themselves exactly.
_TEACHERS = ("taylor", "gamma", "uniform-l1", "random-allocation")
_LATER_TEACHERS = ("taylor-offsets", "random-allocation")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How many episodes are played, and by whom."""

    method: str = "controller"  # of METHODS; a rule other than it plays in the driver, without Ray and Redis
    allocation: str = ""  # of a method that scores filters: "global" | "uniform" | "balanced"; "" is its usual one
    # Instead of it, a compact network's file: of each layer stays as much as is left of it there, or in proportion.
    like: str = ""
    episodes: int = 0  # per group; 0 is the source's rule, twice the number of actors (and one for a rule alone)
    actors: int = 2
    # Of the episodes, at the start, played by heuristics; 0, as the Controller's own first rule is the best of them
    # (trial 8 of the search log).
    teacher_share: float = 0.0
    teacher_rules: tuple[str, ...] = _TEACHERS  # their first round, of agents.policies.HEURISTICS
    # How far an episode's layer offsets (natural-log units) and its taste for one score or another stray; falls to a
    # quarter over the campaign. -1 is 0.8, or 0.3 in a campaign whose Controller has been taught (trial 19).
    sigma: float = -1.0
    controls: tuple[str, ...] = ()  # of CONTROLS; each plays as many episodes as the Controller's group
    # R2D2's ladder: base ** (1 + alpha i / (actors - 1)); the paper's base is 0.4. 0, as the layers' offsets explore
    # shapes (`sigma`), and random filters among them would only be noise.
    epsilon_base: float = 0.0
    epsilon_alpha: float = 7.0
    # Steps between two snapshots of an episode in flight, from which another actor goes on where its own dies; each
    # target reached makes one too, for the recovery there is dear. 0 = never. A rule alone makes none.
    snapshot_period: int = 8

    def __post_init__(self) -> None:
        """Check every value; raises UserError."""
        for name, floor in {"episodes": 0, "actors": 1, "snapshot_period": 0}.items():
            if getattr(self, name) < floor:
                raise UserError(
                    f"search.{name}", expected=f"at least {floor}", got=repr(getattr(self, name)), remedy="raise it"
                )
        ranges = {
            "teacher_share": (0 <= self.teacher_share < 1, "in [0, 1)"),
            "sigma": (0 <= self.sigma < math.inf or self.sigma == -1, "a number of at least 0, or -1 for the usual"),
            "epsilon_base": (0 <= self.epsilon_base <= 1, "in [0, 1]"),
            "epsilon_alpha": (0 <= self.epsilon_alpha < math.inf, "a number of at least 0"),
        }
        for name, (fine, expected) in ranges.items():
            if not fine:
                raise UserError(
                    f"search.{name}",
                    expected=expected,
                    got=repr(getattr(self, name)),
                    remedy="leave it out, or change it",
                )
        if self.method not in METHODS:
            raise UserError(
                "search.method", expected=" | ".join(METHODS), got=repr(self.method), remedy="choose one of them"
            )
        strange = [name for name in self.teacher_rules if name not in HEURISTICS]
        if strange or not self.teacher_rules:
            raise UserError(
                "search.teacher_rules",
                expected=f"one or more of {', '.join(HEURISTICS)}",
                got=repr(list(self.teacher_rules)),
                remedy="leave it out, or choose from these",
            )
        if self.allocation and (self.allocation not in ALLOCATIONS or self.method not in SCORING):
            raise UserError(
                "search.allocation",
                expected=f"{' | '.join(ALLOCATIONS)}, with search.method = {' | '.join(SCORING)}",
                got=f"{self.allocation!r} with {self.method}",
                remedy="leave it out, or choose one of them",
            )
        if self.like and (self.allocation or self.method not in SCORING):
            raise UserError(
                "search.like",
                expected=f"no search.allocation beside it, and search.method = {' | '.join(SCORING)}",
                got=f"search.allocation = {self.allocation!r}, search.method = {self.method!r}",
                remedy="change these, or leave --like out",
            )
        if self.alone and self.controls:
            raise UserError(
                "search.controls",
                expected=f"none beside search.method = {self.method}, which plays alone",
                got=repr(list(self.controls)),
                remedy="leave one of the two out",
            )
        unknown = [name for name in self.controls if name not in CONTROLS]
        if unknown or len(set(self.controls)) < len(self.controls):
            raise UserError(
                "search.controls",
                expected=f"different ones of {', '.join(CONTROLS)}",
                got=repr(list(self.controls)),
                remedy="leave out what is not among them",
            )

    @property
    def exploration(self) -> float:
        """`sigma`, of a Controller that begins with nothing where it is not given."""
        return self.sigma if self.sigma >= 0 else UNTAUGHT_SIGMA

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups, in the order they are played."""
        return (self.method,) if self.alone else ("search", *self.controls)

    @property
    def alone(self) -> bool:
        """Whether a rule plays alone: nothing is learned."""
        return self.method != "controller"

    @property
    def per_group(self) -> int:
        """Episodes of each group."""
        return self.episodes or (1 if self.alone else 2 * self.actors)

    @property
    def total(self) -> int:
        """Episodes of all groups."""
        return self.per_group * len(self.groups)

    @property
    def teachers(self) -> int:
        """Episodes that heuristics play at the start of `search` (and of `untrained`, its mirror); one is left over."""
        return min(round(self.per_group * self.teacher_share), self.per_group - 1)


@dataclass(frozen=True, kw_only=True)
class EpisodeOrder:
    """One episode: who plays it and with which random numbers."""

    episode: int
    group: str
    policy: str  # a name in agents.policies.HEURISTICS, "controller", "controller-untrained" or "cem"
    epsilon: float
    sigma: float
    seed: int  # of the policy's own randomness
    retraining_seed: int  # of minibatches and augmentation; the same in all episodes that differ by masks


def order(config: ScheduleConfig, episode: int, *, seed: int) -> EpisodeOrder:
    """The order for an episode, 0 <= episode < config.total, of the campaign with this seed."""
    group, place = config.groups[episode // config.per_group], episode % config.per_group
    # The same place has the same luck in every group: the comparison is between deciders.
    policy_seed = derive_seed(seed, "policy", place)
    policy, epsilon, sigma = _who(config, group, place)
    # A rule without randomness would repeat itself exactly; fresh minibatches let it be chosen from many tries too.
    repeats = group in SCORING
    return EpisodeOrder(
        episode=episode,
        group=group,
        policy=policy,
        epsilon=epsilon,
        sigma=sigma,
        seed=policy_seed,
        retraining_seed=derive_seed(seed, "retraining", place) if repeats else derive_seed(seed, "retraining"),
    )


def _who(config: ScheduleConfig, group: str, place: int) -> tuple[str, float, float]:
    """(policy, epsilon, sigma) of the place-th episode of a group."""
    if group in ("search", "untrained"):
        return _learner_or_teacher(config, group, place)
    policy = "random-allocation" if group == "random" else group
    return policy, 0.0, 0.0


def _learner_or_teacher(config: ScheduleConfig, group: str, place: int) -> tuple[str, float, float]:
    if place < config.teachers:
        rules = config.teacher_rules
        later = place - len(rules)
        teacher = rules[place] if later < 0 else _LATER_TEACHERS[later % len(_LATER_TEACHERS)]
        return teacher, 0.0, 0.0
    own = config.per_group - config.teachers
    left = 1.0 - (place - config.teachers) / max(own - 1, 1)
    epsilon = epsilon_ladder(place % config.actors, config) * left
    sigma = config.exploration * (0.25 + 0.75 * left)
    return ("controller" if group == "search" else "controller-untrained"), epsilon, sigma


def epsilon_ladder(actor: int, config: ScheduleConfig) -> float:
    """R2D2's epsilon of the i-th of N actors: 0.4 ** (1 + 7 i / (N - 1)) (Horgan et al. 2018, section 4.1)."""
    share = actor / (config.actors - 1) if config.actors > 1 else 0.0
    return float(config.epsilon_base ** (1.0 + config.epsilon_alpha * share))
