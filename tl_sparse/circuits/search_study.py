"""The Optuna study behind :func:`~tl_sparse.circuits.search.search`: what is searched, by which
sampler, and how it is kept in a file that several processes share and that survives them.

A trial's *slot* is its place among the trials that did not fail. What is suggested depends on the
slot, the seed and the finished trials alone; so a round that was interrupted, whose trials count as
failed, is asked again the same.
"""

from __future__ import annotations

import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from tl_sparse.circuits.pruning_config import PruningConfig

Objective = Literal["nodes", "nodes_and_loss"]
Sampler = Literal["tpe", "nsga2", "random"]

NAME, IDENTITY, RECORD, WORKER = "tl_sparse", "identity", "record", "worker"
BEAT_SECONDS = 3.0  # how often a worker says that it is alive
GRACE_SECONDS = 30.0  # after so long a silence its trials count as interrupted
LOCK_SECONDS = 120.0  # how long to wait while another process writes to the file
TRIES = 5  # to open a file that another process is just making
STARTUP = 16  # trials before the sampler learns from them
LIVE = (TrialState.RUNNING, TrialState.COMPLETE)

RANGES: dict[str, tuple[float, float, float]] = {
    "l0_penalty": (1e-6, 1e-4, 1e-2),
    "lr": (1e-4, 3e-3, 3e-1),
    "weight_decay": (1e-5, 1e-3, 1e-1),
    "inv_beta2": (5e-3, 5e-2, 5e-1),
    "init_scale": (1e-3, 1e-2, 1e-1),
    "init_bias": (1e-2, 1e-1, 1.0),
    "temperature": (1e-1, 1.0, 1e1),
    "warmup_frac": (5e-3, 5e-2, 5e-1),
    "adapt_rate": (3e-3, 3e-2, 3e-1),
}
"""Setting → lowest value, the paper's centre, highest; searched on a log scale (Gao et al. 2025,
§A.5, Table 2). ``inv_beta2`` is 1 - beta2; ``adapt_rate`` and its centre are ours."""


@dataclass(frozen=True)
class SearchConfig:
    """How settings are searched; the defaults are the paper's budget of 32 rounds of 8."""

    rounds: int = 32
    """Rounds of the whole search, all processes together; a later call may ask for more."""
    suggestions: int = 8
    """Settings per round, whose masks train in shared forward passes."""
    objective: Objective = "nodes"
    """nodes: the fewest nodes at the base config's target loss. nodes_and_loss: both, with the
    target loss as one more setting."""
    sampler: Sampler = "tpe"
    """Tree-structured Parzen estimator (for two objectives too), NSGA-II, or random."""
    targets: tuple[float, float] = (0.015, 0.5)
    """Range of target losses for ``nodes_and_loss``; what the full model misses is left out."""
    seed: int = 0
    """Seed of the suggestions. Seeds of τ and prompts are the base config's, the same for all."""

    def __post_init__(self) -> None:
        for name in ("rounds", "suggestions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, choices in (("objective", Objective), ("sampler", Sampler)):
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {known}")
        if not 0 < self.targets[0] < self.targets[1] < math.log(2):
            raise ValueError(f"targets={self.targets} must rise and lie between 0 and ln 2")


def space(targets: tuple[float, float] | None) -> dict[str, BaseDistribution]:
    """What is searched; with a range of target losses, the target too."""
    found: dict[str, BaseDistribution] = {
        name: FloatDistribution(low, high, log=True) for name, (low, _, high) in RANGES.items()
    }
    found["penalty"] = CategoricalDistribution(("adaptive", "fixed"))
    if targets is not None:
        found["target_loss"] = FloatDistribution(*targets, log=True)
    return found


def with_settings(base: PruningConfig, settings: Mapping[str, Any]) -> PruningConfig:
    """The base config with these settings."""
    values = asdict(base) | dict(settings)
    values["beta2"] = 1 - values.pop("inv_beta2")
    return PruningConfig(**values)


def starts(base: PruningConfig) -> tuple[PruningConfig, PruningConfig]:
    """The first two trials: the base config as it is, and the paper's centres, at a fixed price."""
    centres = {name: centre for name, (_, centre, _) in RANGES.items()}
    return base, with_settings(base, centres | {"penalty": "fixed"})


def settings_of(
    config: PruningConfig, wanted: Mapping[str, BaseDistribution]
) -> dict[str, float | str]:
    """The point of the space nearest to a config: none at all of something is not in it."""
    values: dict[str, float | str] = {}
    for name, distribution in wanted.items():
        value = 1 - config.beta2 if name == "inv_beta2" else getattr(config, name)
        if isinstance(distribution, FloatDistribution):
            value = min(max(value, distribution.low), distribution.high)
        values[name] = value
    return values


class SlotSampler(BaseSampler):
    """Suggests the two starts first, then by a sampler that is seeded anew for every slot."""

    def __init__(
        self, config: SearchConfig, base: PruningConfig, wanted: dict[str, BaseDistribution]
    ) -> None:
        self.config = config
        self.first = [settings_of(start, wanted) for start in starts(base)]
        self.start: dict[str, float | str] | None = None
        self.inner: BaseSampler = RandomSampler()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Get ready for a trial."""
        slot = slot_of(study, trial.number)
        seed = (self.config.seed * 1_000_003 + slot) % 2**32
        self.start = self.first[slot] if slot < len(self.first) else None
        if self.config.sampler == "random":
            self.inner = RandomSampler(seed=seed)
        elif self.config.sampler == "nsga2":
            self.inner = NSGAIISampler(population_size=STARTUP, seed=seed)
        else:
            # constant_liar: the suggestions of a round keep apart, before any of them is finished
            self.inner = TPESampler(n_startup_trials=STARTUP, constant_liar=True, seed=seed)
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """What is suggested jointly: nothing for the starts."""
        if self.start is not None:
            return {}
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Joint suggestions."""
        if self.start is not None:
            return {}
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A start's value, or a suggestion of one setting alone."""
        if self.start is not None:
            return self.start[param_name]
        return self.inner.sample_independent(study, trial, param_name, param_distribution)


def slot_of(study: optuna.Study, number: int) -> int:
    """The place of a trial among those that did not fail."""
    live = study.get_trials(deepcopy=False, states=LIVE)
    return sum(trial.number < number for trial in live)


# --------------------------------------------------------------------------------------------------
# the study in its file


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's notices on standard error."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


def open_study(
    storage: Path | None, sampler: SlotSampler, identity: Mapping[str, Any]
) -> optuna.Study:
    """A new study, or the one in the file.

    Raises:
        ValueError: the file is no study of ours, or one of another search; the message says in
            what it differs.
    """
    if storage is not None:
        storage.parent.mkdir(parents=True, exist_ok=True)
    try:
        study = retried(partial(create, storage, sampler))
        mine = json.loads(json.dumps(identity))
        if IDENTITY not in study.user_attrs and not study.get_trials(deepcopy=False):
            study.set_user_attr(IDENTITY, mine)
        theirs = study.user_attrs.get(IDENTITY)
    except (SQLAlchemyError, RuntimeError, optuna.exceptions.OptunaError) as error:
        raise ValueError(f"{storage} holds no search of tl_sparse: {error}") from error
    if not isinstance(theirs, dict):
        raise ValueError(f"{storage} holds no search of tl_sparse: choose another file")
    if wrong := sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key)):
        parts = [f"{key} ({theirs.get(key)!s:.60}, here {mine.get(key)!s:.60})" for key in wrong]
        raise ValueError(
            f"{storage} holds another search, with another {', another '.join(parts)}: choose "
            "another file"
        )
    return study


