from dataclasses import replace

import pandas as pd
import pytest
import torch

from tl_sparse import cli
from tl_sparse.bridges import BridgedPair, Bridges
from tl_sparse.checkpoints.packed import training_record
from tl_sparse.config import ActivationDensity, SparseTransformerConfig
from tl_sparse.data import CorpusConfig, build_corpus
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sparsity.projection import SparsityConfig, constant_sparsity
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.studies import bridged, model_card, pair
from tl_sparse.studies.bridged_card import falling
from tl_sparse.studies.frontier import token_loss
from tl_sparse.studies.model_card import command_line
from tl_sparse.studies.pair import train_pair
from tl_sparse.studies.pair_config import Pair, PairConfig
from tl_sparse.studies.pair_recipes import HOW_CHOSEN, RECIPES, pair_recipe
from tl_sparse.studies.trained import ModelUnit
from tl_sparse.tasks import evaluate_task, get, names
from tl_sparse.training.config import TrainingConfig
from tl_sparse.training.trainer import Trainer

SPARSE = SparseTransformerConfig(
    n_layers=1, d_model=16, d_head=4, n_ctx=48, d_mlp=12, bigram_table="frozen",
    activation_density=ActivationDensity.paper(0.5),
)  # fmt: skip
DENSE = replace(SPARSE, d_model=8, n_heads=2, activation_density=ActivationDensity())
RULE = SparsityConfig(density=0.25, floor=1, embedding_floor=1, lr_factor="unnormalised")
# the sparse model hardly learns, so the dense one reaches its loss early in its own run
RUN = TrainingConfig(
    steps=4, batch_size=4, lr=1e-5, eval_every=2, eval_sequences=8, log_every=1, save_every=2,
    sparsity=RULE,
)  # fmt: skip
DENSE_RUN = replace(RUN, steps=60, lr=0.01, sparsity=None)
CONSTANT = constant_sparsity(0.25, floor=1, embedding_floor=1)
BRIDGED_RUN = replace(RUN, lr=1e-3, sparsity=CONSTANT)


@pytest.fixture(scope="module", autouse=True)
def few_sequences():
    """Bridges are fitted to little, as fast as can be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridged, "FITTED", 32)
        yield


@pytest.fixture(scope="module")
def small(sixty_sources, tmp_path_factory):
    """A pair's config that trains in seconds, and its folders."""
    folder = tmp_path_factory.mktemp("pair")
    return PairConfig(
        out=str(folder / "models"), name="tiny", seeds=(3, 4), cache=str(folder / "cache"),
        corpus=CorpusConfig(sources=(str(sixty_sources),), idiom_share=0.3),
        sparse=SPARSE, dense=DENSE, sparse_training=RUN, dense_training=DENSE_RUN, pairs=4,
        bridged=True, bridged_training=BRIDGED_RUN,
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(small):
    return build_corpus(small.corpus, small.cache, progress=False)


@pytest.fixture(scope="module")
def trained(small, corpus):
    """The pairs, and what was said about them."""
    said = []
    return train_pair(small, said.append, progress=False), said


# --------------------------------------------------------------------------------------------------
# what is asked for


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a/b"}, "name='a/b' must be usable as the name of a folder"),
        ({"name": ""}, "name='' must be usable"),
        ({"seeds": ()}, r"seeds=\(\) must be different integers"),
        ({"seeds": (1, 1)}, r"seeds=\(1, 1\) must be different integers"),
        ({"seeds": (-1,)}, r"seeds=\(-1,\) must be different integers"),
        ({"pairs": 0}, "pairs=0 must be at least 1"),
        ({"target_loss": 0.0}, "target_loss=0.0 must be positive"),
        ({"sparse_training": DENSE_RUN}, "sparse_training needs a sparsity"),
        ({"dense_training": RUN}, "and dense_training none"),
        ({"dense_training": replace(DENSE_RUN, stop_at_loss=3.0)}, "leave it unset"),
        (
            {"bridged_training": RUN},
            "bridged_training.sparsity must be sparse_training's final one",
        ),
        ({"bridged_training": DENSE_RUN}, "bridged_training.sparsity must be"),
        ({"dense": replace(DENSE, n_ctx=32)}, "sparse.n_ctx=48 and dense.n_ctx=32 differ"),
        (
            {"dense_training": replace(DENSE_RUN, eval_sequences=7)},
            r"sparse_training.eval_sequences=\d+ and dense_training.eval_sequences=7 differ",
        ),
        (
            {"dense_training": replace(DENSE_RUN, context=24)},
            "sparse_training.context=None and dense_training.context=24 differ",
        ),
    ],
)
def test_what_makes_no_pair_is_refused(small, changes, words):
    with pytest.raises(ValueError, match=words):
        replace(small, **changes)


