import torch

from tl_sparse.circuits.mask_groups import MaskGroups

STAGES = {"a": 0, "b": 2, "c": 2}


def test_masks_part_at_the_first_stage_where_they_differ():
    masks = {
        "a": torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]),
        "b": torch.tensor([[1.0], [0.0], [0.0], [1.0]]),
        "c": torch.ones(4, 2),
    }
    groups = MaskGroups.of(masks, STAGES)
    assert groups.stages == (0, 2)
    early, late = groups.of_mask
    assert len(groups.first[0]) == 2
    assert len(groups.first[1]) == 3  # the first and the last mask are the same
    assert early[0] == early[1] == early[3] != early[2]
    assert late[0] == late[3]
    assert len({int(late[i]) for i in (0, 1, 2)}) == 3
    for hook, stage in (("a", early), ("b", late), ("c", late)):
        torch.testing.assert_close(groups.gates[hook][stage][:, 0], masks[hook])
    parents = groups.parents(0, 2)
    assert torch.equal(parents[late], early)
    found = torch.arange(3.0)
    assert torch.equal(groups.of_masks(found), late.float())


def test_groups_that_no_stage_splits_have_no_parents():
    masks = {"a": torch.tensor([[1.0], [0.0]]), "b": torch.ones(2, 1), "c": torch.zeros(2, 1)}
    groups = MaskGroups.of(masks, STAGES)
    assert groups.parents(0, 2) is None
    assert groups.parents(None, 2) is None
    assert MaskGroups({}, (), (), ()).parents(0, 2) is None