def create(storage: Path | None, sampler: SlotSampler) -> optuna.Study:
    """The study in a file or in memory, made if there is none."""
    backend = None
    if storage is not None:
        waiting = {"connect_args": {"timeout": LOCK_SECONDS}}
        backend = optuna.storages.RDBStorage(f"sqlite:///{storage}", engine_kwargs=waiting)
    n_objectives = 1 if sampler.config.objective == "nodes" else 2
    return optuna.create_study(
        study_name=NAME, storage=backend, sampler=sampler, load_if_exists=True,
        directions=["minimize"] * n_objectives,
    )  # fmt: skip


def retried(make: Callable[[], optuna.Study]) -> optuna.Study:
    """What ``make`` makes; of two processes that make the same tables at once, one has to wait: it
    finds them locked, or finds a row there that it meant to write."""
    for _ in range(TRIES - 1):
        try:
            return make()
        except DBAPIError:
            time.sleep(0.5)
    return make()


class Worker:
    """A process that takes part in a search: it says so while it lives, and its trials are its own.

    In a study that is in memory alone, nobody needs to know.
    """

    def __init__(self, study: optuna.Study, shared: bool) -> None:
        self.study, self.shared = study, shared
        self.name = f"{WORKER} {uuid.uuid4().hex}"
        self.asked: list[optuna.Trial] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.beat, daemon=True)

    def __enter__(self) -> Worker:
        if self.shared:
            self.study.set_user_attr(self.name, time.time())
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Trials that are not finished are given up, to be asked again."""
        self.ended.set()
        if self.shared:
            self.thread.join()
        for trial in self.asked:
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)

    def beat(self) -> None:
        """Say again and again that this process is alive."""
        while not self.ended.wait(BEAT_SECONDS):
            self.study.set_user_attr(self.name, time.time())

    def reclaim(self) -> None:
        """Give up the trials of processes that have gone silent."""
        heard, now = self.study.user_attrs, time.time()
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get(WORKER)
            # one that was asked a moment ago has no name on it yet
            asked = 0.0 if trial.datetime_start is None else trial.datetime_start.timestamp()
            silent = now - max(asked, float(heard.get(str(worker), 0.0))) > GRACE_SECONDS
            if worker != self.name and silent:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def ask(self, config: SearchConfig, wanted: dict[str, BaseDistribution]) -> list[optuna.Trial]:
        """Up to a round of trials; none once the budget is spent or taken.

        While others hold the rest of the budget, it waits for them to finish or to go silent.
        """
        budget = config.rounds * config.suggestions
        while True:
            self.reclaim()
            states = [trial.state for trial in self.study.get_trials(deepcopy=False, states=LIVE)]
            if states.count(TrialState.COMPLETE) >= budget:
                return []
            if len(states) < budget:
                break
            time.sleep(0.5)
        self.asked = []
        while len(self.asked) < min(config.suggestions, budget - len(states)):
            self.asked.append(self.study.ask(wanted))
            self.asked[-1].set_user_attr(WORKER, self.name)
        # of two processes that saw the same budget left, the later one steps back
        for trial in [t for t in self.asked if slot_of(self.study, t.number) >= budget]:
            self.study.tell(trial, state=TrialState.FAIL)
            self.asked.remove(trial)
        return self.asked or self.ask(config, wanted)
