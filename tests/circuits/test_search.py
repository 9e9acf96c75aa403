"""The search's own logic: what is asked, stored, resumed and refused. Pruning stands aside."""

import copy
import importlib
import json
import math
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import optuna
import pandas as pd
import pytest
import torch

from tl_sparse.ablation import activation_means, resample_sources
from tl_sparse.circuits import PruningConfig, PruningFailed, prune
from tl_sparse.circuits.pruning_run import build_circuit, set_up
from tl_sparse.circuits.search import search, values_of
from tl_sparse.circuits.search_config import RANGES, SearchConfig, starts
from tl_sparse.circuits.search_result import best_of, not_beaten
from tl_sparse.circuits.search_study import SlotSampler, open_study, settings_of, space

SEARCH = importlib.import_module("tl_sparse.circuits.search")  # not the function
BASE = PruningConfig(headroom=0.0, steps=10, batch_pairs=8, selection_pairs=16, report_pairs=8)
SMALL = SearchConfig(rounds=3, suggestions=4)
SETTINGS = [*RANGES, "penalty"]


@pytest.fixture
def setting(planted, marks, random_tokens):
    model, chain = planted()
    return model, marks, activation_means(model, random_tokens), chain


@pytest.fixture
def pruned(monkeypatch, setting):
    """Pruning replaced by a formula: more nodes the further settings are from an optimum.

    The circuit is the planted chain and so many other nodes; trials at a high price find none.
    Returns the list of jobs of every round.
    """
    _, _, means, chain = setting
    index = means.index
    must = torch.zeros(index.n_nodes, dtype=torch.bool)
    for layer, site, channel in chain:
        must[index.slices[index.hook(layer, site)].start + channel] = True
    rounds, templates = [], {}

    def circuit_of(model, task, means, config, n_more):
        """A circuit of so many nodes; what it measures is a formula too."""
        if not templates:
            problem = set_up(model, task, config, means=means)
            templates[0] = build_circuit(problem, must, torch.zeros(index.n_nodes), n_active=0)
        kept = must.clone()
        kept[torch.nonzero(~must).flatten()[:n_more]] = True
        loss = config.target_loss * (1 - 1 / (5 + n_more))
        return replace(templates[0], kept=kept, selection_loss=loss, config=asdict(config))

    def many(model, jobs, *, means, sources=None, progress=True):
        rounds.append([config for _, config in jobs])
        found = []
        for task, config in jobs:
            if config.l0_penalty > 5e-3:
                found.append(PruningFailed("too dear", 0.15 + config.l0_penalty))
                continue
            away = abs(math.log10(config.lr / 0.1)) + abs(math.log10(config.l0_penalty / 3e-4))
            found.append(circuit_of(model, task, means, config, int(10 * away)))
        return found

    monkeypatch.setattr(SEARCH, "prune_many", many)
    return rounds


def run(setting, config=SMALL, base=BASE, **more):
    model, task, means, _ = setting
    return search(model, task, base, config, means=means, progress=False, **more)


def test_it_begins_with_the_default_and_the_papers_centres(setting, pruned):
    result = run(setting)
    assert [len(each) for each in pruned] == [4, 4, 4]
    assert pruned[0][0] == BASE
    assert BASE.on_collapse == "eliminate"
    assert {config.on_collapse for each in pruned for config in each if config != BASE} == {"fail"}
    centre = pruned[0][1]
    assert (centre.l0_penalty, centre.lr, centre.weight_decay, centre.beta2) == (
        1e-4,
        3e-3,
        1e-3,
        0.95,
    )
    assert (centre.init_scale, centre.init_bias, centre.temperature) == (1e-2, 1e-1, 1.0)
    assert (centre.warmup_frac, centre.penalty) == (5e-2, "fixed")
    assert centre.steps == BASE.steps
    assert result.configs[0] == BASE
    assert len(result.trials) == 12
    assert result.best.n_nodes <= result.trials.loc[0, "n_nodes"]


