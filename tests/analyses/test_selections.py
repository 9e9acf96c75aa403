import pytest
import torch

from tl_sparse.analyses import changed_selections

HOOKS = {"attn.topk_q": "attn.hook_q", "mlp.topk_neuron": "mlp.hook_post"}


def test_changes_are_counted_as_one_by_one(small_model, tokens):
    model, other = small_model("abstopk"), small_model("abstopk", seed=1)
    with torch.no_grad():
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            two.copy_(one + 0.05 * torch.randn_like(one))
    found = changed_selections(model, other, tokens, batch_size=1)
    caches = [m.run_with_cache(tokens)[1] for m in (model, other)]
    for layer in range(2):
        for place, hook in HOOKS.items():
            kept = changed = 0
            values = [cache[f"blocks.{layer}.{hook}"].flatten(2) for cache in caches]
            for row, column in [(r, c) for r in range(2) for c in range(tokens.shape[1])]:
                kept_by = [set(v[row, column].nonzero().flatten().tolist()) for v in values]
                kept += len(kept_by[0])
                changed += len(kept_by[0] - kept_by[1])
            assert found.kept[f"blocks.{layer}.{place}"] == kept
            assert found.changed[f"blocks.{layer}.{place}"] == changed
    assert 0 < found.share < 1
    difference = (model(tokens) - other(tokens)).abs().max()
    assert found.largest_difference == pytest.approx(float(difference), rel=1e-5)
    assert f"{found.share:.2%}" in repr(found)
    assert "blocks.1.attn.topk_q" in found._repr_html_()


def test_models_that_cannot_be_compared(small_model, tokens):
    for model, other in [("plain", "plain"), ("abstopk", "abstopk_resid"), ("plain", "abstopk")]:
        with pytest.raises(ValueError, match="must stand at the same places"):
            changed_selections(small_model(model), small_model(other), tokens)
    model = small_model("abstopk")
    with pytest.raises(ValueError, match="nothing to run"):
        changed_selections(model, model, tokens[:0])


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_only_a_cast_to_half_precision_of_a_model_with_abstopk_warns(small_model, recwarn, cast):
    def halved(option):
        model = small_model(option)
        return model.to(torch.float16) if cast == "to" else getattr(model, cast)()

    assert halved("plain").cfg.dtype in (torch.float16, torch.bfloat16)
    small_model("abstopk").double().to("cpu")
    assert not recwarn
    model = halved("abstopk")
    assert len(recwarn) == 1
    model.to(torch.bfloat16)  # half already
    assert len(recwarn) == 1


def test_a_model_that_is_stored_in_half_precision_loads_without_a_warning(
    small_model, tmp_path, recwarn
):
    from tl_sparse.model.transformer import SparseTransformer

    small_model("abstopk").save_pretrained(tmp_path / "model", dtype=torch.float16)
    SparseTransformer.from_pretrained(tmp_path / "model")
    assert not recwarn
