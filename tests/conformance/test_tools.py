"""Head detector, evals, test_prompt and TransformerLens' training loop."""

import importlib

import pytest
import torch
from transformer_lens import evals, head_detector

from tests.conformance.models import build, every_option, expressible, reference, theirs
from tl_sparse import compat

TEXT = "w5 w9 w20 w5 w9 w20 w5"


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --------------------------------------------------------------------------------------------------
# head_detector


def detected(model, tokens, kind, *, exclude_bos, exclude_current):
    """Share of each head's attention that is where the pattern says, from the cached patterns."""
    n = tokens.shape[1]
    wanted = torch.zeros(n, n)
    for q in range(n):
        for k in range(q):
            same, induced = tokens[0, q] == tokens[0, k], tokens[0, q] == tokens[0, k - 1] and k > 0
            hit = {"previous_token_head": k == q - 1, "duplicate_token_head": same,
                   "induction_head": induced}[kind]  # fmt: skip
            wanted[q, k] = float(hit)
    _, cache = model.run_with_cache(tokens)
    scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        pattern = cache["pattern", layer][0].clone()
        if exclude_bos:
            pattern[:, :, 0] = 0
        if exclude_current:
            pattern.diagonal(dim1=-2, dim2=-1).zero_()
        scores[layer] = (pattern * wanted).sum((-2, -1)) / pattern.sum((-2, -1))
    return scores


@every_option
@pytest.mark.parametrize("kind", ["previous_token_head", "duplicate_token_head", "induction_head"])
def test_heads_are_detected_by_their_share_of_attention(claim, option, kind):
    claim("head_detector.detect_head", option, "unchanged")
    model = build(option)
    for flags in ({}, {"exclude_bos": True, "exclude_current_token": True}):
        scores = head_detector.detect_head(model, TEXT, kind, **flags)
        expected = detected(model, model.to_tokens(TEXT), kind,
                            exclude_bos=bool(flags), exclude_current=bool(flags))  # fmt: skip
        close(scores, expected)
        if expressible(option):
            close(scores, head_detector.detect_head(reference(option), TEXT, kind, **flags))


@every_option
def test_heads_are_detected_by_distance_for_given_heads_and_cache(claim, option):
    claim("head_detector.detect_head", option, "unchanged")
    model = build(option)
    pattern = torch.eye(8)
    _, cache = model.run_with_cache(TEXT, remove_batch_dim=True)
    scores = head_detector.detect_head(
        model, TEXT, pattern, heads=[(1, 2)], cache=cache, error_measure="abs"
    )
    distance = (cache["pattern", 1][2] - pattern).abs().mean() * 8
    assert scores[1, 2].item() == pytest.approx(1 - distance.item(), abs=1e-3)
    scores[1, 2] = -1
    assert (scores == -1).all()


# --------------------------------------------------------------------------------------------------
# evals

# They download a data set, or need the words of one: there is nothing of the model in them that
# the evals below do not call.
DOWNLOADS = {
    "make_wiki_data_loader", "make_owt_data_loader", "make_pile_data_loader",
    "make_code_data_loader", "make_mmlu_data_loader", "evaluate", "mmlu_eval",
}  # fmt: skip
TESTED = {"sanity_check", "evaluate_on_dataset", "induction_loss", "ioi_eval", "IOIDataset"}


def test_every_eval_is_classified():
    own = {
        name
        for name, value in vars(evals).items()
        if getattr(value, "__module__", "") == evals.__name__ and not name.startswith("_")
    }
    assert TESTED <= own <= DOWNLOADS | TESTED


@every_option
def test_loss_on_a_data_set_is_the_mean_over_batches(claim, option):
    claim("evals.evaluate_on_dataset", option, "unchanged")
    model = build(option)
    batches = torch.randint(3, 30, (3, 2, 6))
    loader = [{"tokens": batch} for batch in batches]
    loss = evals.evaluate_on_dataset(model, loader, device="cpu")
    log_probs = model(batches.flatten(0, 1)).log_softmax(-1)[:, :-1]
    targets = batches.flatten(0, 1)[:, 1:, None]
    assert loss == pytest.approx(-log_probs.gather(-1, targets).mean().item(), abs=1e-5)
    if expressible(option):
        theirs = evals.evaluate_on_dataset(reference(option), loader, device="cpu")
        assert loss == pytest.approx(theirs, abs=1e-5)