def test_suggestions_lie_in_the_ranges_and_differ(setting, pruned):
    result = run(setting, replace(SMALL, rounds=8))
    table = result.trials
    for name, (low, _, high) in RANGES.items():
        later = table[name][1:]
        assert later.between(low * 0.999, high * 1.001).all(), name
        assert later.nunique() > 25, name
        assert (later < math.sqrt(low * high)).sum() > 2  # on a log scale both halves are seen
        assert (later > math.sqrt(low * high)).sum() > 2
    # settings of a trial are drawn apart: their places in their ranges are not the same
    places = pd.DataFrame({n: table[n][2:].rank() for n in RANGES}).corr()
    assert (places.abs().sum() < 0.8 * len(RANGES)).all()


def test_it_learns(setting, pruned):
    config = SearchConfig(rounds=8, suggestions=8)
    learned = run(setting, config).trials.query("feasible")
    random = run(setting, replace(config, sampler="random")).trials.query("feasible")
    assert learned["n_nodes"][32:].mean() < 0.8 * random["n_nodes"][32:].mean()
    assert len(learned) > len(random)


def test_failed_trials_are_told_by_their_excess_loss(setting, pruned):
    result = run(setting, replace(SMALL, rounds=8, sampler="random"))
    failed = result.trials[~result.trials["feasible"]]
    assert len(failed)
    assert (failed["n_nodes"] == -1).all()
    assert ((failed["selection_loss"] - 0.15 - failed["l0_penalty"]).abs() < 1e-9).all()
    worse = {"feasible": False, "selection_loss": 0.3, "config": asdict(BASE)}
    values = values_of(worse, 100, SMALL)
    assert values == [pytest.approx(200.0)]
    assert values_of(worse | {"selection_loss": 0.2}, 100, SMALL)[0] < values[0]
    both = replace(SMALL, objective="nodes_and_loss")
    assert values_of(worse, 100, both) == [pytest.approx(200.0), 0.3]


def test_the_result_says_what_no_trial_beats(setting, pruned):
    result = run(setting, replace(SMALL, rounds=6))
    table = result.trials[result.trials["feasible"]]
    assert result.best.n_nodes == table["n_nodes"].min()
    assert set(result.circuits) >= set(result.pareto["trial"])
    for number, circuit in result.circuits.items():
        row = result.trials.set_index("trial").loc[number]
        assert (circuit.n_nodes, circuit.n_edges) == (row["n_nodes"], row["n_edges"])
        assert circuit.loss == row["loss"]
    for row in result.pareto.itertuples():
        beaten = (table["n_nodes"] <= row.n_nodes) & (table["selection_loss"] < row.selection_loss)
        assert not beaten.any()
    assert "12 trials" not in repr(result)
    assert "24 trials, best" in repr(result)
    assert [trace.name for trace in result.to_plotly().data][:1] == ["circuit"]
    assert list(result.pareto_figure().data[1].y) == result.pareto["n_nodes"].tolist()


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_two_objectives_search_the_target_too(setting, pruned, sampler):
    config = SearchConfig(rounds=5, suggestions=6, objective="nodes_and_loss", sampler=sampler)
    result = run(setting, config)
    assert result.trials["target_loss"][0] == BASE.target_loss
    assert result.trials["target_loss"].nunique() > 10  # NSGA-II passes values on
    assert result.trials["target_loss"].between(0.0149, 0.5).all()
    assert result.best.selection_loss <= BASE.target_loss


@pytest.mark.parametrize(
    ("sampler", "storage"), [("tpe", True), ("tpe", False), ("nsga2", False), ("random", False)]
)
def test_the_same_again(setting, pruned, tmp_path, sampler, storage):
    files = [tmp_path / "a.db", tmp_path / "b.db"] if storage else [None, None]
    config = replace(SMALL, rounds=6, sampler=sampler)
    first, second = (run(setting, config, storage=file) for file in files)
    assert first.trials.drop(columns="seconds").equals(second.trials.drop(columns="seconds"))
    other = run(setting, replace(config, seed=1))
    assert not other.trials["lr"].equals(first.trials["lr"])


