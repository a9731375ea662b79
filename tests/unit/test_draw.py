"""Drawing: the right pixels change, and only those."""

import subprocess
import sys

import numpy as np
import pytest

from vision_service.imaging.draw import annotate
from vision_service.types import VOID, Classification, Detections, SegmentationMap, TranslatedImage

GREY = np.full((200, 300, 3), 128, np.uint8)


def detections(boxes):
    count = len(boxes)
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.arange(count),
        tuple(f"thing {i}" for i in range(count)),
        np.linspace(0.9, 0.5, count, dtype=np.float32),
    )


def changed(drawn, image=GREY):
    assert drawn.dtype == np.uint8
    assert drawn.shape == image.shape
    return (drawn != image).any(axis=2)


@pytest.mark.parametrize(
    "prediction",
    [
        Detections.empty(),
        Classification(np.empty(0, np.int64), (), np.empty(0, np.float32)),
        SegmentationMap(np.zeros((200, 300), np.uint8), ("nothing", "cat"), 0),
        SegmentationMap(np.full((200, 300), VOID, np.uint8), ("cat",)),
    ],
)
def test_nothing_found_changes_nothing(prediction):
    drawn = annotate(GREY, prediction)
    assert not changed(drawn).any()
    assert drawn is not GREY


def test_boxes_are_drawn_where_they_are():
    image = GREY.copy()
    where = changed(annotate(image, detections([[50, 80, 250, 180]])))
    np.testing.assert_array_equal(image, GREY)
    assert where[80:180, 50].mean() > 0.9
    assert where[180, 50:250].mean() > 0.9
    assert not where[100:160, 70:230].any()
    assert not where[:50].any()


def test_names_stay_inside_the_image():
    where = changed(annotate(GREY, detections([[2, 2, 120, 100]])))
    assert where[2:12, 4:60].mean() > 0.8  # the name's background; its letters' edges may be grey


def test_classes_have_colours_of_their_own():
    drawn = annotate(GREY, detections([[20, 60, 120, 180], [160, 60, 260, 180]]))
    assert (drawn[120, 20] != drawn[120, 160]).any()
    alone = annotate(GREY, detections([[20, 60, 120, 180]]))
    np.testing.assert_array_equal(drawn[120, 20], alone[120, 20])


def test_the_highest_score_is_on_top():
    box = [50, 80, 250, 180]
    np.testing.assert_array_equal(
        annotate(GREY, detections([box, box]))[130, 50], annotate(GREY, detections([box]))[130, 50]
    )


def test_masks_are_translucent_and_keep_to_their_class():
    class_map = np.zeros((200, 300), np.uint8)
    class_map[100:150, 100:200] = 1
    class_map[160:190, 10:60] = VOID
    image = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    drawn = annotate(image, SegmentationMap(class_map, ("nothing", "cat"), 0))
    where = changed(drawn, image)
    assert where[100:150, 100:200].mean() > 0.9
    assert not where[60:100].any()
    assert not where[150:].any()
    assert np.corrcoef(drawn[100:150, 100:200].ravel(), image[100:150, 100:200].ravel())[0, 1] > 0.5


def test_a_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match="image's size"):
        annotate(GREY, SegmentationMap(np.zeros((10, 10), np.uint8), ("cat",)))


def test_classes_are_written_line_by_line():
    def lines(count):
        names = tuple(f"class {i}" for i in range(count))
        scores = np.linspace(0.9, 0.1, count, dtype=np.float32)
        return changed(annotate(GREY, Classification(np.arange(count), names, scores)))

    one, three = lines(1), lines(3)
    assert 0 < one.sum() < three.sum() < GREY[..., 0].size / 2
    assert not three[100:].any()


def test_a_translated_image_is_the_picture():
    image = np.zeros((40, 60, 3), np.uint8)
    assert annotate(GREY, TranslatedImage(image)) is image


@pytest.mark.parametrize("hw", [(1, 1), (8, 6), (1, 400), (3000, 2000)])
def test_any_size_can_be_drawn_on(hw):
    image = np.full((*hw, 3), 128, np.uint8)
    height, width = hw
    box = detections([[0, 0, width, height]])
    assert changed(annotate(image, box), image).any()
    names = Classification(np.array([0]), ("cat",), np.array([0.5], np.float32))
    assert changed(annotate(image, names), image).any()
    annotate(image, SegmentationMap(np.ones(hw, np.uint8), ("nothing", "cat"), 0))


def test_lines_grow_with_the_image():
    def line_width(size):
        image = np.full((size, size, 3), 128, np.uint8)
        row = changed(annotate(image, detections([[size // 4, size // 4, size * 3 // 4, size * 3 // 4]])), image)
        return row[size // 2, : size // 2].sum()

    assert line_width(200) < line_width(1000) < line_width(2000)


def test_importing_costs_no_matplotlib():
    code = (
        "import sys, vision_service.imaging.draw; sys.exit({'matplotlib', 'supervision'} & set(sys.modules) != set())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_of_boxes_that_start_at_one_place_are_kept_apart():
    from vision_service.imaging.draw import _names_below

    # Lowest score first: the last one keeps its name above, the one that starts beside it gets it below.
    boxes = np.array([[200, 5, 300, 90], [2, 3, 280, 190], [6, 1, 290, 195]], np.float32)
    assert _names_below(boxes, 40).tolist() == [False, True, False]
    assert _names_below(boxes[:0], 40).tolist() == []
