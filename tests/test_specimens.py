"""Targets from masks, boxes and labels, and the strong augmentation."""

from __future__ import annotations

import numpy as np
import pytest
from torch import equal

from bcseg_batch.errors import UsageError
from bcseg_training.mixture import MixtureDataset, Source
from bcseg_training.specimens import (
    CELL,
    CORE,
    PLATELET,
    WHITE,
    Specimen,
    core_of,
    from_boxes,
    from_labels,
    from_mask,
    looks_stained,
)
from bcseg_training.strong import augment_strong, pyramid
from bcseg_training.synthetic import Kind
from bcseg_training.voc import Box


def disc(y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.ogrid[:300, :400]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def slide(*cells: tuple[float, float, float]) -> np.ndarray:
    image = np.full((300, 400, 3), (230, 228, 225), np.uint8)
    for cell in cells:
        image[disc(*cell)] = (190, 120, 130)
    return image


def box(kind: Kind, y: int, x: int, radius: int) -> Box:
    return Box(kind, x - radius, y - radius, x + radius, y + radius)


def test_a_hole_in_a_stained_ring_counts_as_stained() -> None:
    image = slide((150, 200, 40))
    image[disc(150, 200, 15)] = (230, 228, 225)
    assert looks_stained(image)[150, 200]
    assert not looks_stained(image)[20, 20]


def test_the_core_is_the_inner_half() -> None:
    labels = disc(150, 200, 40).astype(np.int32)
    core = core_of(labels)
    assert core.sum() == pytest.approx(labels.sum() / 4, rel=0.1)
    assert core[150, 200]


def test_the_image_s_border_is_no_edge_of_a_cell() -> None:
    core = core_of(disc(0, 200, 40).astype(np.int32))
    assert core[0, 200]


def test_cells_without_a_box_are_left_out_of_the_loss() -> None:
    image = slide((150, 100, 30), (150, 300, 30))
    specimen = from_boxes(image, [box(Kind.RED_CELL, 150, 100, 30)], None)
    assert specimen.target[150, 100, CELL] == 255
    assert specimen.weight[150, 100].tolist() == [255] * 4
    assert specimen.weight[150, 300].tolist() == [0] * 4
    assert specimen.target[20, 20].tolist() == [0] * 4
    assert specimen.weight[20, 20].tolist() == [255] * 4


def test_a_white_cell_takes_its_mask_s_shape() -> None:
    image = slide((150, 100, 40))
    white = disc(150, 100, 40) & (np.arange(300)[:, np.newaxis] < 160)
    specimen = from_boxes(image, [box(Kind.WHITE_CELL, 150, 100, 45)], white)
    assert specimen.target[140, 100, WHITE] == 255
    assert specimen.target[180, 100, WHITE] == 0


def test_platelets_are_no_cells() -> None:
    image = slide((150, 100, 40), (60, 300, 8))
    boxes = [box(Kind.RED_CELL, 150, 100, 40), box(Kind.PLATELET, 60, 300, 8)]
    specimen = from_boxes(image, boxes, None)
    assert specimen.target[60, 300].tolist() == [0, 0, 0, 255]
    assert specimen.weight[60, 300, PLATELET] == 255


def test_a_box_cut_by_the_border_says_nothing_of_the_core() -> None:
    specimen = from_boxes(slide((0, 200, 40)), [Box(Kind.RED_CELL, 160, 0, 240, 40)], None)
    assert specimen.weight[20, 200, CORE] == 0
    assert specimen.weight[20, 200, CELL] == 255


def test_stained_background_in_the_frame_of_a_mask_has_no_weight() -> None:
    image = slide((150, 200, 30), (10, 200, 25), (150, 100, 30))
    specimen = from_mask(image, disc(150, 200, 30))
    assert specimen.weight[5, 200, CELL] == 0
    # Inside the frame the mask is trusted.
    assert specimen.weight[150, 100, CELL] == 255
    assert specimen.target[150, 100, CELL] == 0


def specimen() -> Specimen:
    labels = np.zeros((300, 400), np.int32)
    labels[disc(100, 100, 30)] = 1
    labels[disc(180, 260, 45)] = 2
    labels[disc(60, 330, 8)] = 3
    image = slide((100, 100, 30), (180, 260, 45), (60, 330, 8))
    kinds = np.array([Kind.RED_CELL, Kind.WHITE_CELL, Kind.PLATELET], np.uint8)
    return from_labels(image, labels, kinds)


def test_labels_give_all_four_channels() -> None:
    made = specimen()
    assert made.target[100, 100].tolist() == [255, 255, 0, 0]
    assert made.target[180, 260].tolist() == [255, 255, 255, 0]
    assert made.target[60, 330].tolist() == [0, 0, 0, 255]
    assert (made.weight == 255).all()
    assert made.background == pytest.approx([230, 228, 225])


def test_the_strong_augmentation_keeps_shapes_ranges_and_seeds() -> None:
    source = pyramid(specimen())
    for seed in range(20):
        first, again = (
            augment_strong(np.random.default_rng(seed), source, size_px=96) for _ in range(2)
        )
        assert first.image.shape == (96, 96, 3)
        assert first.image.dtype == np.uint8
        assert first.target.shape == first.weight.shape == (96, 96, 4)
        assert 0 <= first.target.min() <= first.target.max() <= 1
        assert np.array_equal(first.image, again.image)
        assert np.array_equal(first.target, again.target)


def test_an_item_of_a_mixture_depends_on_its_key_alone() -> None:
    sources = [Source("a", 0.7, (specimen(),)), Source("b", 0.3, (specimen(),))]
    one = MixtureDataset(sources, crop_px=64, items=10, seed=3)
    other = MixtureDataset(sources, crop_px=64, items=10, seed=3)
    _ = other[0, 1], other[2, 5]
    for a, b in zip(one[1, 4], other[1, 4], strict=True):
        assert equal(a, b)
    assert not equal(one[1, 4][0], one[2, 4][0])


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        MixtureDataset([Source("nothing", 1, ())], crop_px=64, items=10, seed=0)