def test_a_search_goes_on_where_it_stopped(setting, pruned, tmp_path):
    whole = run(setting, replace(SMALL, rounds=5))
    del pruned[:]
    run(setting, replace(SMALL, rounds=2), storage=tmp_path / "s.db")
    assert len(pruned) == 2
    result = run(setting, replace(SMALL, rounds=5), storage=tmp_path / "s.db")
    assert len(pruned) == 5
    assert result.trials.drop(columns="seconds").equals(whole.trials.drop(columns="seconds"))
    assert torch.equal(result.best.kept, whole.best.kept)
    run(setting, replace(SMALL, rounds=5), storage=tmp_path / "s.db")
    assert len(pruned) == 5  # nothing is left to do


def test_an_interrupted_round_is_asked_again_and_not_counted(
    setting, pruned, tmp_path, monkeypatch
):
    whole = run(setting, replace(SMALL, rounds=4))
    asked = [list(each) for each in pruned]
    del pruned[:]
    original, calls = SEARCH.prune_many, iter(range(10))

    def failing(*args, **kwargs):
        found = original(*args, **kwargs)
        if next(calls) == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(SEARCH, "prune_many", failing)
    with pytest.raises(KeyboardInterrupt):
        run(setting, replace(SMALL, rounds=4), storage=tmp_path / "s.db")
    result = run(setting, replace(SMALL, rounds=4), storage=tmp_path / "s.db")
    assert pruned == [asked[0], asked[1], asked[2], asked[2], asked[3]]
    assert len(result.trials) == 16
    columns = [*SETTINGS, "n_nodes", "selection_loss"]
    assert result.trials[columns].equals(whole.trials[columns])


def test_trials_of_a_killed_process_are_asked_again(setting, pruned, tmp_path):
    import optuna

    file = tmp_path / "s.db"
    run(setting, replace(SMALL, rounds=1), storage=file)
    study = optuna.load_study(study_name="tl_sparse", storage=f"sqlite:///{file}")
    for _ in range(4):  # as a process that is killed leaves them: running, and its lock free
        study.ask(space(None)).set_user_attr("worker", "worker gone")
    result = run(setting, replace(SMALL, rounds=2), storage=file)
    assert len(result.trials) == 8
    states = [trial.state.name for trial in study.get_trials()]
    assert (states.count("FAIL"), states.count("COMPLETE"), len(states)) == (4, 8, 12)


def test_workers_at_the_same_time_share_the_budget(setting, pruned, tmp_path):
    run(setting, replace(SMALL, rounds=1))
    models = [setting[0], copy.deepcopy(setting[0])]
    assert len(pruned) == 1

    def work(model):
        everything = replace(SMALL, rounds=4)
        return run((model, *setting[1:]), everything, storage=tmp_path / "s.db")

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, models))
    assert [len(result.trials) for result in results] == [16, 16]
    assert results[0].trials.equals(results[1].trials)
    asked = [config for each in pruned[1:] for config in each]
    assert len(asked) == 16
    assert len({config.lr for config in asked}) == 16  # nobody does another's work again


@pytest.mark.parametrize("changed", ["model", "task", "means", "base", "seed"])
def test_a_storage_of_another_search_is_refused(setting, pruned, tmp_path, changed, planted):
    model, task, means, _ = setting
    file = tmp_path / "s.db"
    run(setting, replace(SMALL, rounds=1), storage=file)
    config, base = replace(SMALL, rounds=1), BASE
    if changed == "model":
        with torch.no_grad():
            model.unembed.W_U.mul_(1.1)
        means = activation_means(model, torch.randint(3, 30, (8, 12)))
    elif changed == "task":
        task = replace(task, name="another")
    elif changed == "means":
        means = replace(means, values=means.values + 1e-3)
    elif changed == "base":
        base = replace(base, steps=11)
    else:
        config = replace(config, seed=3)
    with pytest.raises(ValueError, match=f"another search, with another .*{changed}"):
        search(model, task, base, config, means=means, storage=file, progress=False)


