"""Signed maps over images."""

from __future__ import annotations

import numpy as np

from service.pixels.overlay import draw_over


def test_the_largest_entry_hides_the_image_and_its_sign_gives_the_colour() -> None:
    image_CHW = np.full((1, 1, 4), 0.6)
    picture = draw_over(image_CHW, np.array([[[2.0, -2.0, 0.0, 1.0]]], np.float32))
    assert picture[:, 0, 0].tolist() == [220, 30, 30]
    assert picture[:, 0, 1].tolist() == [30, 60, 220]
    assert picture[:, 0, 2].tolist() == [153, 153, 153]
    assert picture[:, 0, 3].tolist() == [186, 92, 92]


def test_channels_are_added_and_any_number_of_them_is_drawn() -> None:
    image_CHW = np.random.default_rng(0).random((5, 2, 3))
    map_CHW = np.zeros((5, 2, 3), np.float32)
    map_CHW[:2, 0, 0], map_CHW[4, 1, 1] = 1.0, -1.0
    picture = draw_over(image_CHW, map_CHW)
    assert picture.shape == (3, 2, 3)
    assert picture[:, 0, 0].tolist() == [220, 30, 30]
    grey = np.rint(255 * image_CHW.mean(axis=0)).astype(np.uint8)
    assert (picture[:, 0, 1:] == grey[0, 1:]).all()
    assert (draw_over(image_CHW, np.zeros_like(map_CHW)) == grey).all()
    assert (draw_over(image_CHW, np.full_like(map_CHW, np.finfo(np.float32).max)) == picture[:, :1, :1]).all()
