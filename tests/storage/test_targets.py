import numpy as np

from storage.targets import positions_of


def test_every_token_but_the_first_is_a_target_without_a_mask():
    assert positions_of(None, 4).tolist() == [0, 1, 2]
    assert positions_of(None, 1).tolist() == positions_of(None, 0).tolist() == []


def test_a_position_predicts_the_token_after_it():
    mask = np.array([True, False, True, True, False])
    assert positions_of(mask, 5).tolist() == [1, 2]
