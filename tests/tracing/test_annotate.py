"""Graphs pruned and labelled: by rule, and by a server that answers well and badly."""

import json
import os
from dataclasses import replace

import pandas as pd
import pytest
import torch

from tests.tracing.chat_server import chat_server
from tests.tracing.graphs import ROOT, hand_graph
from tl_sparse.tracing import Dictionary
from tl_sparse.tracing.annotation import (
    LLMAnnotator,
    RuleAnnotator,
    annotate,
    check_labels,
    feature_cards,
)
from tl_sparse.tracing.annotation.answers import BadAnswer
from tl_sparse.tracing.annotation.cards import Example, FeatureCard
from tl_sparse.tracing.annotation.label_tests import balanced
from tl_sparse.tracing.annotation.rule import RuleJudge, tokens_of

QUOTE, NAME, EMBED = "1.mlp/2/7", "0.attn/1/3", "embed/1/3"


def card(site, index, peak):
    shown = Example(("x", peak, "y"), (0.0, 2.0, 0.0))
    silent = Example(("x", "z", "y"), (0.0, 0.0, 0.0))
    return FeatureCard(site, index, 0.1, (shown, shown), (shown, silent), (" ok",), (" no",))


CARDS = {
    ("1.mlp", 7): card("1.mlp", 7, "'"),
    ("0.attn", 3): card("0.attn", 3, '"'),
    ("embed", 3): card("embed", 3, "(,"),
}


def kept(*ids):
    every = (QUOTE, NAME, EMBED)
    return {
        "keep": list(ids),
        "drop": [{"id": i, "reason": "incidental"} for i in every if i not in ids],
        "labels": [{"id": i, "label": f"label of {i}", "confidence": 0.5} for i in ids],
    }


WHOLE = {"supernodes": [{"name": "quotes", "ids": [QUOTE]}], "summary": "It closes the quote.",
         "mechanism_steps": ["reads the quote", "raises it"]}  # fmt: skip


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


# --------------------------------------------------------------------------------------------------
# by rule


def test_the_rule_keeps_the_largest_and_names_peaks():
    """By hand: of attributions 4, 1.5 and 1.5 the first two have 5.5 / 7 < 0.8."""
    found = annotate(hand_graph(), CARDS, RuleAnnotator(share=0.7))
    assert found.keep == (QUOTE, NAME)
    assert found.labels[QUOTE].text == "at \"'\"; raises ' ok'"
    assert found.labels[QUOTE].confidence == 1.0
    assert found.dropped == {EMBED: "rank 3 by attribution"}
    assert found.steps[0].startswith(f"{QUOTE} (+4)")
    assert annotate(hand_graph(), CARDS, RuleAnnotator(), n_nodes=1).keep == (QUOTE,)
    assert annotate(hand_graph(), CARDS, RuleAnnotator(share=1.0)).keep == (QUOTE, NAME, EMBED)
    table = found.to_dataframe()
    assert table["kept"].tolist() == [True, True, False]
    assert list(found.rating_sheet()["id"]) == [QUOTE, NAME]
    assert "2 of 3 features kept" in repr(found)
    assert "&#" in found._repr_html_() or "at" in found._repr_html_()


def test_a_graph_without_edges_is_annotated_too():
    found = annotate(replace(hand_graph(), edges=pd.DataFrame()), CARDS, RuleAnnotator(), n_nodes=1)
    assert found.keep == (QUOTE,)


def test_the_pruned_graph_has_what_is_kept_and_the_leaves():
    found = annotate(hand_graph(), CARDS, RuleAnnotator(), n_nodes=1)
    assert set(found.pruned.nodes["id"]) == {ROOT, QUOTE, "1.mlp/2/error", "token/1", "bias/2"}
    assert set(found.pruned.edges["source"]) == {QUOTE, "1.mlp/2/error"}


def test_checks_of_the_rule_by_hand():
    """Its tokens stand in the active example and not in the silent one; marks likewise."""
    cards = {**CARDS, ("0.attn", 3): replace(
        CARDS["0.attn", 3], held_out=CARDS["1.mlp", 7].held_out  # active at another token
    )}  # fmt: skip
    found = annotate(hand_graph(), cards, RuleAnnotator(share=1.0))
    tests = check_labels(found, cards, RuleJudge()).to_dataframe().set_index("id")
    assert tests.loc[QUOTE, ["detection", "fuzzing"]].tolist() == [1.0, 1.0]
    assert tests.loc[NAME, ["detection", "fuzzing"]].tolist() == [0.5, 0.5]
    assert tests.loc[EMBED, "detection"] == 1.0  # a token with a comma and a bracket in it
    assert tokens_of("anything else") == set()