@every_option
def test_sanity_check_is_the_loss_of_its_text(claim, option):
    claim("evals.sanity_check", option, "unchanged")
    model = build(option, n_ctx=128)
    # our small vocabulary knows none of its words, so all of them are one token here
    model.tokenizer.add_special_tokens({"unk_token": "w29"})
    model.tokenizer.backend_tokenizer.model.unk_token = "w29"
    lengths = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: lengths.append(x.shape[1]))]):
        loss = evals.sanity_check(model)
    text = torch.tensor([[1] + [29] * (lengths[0] - 1)])
    assert lengths[0] > 40
    close(loss, model(text, return_type="loss"))


@every_option
def test_induction_loss_is_the_loss_on_the_second_half(claim, option, monkeypatch):
    claim("evals.induction_loss", option, "unchanged")
    model = build(option)
    half = torch.randint(3, 30, (4, 6))
    draw = torch.randint
    # it draws ids of 100 to 20000, which a small vocabulary does not have
    monkeypatch.setattr(torch, "randint", lambda low, high, shape: half)
    loss = evals.induction_loss(model, subseq_len=6, device="cpu")
    monkeypatch.setattr(torch, "randint", draw)
    tokens = torch.cat([half, half], 1)
    tokens[:, 0] = 1
    log_probs = model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    close(loss, -log_probs[:, 7:].mean())


@every_option
def test_ioi_eval_is_the_logit_difference_of_the_names(claim, option):
    claim("evals.ioi_eval, IOIDataset", option, "unchanged")
    model = build(option)
    data = evals.IOIDataset(
        model.tokenizer, num_samples=6, seed=3, names=["w4", "w7", "w9"],
        templates=["[A] w12 [B] w13 [B] [OBJECT] [A]"], nouns={"OBJECT": ["w20", "w21"]},
    )  # fmt: skip
    result = evals.ioi_eval(model, dataset=data, batch_size=2)
    differences = []
    for sample in data:
        logits = model(sample["prompt"][None])[0, -2]
        differences.append((logits[sample["IO"][0]] - logits[sample["S"][0]]).item())
    assert result["Logit Difference"] == pytest.approx(sum(differences) / 6, abs=1e-5)
    assert result["Accuracy"] == sum(d > 0 for d in differences) / 6


# --------------------------------------------------------------------------------------------------
# exploring and training


@every_option
def test_test_prompt_reports_the_rank_and_logit_of_the_answer(claim, option, capsys):
    claim("utils.test_prompt", option, "unchanged")
    model = build(option)
    compat.tl_utils.test_prompt("w5 w9 w20", "w11", model, top_k=3)
    printed = capsys.readouterr().out
    logits = model("w5 w9 w20")[0, -1]
    rank = int((logits > logits[11]).sum())
    assert f"[('w11', {rank})]" in printed or f"[(' w11', {rank})]" in printed
    assert f"Logit: {logits[11].item():5.2f} Prob: {logits.softmax(-1)[11].item():6.2%}" in printed
    for place, token in enumerate(logits.topk(3).indices.tolist()):
        assert f"Top {place}th token. Logit: {logits[token].item():5.2f}" in printed


def training_loop():
    """(config class, train), wherever the installed TransformerLens keeps them."""
    if compat.HAS_HOOKED_TRANSFORMER:
        module = importlib.import_module("transformer_lens.train")
        return module.HookedTransformerTrainConfig, module.train
    module = importlib.import_module("transformer_lens.tools.training")
    return module.TrainConfig, module.train


@every_option
def test_transformer_lens_training_loop_trains_the_model(claim, option):
    claim("train.train, tools.training.train", option, "unchanged")
    Config, train = training_loop()
    data = [{"tokens": row} for row in torch.randint(3, 30, (8, 6))]
    config = Config(num_epochs=1, batch_size=4, lr=0.05, optimizer_name="SGD", device="cpu")
    model = build(option)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = model(torch.stack([row["tokens"] for row in data]), return_type="loss").item()
    assert train(model, config, data) is model
    end = model.eval()(torch.stack([row["tokens"] for row in data]), return_type="loss").item()
    assert end < start
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    # keys shift all scores of a query alike by their bias, so its gradient is zero
    dead = {f"blocks.{layer}.attn.b_K" for layer in range(2)} - set(moved)
    assert set(moved) | frozen | dead == set(before)
    if option == "standard":  # the only one whose parameters are theirs, one for one, but b_U
        other = theirs(build(option))
        other.unembed.b_U.requires_grad_(False)
        train(other, config, data)
        tokens = torch.tensor([[1, 5, 9, 20]])
        close(model(tokens), other.eval()(tokens), 1e-4)
