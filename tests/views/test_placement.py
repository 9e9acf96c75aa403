import numpy as np

from tl_sparse.views.placement import barycentre, order_lanes, place_items


def test_barycentre_is_the_weighted_mean_of_the_neighbours():
    at = np.array([0, 0, 2])
    result = barycentre(at, np.array([1.0, 3.0, 5.0]), np.array([3.0, 1.0, 2.0]), 3, -1.0)
    assert result.tolist() == [1.5, -1.0, 5.0]


def test_items_stand_at_their_wish_when_there_is_room():
    wanted = np.array([5.0, 1.5])
    placed = place_items(wanted, np.array([0, 0]), np.array([1.0, 1.0]), 8.0)
    assert placed.tolist() == [5.0, 1.5]


def test_items_of_equal_wish_share_it_evenly():
    placed = place_items(np.full(3, 4.0), np.zeros(3, int), np.array([1.0, 2.0, 1.0]), 8.0)
    assert np.allclose(placed, [2.5, 4.0, 5.5])


def test_items_are_kept_inside_the_frame():
    placed = place_items(np.array([0.0, 0.0, 9.0]), np.zeros(3, int), np.ones(3), 3.0)
    assert np.allclose(placed, [0.5, 1.5, 2.5])


def test_rows_are_placed_apart():
    placed = place_items(np.array([2.0, 2.0]), np.array([0, 1]), np.ones(2), 4.0)
    assert placed.tolist() == [2.0, 2.0]


def test_lane_order_follows_the_items_of_another_row():
    # Lanes 0, 2 belong to item 0 and lanes 1, 3 to item 1: each pair must become neighbours.
    lane, item = np.array([0, 2, 1, 3]), np.array([0, 0, 1, 1])
    order = order_lanes(lane, item, np.ones(4), np.zeros(2, int), 4, 1)
    assert abs(order[0] - order[2]) == 1
    assert abs(order[1] - order[3]) == 1
    assert sorted(order.tolist()) == [0, 1, 2, 3]
