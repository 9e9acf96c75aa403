import torch

from tl_sparse.ablation.logit_diff import PackedBatch
from tl_sparse.circuits.slots import Slots


def test_every_token_has_one_slot_and_rows_find_it(pairs):
    batch = PackedBatch.of(pairs)
    slots = Slots.of(batch.rows(torch.tensor([3, 0, 3])))
    assert slots.tokens.shape[1] == int(batch.lengths[[3, 0, 3]].sum())
    cells = slots.cells.flatten()
    assert torch.equal(cells[slots.back], torch.arange(slots.tokens.shape[1]))
    for row, pair in enumerate((3, 0, 3)):
        n = int(batch.lengths[pair])
        assert torch.equal(slots.tokens[0, slots.cells[row, :n]], batch.packed.tokens[pair, :n])
        assert torch.equal(slots.places[0, slots.cells[row, :n]], batch.packed.positions[pair, :n])
    ends = slots.tokens[0, slots.ends].view(3, 2)
    for row, pair in enumerate((3, 0, 3)):
        for member in range(2):
            prompt = 2 * pair + member
            assert ends[row, member] == pairs.tokens[prompt, pairs.last[prompt]]
