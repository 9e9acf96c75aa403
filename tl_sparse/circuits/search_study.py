"""The Optuna study behind :func:`~tl_sparse.circuits.search.search`: what is searched, by which
sampler, and how it is kept in a file that several processes share and that survives them.

A trial's *slot* is its place among the trials that did not fail. What is suggested depends on the
slot, the seed and the finished trials alone; so a round that was interrupted, whose trials count as
failed, is asked again the same.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.circuits.search_config import RANGES, SearchConfig, starts, with_settings
from tl_sparse.storage.database_files import check_database, opener
from tl_sparse.storage.locks import try_lock, wait_for_lock

NAME, IDENTITY, WORKER = "tl_sparse", "identity", "worker"
LOCK_SECONDS = 120.0  # how long to wait while another process writes to the file
STARTUP = 16  # trials before the sampler learns from them
LIVE = (TrialState.RUNNING, TrialState.COMPLETE)


def space(targets: tuple[float, float] | None) -> dict[str, BaseDistribution]:
    """What is searched; with a range of target losses, the target too."""
    found: dict[str, BaseDistribution] = {
        name: FloatDistribution(low, high, log=True) for name, (low, _, high) in RANGES.items()
    }
    found["penalty"] = CategoricalDistribution(("adaptive", "fixed"))
    if targets is not None:
        found["target_loss"] = FloatDistribution(*targets, log=True)
    return found


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


def config_of(
    trial: optuna.Trial, base: PruningConfig, wanted: dict[str, BaseDistribution]
) -> PruningConfig:
    """The pruning config of a trial; the starts are as they are, not as the space can say them."""
    for start in starts(base):
        if trial.params == settings_of(start, wanted):
            return start
    return with_settings(base, trial.params)


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
    mine = json.loads(json.dumps(identity))
    if storage is not None:
        check_database(storage, LOCK_SECONDS)
    with locked(storage):  # of two processes that make the same tables at once, one has to wait
        try:
            if storage is not None:
                storage.touch()  # with the umask's mode, where SQLite would never let a group write
            study = create(storage, sampler)
            if IDENTITY not in study.user_attrs and not study.get_trials(deepcopy=False):
                study.set_user_attr(IDENTITY, mine)
            theirs = study.user_attrs.get(IDENTITY)
            if len(study.directions) != objectives(sampler.config):
                raise ValueError(f"it has {len(study.directions)} objectives")
            study.get_trials(deepcopy=False)  # every row, while what is wrong is its file's
        except Exception as error:  # Optuna does with a row whatever the row says
            raise ValueError(f"{storage} holds no search of tl_sparse: {error!r:.300}") from error
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
        backend = optuna.storages.RDBStorage(
            "sqlite:///in-the-file", engine_kwargs={"creator": opener(storage, LOCK_SECONDS)}
        )
    return optuna.create_study(
        study_name=NAME, storage=backend, sampler=sampler, load_if_exists=True,
        directions=["minimize"] * objectives(sampler.config),
    )  # fmt: skip


def objectives(config: SearchConfig) -> int:
    """How many numbers are minimised."""
    return 1 if config.objective == "nodes" else 2


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """All finished trials, of every process."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def locked(storage: Path | None) -> AbstractContextManager[object]:
    """One process at a time looks at what is left of the budget and takes of it."""
    if storage is None:
        return nullcontext()
    return wait_for_lock(Path(f"{storage}.lock"), progress=False)


class Worker:
    """A process that takes part in a search, and whose trials are its own while it lives.

    It holds the lock of a file, which the operating system releases when the process ends, however
    it ends: so others know whose trials to give up. A study in memory has one worker.
    """

    def __init__(self, study: optuna.Study, storage: Path | None) -> None:
        self.study, self.storage = study, storage
        self.name = uuid.uuid4().hex
        self.asked: list[optuna.Trial] = []
        self.alive = ExitStack()

    def lock_of(self, worker: str) -> Path:
        """The lock that a worker holds while it lives."""
        return Path(f"{self.storage}.workers", f"{worker}.lock")

    def __enter__(self) -> Worker:
        if self.storage is not None:
            self.alive.enter_context(try_lock(self.lock_of(self.name)))
        return self

    def __exit__(self, *_: object) -> None:
        """Trials that are not finished are given up, to be asked again."""
        for trial in self.asked:
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        self.alive.close()

    def is_gone(self, worker: str) -> bool:
        """Whether the process of another worker has ended; a name that none has counts as such."""
        if not re.fullmatch(r"[0-9a-f]{32}", worker):
            return True
        with try_lock(self.lock_of(worker)) as free:
            return free

    def reclaim(self) -> None:
        """Give up the trials of processes that have ended."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        others = {str(trial.user_attrs.get(WORKER, "")) for trial in running} - {self.name}
        gone = {worker for worker in others if self.is_gone(worker)}
        for trial in running:
            if trial.user_attrs.get(WORKER, "") in gone:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def ask(self, config: SearchConfig, wanted: dict[str, BaseDistribution]) -> list[optuna.Trial]:
        """Up to a round of trials; none once the budget is spent.

        While others hold the rest of the budget, it waits for them to finish or to end.
        """
        budget = config.rounds * config.suggestions
        while True:
            with locked(self.storage):
                self.reclaim()
                live = self.study.get_trials(deepcopy=False, states=LIVE)
                self.asked = []
                for _ in range(min(config.suggestions, budget - len(live))):
                    self.asked.append(self.study.ask(wanted))
                    self.asked[-1].set_user_attr(WORKER, self.name)
            if self.asked or len(finished(self.study)) >= budget:
                return self.asked
            time.sleep(0.5)