def test_an_unknown_dtype_names_the_choices(small):
    config = replace(small)
    object.__setattr__(config, "dtype", "fp8")  # past the check of types that tests run with
    with pytest.raises(ValueError, match="dtype='fp8' is unknown; choose from fp32, bf16, fp16"):
        config.__post_init__()


def test_the_shipped_recipe_differs_in_width_sparsity_and_schedule_only():
    config = PairConfig(out="models")
    sparse, dense = config.sparse, config.dense
    assert replace(
        dense, d_model=sparse.d_model, n_heads=sparse.n_heads, d_mlp=sparse.d_mlp,
        activation_density=sparse.activation_density,
    ) == sparse  # fmt: skip
    assert dense.activation_density == ActivationDensity()
    assert sparse.activation_density == ActivationDensity.paper(0.25)


def test_every_recipe_can_be_asked_for_by_name(capsys):
    for name in RECIPES:
        config = pair_recipe(name, out="models")
        assert config.recipe == name
        assert model_card.follows_recipe(config)
        assert HOW_CHOSEN[name].startswith("How this recipe was chosen")
    assert pair_recipe("first", out="models") == PairConfig(out="models")
    assert pair_recipe("second", out="models").corpus.idioms == "second"
    with pytest.raises(ValueError, match="choose from first, second, accelerator"):
        pair_recipe("third", out="models")
    with pytest.raises(SystemExit, match="choose from first, second, accelerator"):
        cli.main(["pair", "--out", "models", "--recipe", "third"])


def test_every_seed_has_folders_of_its_own(small):
    assert [small.model_name(kind, seed) for seed in (3, 4) for kind in ("sparse", "dense")] == [
        "tiny-sparse", "tiny-dense", "tiny-sparse-seed4", "tiny-dense-seed4",
    ]  # fmt: skip


def test_only_the_dense_run_stops_at_a_loss(small):
    assert small.training("sparse", 9, 3.5) == replace(RUN, seed=9)
    assert small.training("dense", 9, 3.5) == replace(DENSE_RUN, seed=9, stop_at_loss=3.5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seeds": (5,), "name": "my models", "dtype": "bf16"},
        {"recipe": "second"},
        {"recipe": "accelerator", "seeds": (7,), "bridged": False},
        {
            "corpus": CorpusConfig(sources=("python-stdlib", "hf:a b"), max_bytes=7),
            "sparse": replace(PairConfig(out="").sparse, d_model=64, use_attention_sinks=False),
            "sparse_training": TrainingConfig.recipe(
                "cpu", steps=9, decay_after_projection=True, sparsity=replace(RULE, density=0.1)
            ),
        },
    ],
)
def test_the_command_of_a_config_is_read_back_as_that_config(changes, monkeypatch):
    changes = dict(changes)
    config = pair_recipe(changes.pop("recipe", "first"), out="models", **changes)
    seen = []
    monkeypatch.setattr(
        "tl_sparse.cli.studies.train_pair", lambda config, say: seen.append(config) or ()
    )
    words = model_card.shlex.split(command_line(replace(config, out="/x/y", cache="z")))
    assert words[:4] == ["tl-sparse", "pair", "--out", "models"]
    cli.main(words[1:])
    assert seen == [config]


# --------------------------------------------------------------------------------------------------
# the whole job, small


def test_the_dense_model_is_as_good_as_the_sparse_one_and_no_better_than_needed(trained):
    pairs, _ = trained
    for found in pairs:
        goal = found.sparse.record.validation_loss
        assert found.dense.record.config["stop_at_loss"] == goal
        assert found.dense.record.validation_loss <= goal
        assert found.dense.record.steps < DENSE_RUN.steps
        assert found.dense.record.steps % 2 == 0


def test_seeds_change_weights_and_data_order(trained):
    first, second = (found.sparse for found in trained[0])
    assert (first.model.config.seed, second.model.config.seed) == (3, 4)
    assert (first.record.config["seed"], second.record.config["seed"]) == (3, 4)
    assert not torch.equal(first.model.W_E, second.model.W_E)
    assert first.record.corpus == second.record.corpus


