from dataclasses import replace

import torch

from tl_sparse.faithfulness.controls import on
from tl_sparse.faithfulness.optimal_ablation import optimal_values


def test_optimal_constants_lower_the_loss_and_leave_kept_nodes_alone(whole):
    kept = whole.kept.clone()
    kept[torch.nonzero(kept)[-1]] = False  # a link is missing: nothing can replace it
    masks = torch.stack([whole.kept, kept])
    values = optimal_values(whole, masks)
    assert values.shape == masks.shape
    known = on(whole, whole.train_batch.pairs(0, whole.config.few_pairs))
    own = known.losses(masks).mean(1)
    learned = torch.stack(
        [known.losses(mask[None], row)[0] for mask, row in zip(masks, values, strict=True)]
    ).mean(1)
    assert (learned <= own).all()
    assert learned[0] < 0.9 * own[0]
    assert learned[1] > 0.6
    assert torch.equal(values[0][whole.kept], whole.values[whole.kept])


def test_the_optimal_constant_is_found(whole):
    """Shifted values make the circuit fail; learned ones make up for it."""
    shifted = replace(whole.circuit.means, values=whole.values + 0.5)
    far = replace(whole, circuit=replace(whole.circuit, means=shifted),
                  config=replace(whole.config, constant_steps=60))  # fmt: skip
    own = float(far.losses(whole.kept[None]).mean())
    values = optimal_values(far, whole.kept[None])
    learned = float(far.losses(whole.kept[None], values[0]).mean())
    best = float(whole.losses(whole.kept[None]).mean())
    assert learned < 0.5 * own
    assert learned < best + 0.1