@pytest.mark.parametrize("changed", ["nodes", "sources"])
def test_nodes_and_sources_make_another_search(setting, tmp_path, random_tokens, changed):
    """Means of zero are the same numbers whatever the nodes; sources have no means."""
    model, task, _, _ = setting
    kind = "zero" if changed == "nodes" else "resample"
    settings = []
    for other in (False, True):
        sites = ("attn_in",) if changed == "nodes" and other else ("mlp_in",)
        means = activation_means(model, random_tokens, sites)
        sources = None
        if changed == "sources":
            sources = resample_sources(model, random_tokens.flip(0) if other else random_tokens,
                                       index=means.index)  # fmt: skip
        base = replace(BASE, ablation=kind)
        settings.append(SEARCH.identity(set_up(model, task, base, means=means, sources=sources),
                                        SMALL))  # fmt: skip
    first, second = settings
    assert [key for key in first if first[key] != second[key]] == [changed]
    open_study(tmp_path / "s.db", SlotSampler(SMALL, BASE, space(None)), first)
    with pytest.raises(ValueError, match=f"another search, with another {changed}"):
        open_study(tmp_path / "s.db", SlotSampler(SMALL, BASE, space(None)), second)


def test_a_search_is_kept_in_the_file_that_was_named(tmp_path):
    """An address of a database gives a meaning to these signs, a file's name does not."""
    names = ["a?mode=memory&x.db", "%41.db", "{SCHEMA_VERSION}.db", "{x}", "#1 ü.db"]
    sampler = SlotSampler(SMALL, BASE, space(None))
    for name in names:
        open_study(tmp_path / name, sampler, {"name": name}).ask()
    assert {path.name.removesuffix(".lock") for path in tmp_path.iterdir()} == set(names)
    for name in names:
        with sqlite3.connect(tmp_path / name) as database:
            assert database.execute("select count(*) from trials").fetchone() == (1,)


def test_a_relative_name_is_one_in_the_working_directory(setting, pruned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(setting, SearchConfig(rounds=1, suggestions=1), storage="file:a?mode=ro")
    assert (tmp_path / "file:a?mode=ro").read_bytes().startswith(b"SQLite")
    assert (tmp_path / "file:a?mode=ro.circuits").is_dir()


def test_a_place_that_is_no_regular_file_is_refused_at_once(setting, pruned, tmp_path):
    os.mkfifo(tmp_path / "pipe.db")
    for place in (tmp_path / "pipe.db", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="where a file is expected"):
            run(setting, storage=place)


def test_a_file_that_is_no_study_is_refused(setting, pruned, tmp_path):
    text, other = tmp_path / "text.db", tmp_path / "other.db"
    text.write_text("no database at all, but long enough to be looked at " * 40)
    with pytest.raises(ValueError, match=r"text\.db is no SQLite database"):
        run(setting, storage=text)
    optuna.create_study(study_name="tl_sparse", storage=f"sqlite:///{other}").optimize(
        lambda trial: trial.suggest_float("x", 0, 1), n_trials=1
    )
    with pytest.raises(ValueError, match="holds no search"):
        run(setting, storage=other)
    assert "no database" in text.read_text()


def test_a_stored_config_is_checked_before_it_is_used(setting, pruned, tmp_path):
    file = tmp_path / "s.db"
    run(setting, replace(SMALL, rounds=1), storage=file)
    with sqlite3.connect(file) as database:
        rows = database.execute(
            "select trial_user_attribute_id, value_json from trial_user_attributes where key = "
            "'record'"
        ).fetchall()
        record = json.loads(rows[0][1])
        record["config"]["steps"] = "__import__('os')"
        database.execute(
            "update trial_user_attributes set value_json = ? where trial_user_attribute_id = ?",
            (json.dumps(record), rows[0][0]),
        )
    with pytest.raises(ValueError, match="steps"):
        run(setting, replace(SMALL, rounds=1), storage=file)


HOSTILE = {
    "a view in a table's place": (
        "alter table trials rename to t; create view trials as with recursive r(i) as "
        "(select 1 union all select i + 1 from r) select t.* from t, r"
    ),
    "a trigger": "create trigger a after update on trials begin delete from trials; end",
    "no record": "delete from trial_user_attributes where key = 'record'",
    "a list": "update trial_user_attributes set value_json = '[1]' where key = 'record'",
    "NaN": "update trial_user_attributes set value_json = replace(value_json, "
           "'\"selection_loss\": ', '\"selection_loss\": NaN, \"x\": ') where key = 'record'",
    "a depth": "update trial_user_attributes set value_json = "
               "replace(hex(zeroblob(50000)), '00', '[')",
    "a state": "update trials set state = 'ASLEEP'",
    "no value": "delete from trial_values",
    "a distribution": "update trial_params set distribution_json = '{\"name\": \"os.system\"}'",
    "a number in text": "update trial_params set param_value = 'x'",
    "no directions": "delete from study_directions",
    "no identity": "delete from study_user_attributes",
    "an identity that is no object": "update study_user_attributes set value_json = '3'",
    "a missing table": "drop table trial_params",
    "another version": "update alembic_version set version_num = 'v99'",
}  # fmt: skip


def test_a_damaged_or_hostile_database_is_refused(setting, pruned, tmp_path):
    file = tmp_path / "s.db"
    config = SearchConfig(rounds=1, suggestions=2)
    run(setting, config, storage=file)
    whole = file.read_bytes()
    for name, statements in HOSTILE.items():
        file.write_bytes(whole)
        with sqlite3.connect(file) as database:
            database.executescript(statements)
        database.close()
        with pytest.raises(ValueError, match=r"s\.db") as caught:
            run(setting, config, storage=file)
        assert "\n" not in str(caught.value).strip(), name
    for place in ("s.db-journal", "s.db-wal"):
        file.write_bytes(whole)
        os.mkfifo(tmp_path / place)
        with pytest.raises(ValueError, match=f"{place} is a pipe"):
            run(setting, config, storage=file)
        (tmp_path / place).unlink()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"s\.db"):
        run(setting, config, storage=file)
    file.write_bytes(whole)
    assert len(run(setting, config, storage=file).trials) == 2