def test_what_is_measured_is_what_is_stored(small, corpus, trained):
    pairs, _ = trained
    [member] = [m for m in pairs[0].members if m.kind == "sparse"]
    architecture = small.model("sparse", 3, len(corpus.tokenizer))
    run = small.training("sparse", 3)
    folder = ModelUnit.cached(small.cache, "pair", "sparse", architecture, run, corpus).unit.folder
    full = SparseTransformer.from_pretrained(folder / "model").state_dict()
    stored = SparseTransformer.from_pretrained(pair.Path(small.out) / "tiny-sparse")
    assert not all(torch.equal(full[n], t) for n, t in stored.state_dict().items())
    for name, tensor in stored.state_dict().items():
        assert torch.equal(tensor, full[name].half().float())
        assert torch.equal(tensor, member.model.state_dict()[name])
    for name in names():
        expected = evaluate_task(stored, get(name, stored.tokenizer, 48), 4)
        assert torch.equal(member.tasks[name].losses, expected.losses)
    assert member.stored_loss == token_loss(stored, corpus.validation_sequences(8, 48))
    assert member.stored_loss == pytest.approx(member.record.validation_loss, abs=0.01)
    assert training_record(pair.Path(small.out) / "tiny-sparse") == member.record


def test_again_nothing_is_trained_and_the_same_is_written(small, trained, monkeypatch):
    out = pair.Path(small.out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {path.parent.name for path in before} == {
        "tiny-sparse", "tiny-dense", "tiny-sparse-seed4", "tiny-dense-seed4", "tiny-bridged",
        "tiny-bridges",
    }  # fmt: skip
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("trained again"))
    train_pair(small, lambda _: None, progress=False)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_progress_names_every_model_and_what_it_solves(trained):
    _, said = trained
    text = "\n".join(said)
    for name in ("tiny-sparse", "tiny-dense", "tiny-sparse-seed4", "tiny-dense-seed4"):
        assert f"{name}: up to " in text
    assert "Seed 3: both solve no task" in text