def test_balanced_accuracy():
    assert balanced([True, True, True, False], [True, True, False, False]) == pytest.approx(5 / 6)
    assert pd.isna(balanced([True], [True]))


def test_cards_say_where_a_feature_is_active(small_model, make_tokenizer):
    """A feature that is one channel of the embedding, against a plain loop over the tokens."""
    model = small_model(tokenizer=make_tokenizer())
    width, d_vocab = model.W_E.shape[1], model.W_U.shape[1]
    W_enc = torch.eye(width)[:, :2]
    dictionary = Dictionary("hook_embed", "hook_embed", W_enc, torch.zeros(2),
                            W_enc.T.contiguous(), torch.zeros(width))  # fmt: skip
    tokens = torch.randint(3, 30, (12, 9))
    (found,) = feature_cards(model, [dictionary], [("embed", 1)], tokens, n_examples=3).values()
    values = model.W_E[:, 1].detach()[tokens].clamp(min=0)
    assert found.frequency == pytest.approx(float((values > 0).float().mean()))
    best = values[:6].max(1).values.sort(descending=True).values[:3]
    peaks = [max(example.activations) for example in found.examples]
    assert peaks == pytest.approx(best.tolist(), abs=1e-3)
    effect = (model.ln_final.w.detach() * W_enc[:, 1]) @ model.W_U.detach()
    assert found.raises[0] == model.tokenizer.decode([int(effect.argmax())])
    assert len(found.raises) == min(6, d_vocab)
    with pytest.raises(ValueError, match="no dictionary has the feature embed/9"):
        feature_cards(model, [dictionary], [("embed", 9)], tokens)


# --------------------------------------------------------------------------------------------------
# by a language model

pytest.importorskip("openai", reason="the official client: pip install 'tl-sparse[annotate]'")