def test_a_deleted_circuit_is_missed(setting, pruned, tmp_path):
    import shutil

    file = tmp_path / "s.db"
    result = run(setting, replace(SMALL, rounds=1), storage=file)
    assert (tmp_path / "s.db.circuits" / f"trial-{result.best_trial}" / "circuit.json").is_file()
    shutil.rmtree(tmp_path / "s.db.circuits")
    with pytest.raises(FileNotFoundError, match=r"circuit\.json"):
        run(setting, replace(SMALL, rounds=1), storage=file)


def test_the_search_really_prunes(setting, tmp_path):
    """Without the stand-in: the first trial is what prune finds."""
    model, task, means, chain = setting
    base = replace(BASE, steps=40)
    result = run(setting, SearchConfig(rounds=1, suggestions=2), base, storage=tmp_path / "s.db")
    alone = prune(model, task, base, means=means, progress=False)
    first = result.trials.set_index("trial").loc[0]
    assert first["n_nodes"] == alone.n_nodes
    assert first["selection_loss"] == pytest.approx(alone.selection_loss, abs=1e-5)
    assert result.best.n_nodes <= alone.n_nodes
    nodes = result.best.nodes[["layer", "site", "channel"]]
    assert chain <= set(nodes.itertuples(index=False, name=None))


@pytest.mark.parametrize(
    ("field", "value"),
    [("rounds", 0), ("suggestions", 0), ("targets", (0.5, 0.1)), ("targets", (0.1, 0.9))],
)
def test_a_config_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        SearchConfig(**{field: value})


def test_a_start_outside_the_space_is_told_as_its_nearest_point():
    point = settings_of(PruningConfig(weight_decay=0.0, warmup_frac=0.0), space(None))
    assert point["weight_decay"] == RANGES["weight_decay"][0]
    assert point["warmup_frac"] == RANGES["warmup_frac"][0]
    assert point["inv_beta2"] == pytest.approx(0.05)
    assert [start.penalty for start in starts(PruningConfig())] == ["adaptive", "fixed"]


def test_what_no_trial_beats_by_hand():
    table = pd.DataFrame(
        {
            "trial": range(6),
            "feasible": [True, True, True, True, False, True],
            "n_nodes": [10, 8, 8, 20, -1, 12],
            "n_edges": [5, 9, 4, 3, -1, 3],
            "selection_loss": [0.14, 0.15, 0.15, 0.05, 0.01, 0.14],
        }
    )
    assert not_beaten(table)["trial"].tolist() == [1, 0, 3]
    assert best_of(table, 0.15) == 2  # as few nodes and as low a loss, but fewer edges
    assert best_of(table, 0.1) == 3
    assert best_of(table, 0.01) is None
