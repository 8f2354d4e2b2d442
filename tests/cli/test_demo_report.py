"""Pictures and the page: predictions are in the right place, and the page makes no requests."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from arm_cli.demo.baselines import nearest_class_mean, nearest_neighbour
from arm_cli.demo.report.figures import Curve, accuracy_figure, loss_figure, plane_figure
from arm_cli.demo.report.page import Page
from arm_cli.demo.report.pictures import (
    BLANK,
    LINE,
    MARK,
    animation,
    cluster_boxes,
    data_uri,
    error_image,
    panel,
    predicted_images,
    with_prediction,
)
from arm_core.explain.completion import fold_patches
from arm_core.model.reference.model import prediction_target, unfold_patches
from arm_core.model.spec import EncoderSpec, PredictionOrder, PretrainSpec, Target


def spec(target=Target.NORMALIZED):
    return PretrainSpec(
        encoder=EncoderSpec(width=16, depth=6, patch=2),
        image_size=(8, 12),
        cluster=(2, 3),
        prediction_order=PredictionOrder.COLUMN_REVERSE,
        target=target,
    )


def images(seed=0, count=2):
    return np.random.default_rng(seed).normal(size=(count, 8, 12, 3))


def test_folding_undoes_unfolding():
    x = images()
    assert (fold_patches(unfold_patches(x, 2), (4, 6), 2) == x).all()


@pytest.mark.parametrize("target", Target)
def test_a_perfect_prediction_paints_the_image_itself(target):
    x = images()
    prediction = prediction_target(spec(target), unfold_patches(x, 2))
    np.testing.assert_allclose(predicted_images(spec(target), x, prediction), x, atol=1e-12)


def test_only_the_first_cluster_is_given():
    x = images()
    prediction = np.zeros_like(prediction_target(spec(Target.RAW), unfold_patches(x, 2)))
    painted = predicted_images(spec(Target.RAW), x, prediction)
    kept = (painted == x).all(-1).all(0)
    expected = np.zeros((8, 12), bool)
    expected[4:, 6:] = True  # columns backwards start at the bottom right
    assert (kept == expected).all()


def test_unseen_clusters_are_blank_and_borders_are_where_the_clusters_are():
    image = np.full((8, 12), 100, np.uint8)
    assert cluster_boxes(spec())[0] == (6, 4, 12, 8)  # columns backwards start at the bottom right
    shown = np.asarray(panel(spec(), image, seen=1, factor=10))
    assert (shown[75, 95] == 100).all()
    assert (shown[15, 25] == BLANK).all()
    assert (shown[40, 60:] == LINE).all()
    marked = np.asarray(panel(spec(), image, mark=0, factor=10))
    assert (marked[41, 60:] == MARK).all()


def test_one_cluster_of_the_truth_is_replaced_by_its_prediction():
    truth, predicted = np.zeros((8, 12), np.uint8), np.full((8, 12), 9, np.uint8)
    mixed = with_prediction(spec(), truth, predicted, 1)
    left, top, right, bottom = cluster_boxes(spec())[1]
    assert (mixed[top:bottom, left:right] == 9).all()
    assert mixed.sum() == 9 * (right - left) * (bottom - top)


def test_the_error_is_white_where_prediction_and_truth_agree():
    assert error_image(np.array([[10, 255]], np.uint8), np.array([[10, 0]], np.uint8)).tolist() == [[255, 0]]


def test_the_animation_has_a_frame_for_each_prediction_and_the_truth():
    image = np.zeros((8, 12), np.uint8)
    uri = animation(spec(), [image, image], [image + 50, image + 80])
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).n_frames == spec().clusters


def test_the_page_escapes_text_and_is_self_contained(tmp_path):
    page = Page("A <b> & c", "lead")
    page.section("Section", "1 < 2")
    page.table(["x", "y"], [["<i>", 2]])
    page.code("a && b")
    curve = Curve(label="arm", steps=[0, 10], runs=np.array([[10.0, 50.0], [20.0, 70.0]]))
    page.figures(
        [
            loss_figure([0, 1, 2], [3.0, 2.0, 1.0], title="loss"),
            accuracy_figure([curve], {"line": 30.0}, title="t"),
            plane_figure(np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([0, 7]), title="p"),
        ]
    )
    picture = data_uri(Image.new("RGB", (4, 4)))
    page.picture(picture, "<description>", "caption")
    page.gallery([(picture, "<3: 9 %", False)])
    page.write(tmp_path / "report.html", "footer")
    text = (tmp_path / "report.html").read_text()
    assert "A &lt;b&gt; &amp; c" in text
    assert "&lt;i&gt;" in text
    assert 'src="data:image/png;base64,' in text
    for outside in ("<script", "<link", 'src="http', "url(http", "@import"):
        assert outside not in text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_baselines_find_the_nearest_image_and_the_nearest_mean():
    train = np.array([[0.0, 0.0], [0.0, 4.0], [10.0, 0.0]])
    labels = np.array([1, 1, 5])
    test = np.array([[0.0, 3.0], [6.0, 0.0]])
    assert nearest_neighbour(train, labels, test).tolist() == [1, 5]
    assert nearest_class_mean(train, labels, np.array([[0.0, 3.0], [4.0, 2.0]])).tolist() == [1, 1]