def test_a_dense_model_that_stays_worse_is_told(small, tmp_path):
    weak = replace(
        small, out=str(tmp_path / "out"), seeds=(3,),
        dense_training=replace(DENSE_RUN, steps=2, lr=1e-9),
        dense=replace(DENSE, d_model=4, n_heads=1, bigram_table="none"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"tiny-dense ended at .* above .*dense_training\.steps"):
        train_pair(weak, lambda _: None, progress=False)
    assert not (tmp_path / "out" / "tiny-dense").exists()


def test_common_tasks_are_below_the_target_in_both(trained):
    found = trained[0][0]

    def with_losses(member, **losses):
        template = member.tasks["for_while"]
        results = {t: replace(template, losses=torch.full((8,), v)) for t, v in losses.items()}
        return replace(member, tasks=results)

    made = Pair(
        0,
        with_losses(found.sparse, a=0.01, b=0.2, c=0.14, d=0.1),
        with_losses(found.dense, a=0.02, b=0.01, c=0.03, d=0.3),
    )
    assert made.sparse.solved(0.15) == ("a", "d", "c")
    assert made.dense.solved(0.15) == ("b", "a", "c")
    assert made.solved(0.15) == ("a", "c")
    assert made.solved(0.1) == ("a",)


# --------------------------------------------------------------------------------------------------
# the card


def test_the_card_states_what_was_measured(small, corpus, trained):
    pairs, _ = trained
    text = (pair.Path(small.out) / "tiny-dense" / "README.md").read_text(encoding="utf-8")
    found = pairs[0].dense
    assert text == model_card.model_card(small, corpus, pairs, found)
    assert text.startswith("# tiny-dense\n")
    assert "`tiny-sparse`" in text
    for member in (m for p in pairs for m in p.members):
        reached, steps = member.record.validation_loss, member.record.steps
        assert f"| `{member.name}` | {reached:.4f} | {member.stored_loss:.4f} | {steps:,} |" in text
    for name in names():
        for p in pairs:
            a, b = (m.tasks[name] for m in p.members)
            row = (
                f"| `{name}` | {a.accuracy:.3f} | {a.loss:.3f} | {b.accuracy:.3f} | {b.loss:.3f} |"
            )
            assert row in text
    assert f"L0 {sum(found.record.l0.values()):,}" in text
    kinds = [line for line in text.splitlines() if line.startswith("| W_out |")]
    assert kinds == [f"| W_out | {12 * 8} | {12 * 8} | 1.0000 |"]
    assert corpus.fingerprint in text
    assert command_line(small) in text
    assert f"{found.hours:.2f} hours on {found.machine}" in text
    assert small.out not in text
    assert small.cache not in text


def test_the_card_of_a_sparse_model_tells_its_density(small, trained):
    text = (pair.Path(small.out) / "tiny-sparse-seed4" / "README.md").read_text(encoding="utf-8")
    assert "weight density 0.25" in text
    assert "AbsTopK keeps: attn_in 0.5, attn_q 0.5, " in text
    dense = (pair.Path(small.out) / "tiny-dense" / "README.md").read_text(encoding="utf-8")
    assert "AbsTopK keeps: none." in dense
    n_out = round(0.25 * 12 * 16)
    assert f"| W_out | {n_out} | {12 * 16} | 0.2500 |" in text


def test_the_tasks_that_a_card_calls_solved_are_those_below_the_target(small, trained):
    found = trained[0][0]
    task = get("for_while", found.sparse.model.tokenizer, 48).name
    losses = {
        kind: replace(m.tasks[task], losses=torch.full((8,), value))
        for (kind, value), m in zip((("s", 0.1), ("d", 0.2)), found.members, strict=True)
    }
    made = Pair(
        3,
        replace(found.sparse, tasks={task: losses["s"]}),
        replace(found.dense, tasks={task: losses["d"]}),
    )
    table = model_card.task_table(made, small)
    assert table.endswith("| 0.100 | " + f"{losses['d'].accuracy:.3f} | 0.200 | sparse |")
    assert "by both 0 of 1" in table
    both = model_card.task_table(made, replace(small, target_loss=0.3))
    assert both.endswith("| both |")


# --------------------------------------------------------------------------------------------------
# the bridged model


def test_the_bridged_model_is_stored_with_bridges_that_know_both_models(small, trained):
    out = pair.Path(small.out)
    dense = SparseTransformer.from_pretrained(out / "tiny-dense")
    sparse = SparseTransformer.from_pretrained(out / "tiny-bridged")
    bridges = Bridges.from_pretrained(out / "tiny-bridges")
    assert bridges.made_for == {"dense": fingerprint(dense), "sparse": fingerprint(sparse)}
    assert BridgedPair(dense, sparse, bridges).sites == ("0.pre", "0.mid", "final")
    start = SparseTransformer.from_pretrained(out / "tiny-sparse")
    assert not torch.equal(start.W_E, sparse.W_E)
    record = training_record(out / "tiny-bridged")
    assert record.steps == BRIDGED_RUN.steps
    assert record.l0 == trained[0][0].sparse.record.l0
    assert any("tiny-bridged: validation loss" in line for line in trained[1])


def test_the_bridged_card_has_every_site_and_task(small, corpus, trained):
    text = (pair.Path(small.out) / "tiny-bridged" / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# tiny-bridged\n")
    out = pair.Path(small.out)
    dense = SparseTransformer.from_pretrained(out / "tiny-dense")
    model = SparseTransformer.from_pretrained(out / "tiny-bridged")
    own = BridgedPair(dense, model, Bridges.from_pretrained(out / "tiny-bridges"))
    found = bridged.Compared.of(own, corpus.validation_sequences(8, 48)).by_site()
    for site in ("0.pre", "0.mid", "final"):
        assert f"| {site} | {found.at[site, 'd→s']:.3f} | " in text
        assert f" | {found.at[site, 's→d']:.3f} | " in text
    for name in names():
        loss = evaluate_task(model, get(name, model.tokenizer, 48), 4).loss
        assert f"| `{name}` | " in text
        assert f" | {loss:.3f} | {trained[0][0].sparse.tasks[name].loss:.3f} | " in text
    assert command_line(small) in text
    assert small.cache not in text


def test_the_bridged_card_says_how_the_losses_fell():
    steps = range(20, 820, 20)
    metrics = pd.DataFrame({"step": steps, "language_model": [4.0] * 20 + [2.0] * 20})
    for site, value in (("0.pre", 1.0), ("final", 3.0)):
        metrics[f"dense_to_sparse/{site}"] = value
    *_, head, _, first, second, last = falling(metrics).split("\n")
    assert head == "| step | own loss | d→s |"
    assert first == "| 200 | 4.000 | 2.000 |"  # the tenth row, and the mean of two sites
    assert second == "| 400 | 4.000 | 2.000 |"
    assert last == "| 800 | 2.000 | 2.000 |"


# --------------------------------------------------------------------------------------------------
# the command


def test_the_command_says_where_the_models_are(monkeypatch, capsys, trained):
    monkeypatch.setattr("tl_sparse.cli.studies.train_pair", lambda config, say: trained[0][:1])
    cli.main(["pair", "--out", "here"])
    out = pair.Path("here")
    expected = f"Models: {out / 'tiny-sparse'}, {out / 'tiny-dense'}\n"
    assert capsys.readouterr().out == expected


def test_results_are_held_out_ones_of_every_task(trained):
    results = trained[0][0].sparse.tasks
    assert set(results) == set(names())
    assert {(r.split, r.seed, len(r.losses)) for r in results.values()} == {("held_out", 0, 8)}