def test_a_server_prunes_and_labels(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    with chat_server([kept(QUOTE, EMBED), WHOLE]) as (url, requests):
        annotator = LLMAnnotator("some-model", url)
        found = annotate(hand_graph(), CARDS, annotator, task="closes a quote", n_nodes=2)
    assert found.keep == (QUOTE, EMBED)
    assert found.labels[EMBED].text == f"label of {EMBED}"
    assert found.summary == "It closes the quote."
    assert found.supernodes == {"quotes": (QUOTE,)}
    assert found.by == "some-model"
    first = requests[0]
    assert first["path"] == "/v1/chat/completions"
    assert first["key"] == "Bearer from-the-environment"
    form = first["body"]["response_format"]
    assert form["type"] == "json_schema"
    assert form["json_schema"]["strict"] is True
    assert form["json_schema"]["schema"]["additionalProperties"] is False
    assert first["body"]["temperature"] == 0.0
    asked = json.loads(first["body"]["messages"][1]["content"])
    assert asked["keep_about"] == 2
    assert asked["nodes"][0]["top_examples"][0] == ["x\t0", "'\t2", "y\t0"]
    assert "from-the-environment" not in repr(annotator) + json.dumps(annotator.log)
    costs = annotator.costs()
    assert costs["prompt_tokens"].tolist() == [11, 11]
    assert costs["kind"].tolist() == ["nodes", "whole"]


BAD = {
    "no JSON": "I think that",
    "cut off": '{"keep": ["1.mlp/2/7"',
    "a list": [1, 2],
    "no keys": {},
    "an unknown id": kept("1.mlp/2/8"),
    "twice": {**kept(QUOTE, NAME, EMBED), "keep": [QUOTE, QUOTE, NAME, EMBED]},
    "kept and dropped": {**kept(QUOTE, NAME, EMBED), "drop": [{"id": QUOTE, "reason": ""}]},
    "neither": {**kept(QUOTE), "drop": []},
    "no label": {**kept(QUOTE), "labels": []},
    "too sure": {**kept(), "labels": [{"id": QUOTE, "label": "a", "confidence": 7}]},
    "extra": {**kept(QUOTE), "more": 1},
    "an id that is no text": {**kept(QUOTE), "keep": [None]},
    "endless": {**kept(QUOTE), "drop": [{"id": NAME, "reason": "x" * 5000}]},
    "nothing": "",
    "nan": '{"keep": NaN}',
}


def test_a_bad_answer_is_sent_back_with_what_is_wrong():
    answers = [each for bad in BAD.values() for each in (bad, kept(QUOTE), WHOLE)]
    with chat_server(answers) as (url, requests):
        annotator = LLMAnnotator("some-model", url)
        for number, name in enumerate(BAD):
            found = annotate(hand_graph(), CARDS, annotator, task=name)
            assert found.keep == (QUOTE,), name
            assert len(requests) == 3 * (number + 1), name
            said = requests[3 * number + 1]["body"]["messages"]
            assert [m["role"] for m in said] == ["system", "user", "assistant", "user"], name
            wrong = said[3]["content"].removesuffix(". Answer again.")
            assert wrong != said[3]["content"]
            assert annotator.costs()["error"][3 * number] == wrong


def test_a_server_that_never_answers_well_is_given_up():
    with chat_server(["no"]) as (url, requests):
        with pytest.raises(BadAnswer, match="no usable answer in 2 tries: the answer is no valid"):
            annotate(hand_graph(), CARDS, LLMAnnotator("m", url, tries=2))
        assert len(requests) == 2


def test_a_body_without_choices_is_a_bad_answer():
    body = b'{"id": "x", "object": "chat.completion", "choices": []}'
    with chat_server([body, kept(QUOTE), WHOLE]) as (url, _):
        assert annotate(hand_graph(), CARDS, LLMAnnotator("m", url)).keep == (QUOTE,)


def test_a_refused_key_is_the_clients_error():
    import openai

    with chat_server([401]) as (url, requests):
        with pytest.raises(openai.AuthenticationError):
            annotate(hand_graph(), CARDS, LLMAnnotator("m", url))
        assert len(requests) == 1


def test_without_a_key_openais_endpoint_is_not_asked():
    with pytest.raises(ValueError, match="set the environment variable OPENAI_API_KEY"):
        annotate(hand_graph(), CARDS, LLMAnnotator("m"))


def test_answers_are_kept_by_content(tmp_path):
    plain = WHOLE | {"supernodes": []}
    answers = [kept(QUOTE), WHOLE, kept(NAME), plain, kept(NAME), plain]
    with chat_server(answers) as (url, requests):
        for _ in range(2):
            annotator = LLMAnnotator("m", url, tmp_path)
            assert annotate(hand_graph(), CARDS, annotator).keep == (QUOTE,)
        assert len(requests) == 2
        assert annotator.costs()["cached"].tolist() == [True, True]
        assert annotator.all_costs()["cached"].tolist() == [False, False, True, True]
        other = annotate(hand_graph(), CARDS, annotator, task="another")  # another question
        assert other.keep == (NAME,)
        for path in tmp_path.glob("*.json"):  # damaged answers are asked anew
            path.write_text('{"answer": {"keep": ["x"]}}')
        annotate(hand_graph(), CARDS, annotator, task="another")
        assert len(requests) == 6


def test_large_graphs_are_cut_by_layer():
    def answer(body):
        request = json.loads(body["messages"][1]["content"])
        if "keep_about" not in request:
            return WHOLE | {"supernodes": []}
        ids = [row["id"] for row in request["nodes"]]
        return {"keep": ids, "drop": [],
                "labels": [{"id": i, "label": "x", "confidence": 1} for i in ids]}  # fmt: skip

    with chat_server([answer]) as (url, requests):
        found = annotate(hand_graph(), CARDS, LLMAnnotator("m", url), chunk=2)
    layers = [
        {row["layer"] for row in json.loads(r["body"]["messages"][1]["content"])["nodes"]}
        for r in requests[:-1]
    ]
    assert layers == [{-1}, {0}, {1}]
    assert found.keep == (QUOTE, NAME, EMBED)  # in the graph's order


def test_a_server_judges_labels():
    with chat_server([{"answers": [True, False]}]) as (url, requests):
        found = annotate(hand_graph(), CARDS, RuleAnnotator(), n_nodes=1)
        tests = check_labels(found, CARDS, LLMAnnotator("m", url))
    assert tests.table.loc[0, ["detection", "fuzzing"]].tolist() == [1.0, 1.0]
    texts = json.loads(requests[1]["body"]["messages"][1]["content"])["texts"]
    assert texts[0] == "x<<'>>y"
    assert "mean detection 1.000" in repr(tests)


def test_a_judge_who_counts_wrong_is_asked_again():
    with chat_server([{"answers": [True]}, {"answers": [1, 0]}, {"answers": [True, False]}]) as (
        url, requests,
    ):  # fmt: skip
        found = annotate(hand_graph(), CARDS, RuleAnnotator(), n_nodes=1)
        check_labels(found, CARDS, LLMAnnotator("m", url))
    assert len(requests) == 4
    assert "2 texts need 2 answers, not 1" in requests[1]["body"]["messages"][3]["content"]


def test_a_feature_without_a_card_is_named():
    with pytest.raises(ValueError, match=r"no card of 0\.attn/3"):
        annotate(hand_graph(), {("1.mlp", 7): CARDS["1.mlp", 7]}, RuleAnnotator())
    assert os.environ.get("OPENAI_API_KEY") is None
