"""samdetr.visualization.curves: the numbers of metrics.json, and the authors'."""

import json

import pytest

from samdetr.visualization import (
    draw_curves,
    published_curves,
    published_names,
    read_metrics,
)


def write_metrics(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_metrics_of_a_resumed_run(tmp_path):
    lines = [{"iteration": i, "epoch": (i + 1) / 10, "total_loss": 9 - i, "lr": 0.1} for i in (1, 3, 5)]
    lines += [{"iteration": 4, "bbox/AP": 7.0}, {"iteration": 3, "epoch": 0.4, "total_loss": 5.5, "lr": 0.1}]
    metrics = read_metrics(write_metrics(tmp_path / "metrics.json", lines).parent)
    assert metrics["total_loss"] == [(1, 0.2, 8), (3, 0.4, 5.5), (5, 0.6, 4)]
    assert metrics["bbox/AP"][0][0] == 4


@pytest.mark.parametrize("content", [b"", b"no json", b'{"lr": 1}', b"[1]", b"\x80\x02\xff"])
def test_files_that_are_no_metrics(tmp_path, content):
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.json (holds no metrics|is not a run's)"):
        read_metrics(tmp_path)


def test_an_unfinished_line_costs_itself_only(tmp_path, caplog):
    path = write_metrics(tmp_path / "metrics.json", [{"iteration": 1, "lr": 0.5}, {"iteration": 2, "lr": 0.25}])
    path.write_text(path.read_text()[:-8])
    assert read_metrics(path)["lr"] == [(1, pytest.approx(float("nan"), nan_ok=True), 0.5)]
    assert "line 2 is not a line of metrics" in caplog.text


def test_a_run_without_known_metrics(tmp_path):
    metrics = read_metrics(write_metrics(tmp_path / "metrics.json", [{"iteration": 1, "mine": 2.0}]))
    with pytest.raises(ValueError, match="has none of the metrics that are drawn"):
        draw_curves({"mine": metrics})


def test_each_of_several_datasets_has_a_curve_of_its_ap(tmp_path):
    lines = [{"iteration": i, "lr": 0.1, "night/bbox/AP": 7.0 + i, "day/bbox/AP": 9.0 + i} for i in (1, 2)]
    figure = draw_curves({"mine": read_metrics(write_metrics(tmp_path / "metrics.json", lines))})
    found = {axis.get_title(): axis.lines[0].get_ydata().tolist() for axis in figure.axes if axis.lines}
    assert found["box AP on night"] == [8.0, 9.0] and found["box AP on day"] == [10.0, 11.0]


def test_missing_metrics(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.json: there is no such file"):
        read_metrics(tmp_path)


def test_curves_lie_where_the_numbers_are(tmp_path):
    lines = [{"iteration": i, "epoch": (i + 1) / 10, "total_loss": 9 - i, "lr": 0.1, "time": 1.0} for i in (1, 3)]
    lines += [{"iteration": 2, "bbox/AP": 7.0}]
    metrics = read_metrics(write_metrics(tmp_path / "metrics.json", lines))
    figure = draw_curves({"mine": metrics})
    axes = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert all(axis.axison == bool(axis.get_title()) for axis in figure.axes)  # no empty panel is left
    assert set(axes) == {"training loss, all layers", "box AP", "learning rate", "seconds per step"}
    loss = axes["training loss, all layers"]
    assert loss.lines[0].get_xydata().tolist() == [[1, 8], [3, 6]] and loss.get_xlabel() == "iteration"
    published = draw_curves({"mine": metrics}, ["r50_smca_e12", "r50_e12"])
    axes = {axis.get_title(): axis for axis in published.axes}
    assert axes["box AP"].get_xlabel() == "epoch"
    theirs, others, mine = axes["box AP"].lines
    assert theirs.get_xdata().tolist() == list(range(1, 13)) and theirs.get_label() == "r50_smca_e12 (published, COCO)"
    assert theirs.get_linestyle() != others.get_linestyle()
    assert mine.get_xydata().tolist() == [[pytest.approx(0.3), 7.0]]  # halfway between what is known


def test_published_curves_are_the_papers():
    assert len(published_names()) == 12
    assert published_curves("r50_dc5_e12")["bbox/AP"][0][1:] == (1, 12.42)
    with pytest.raises(ValueError, match="nothing: there is no such published model; choose from r50"):
        published_curves("nothing")


def test_published_curves_need_epochs(tmp_path):
    metrics = read_metrics(write_metrics(tmp_path / "metrics.json", [{"iteration": 1, "total_loss": 2.0}]))
    with pytest.raises(ValueError, match="mine does not record its epochs"):
        draw_curves({"mine": metrics}, ["r50_e12"])
