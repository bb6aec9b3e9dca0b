"""samdetr demo-app: what the page answers, and the page itself in a headless browser on this machine."""

import contextlib
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

import samdetr
from helpers import tiny_config, tiny_model
from samdetr.cli import demo_app, main
from samdetr.predictor import Predictor


@pytest.fixture
def predictor():
    return Predictor(tiny_config(), tiny_model())


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 96, 3), dtype=np.uint8)).save(path)
    return path


def test_a_click_finds_the_smallest_box_around_it_that_is_shown():
    boxes = [[0, 0, 100, 100], [10, 10, 50, 50], [20, 20, 40, 40], [60, 60, 90, 90]]
    instances = Instances(
        (100, 100), pred_boxes=Boxes(torch.tensor(boxes).float()), scores=torch.tensor([9, 8, 2, 7]) / 10
    )
    for x, y, found in ((30, 30, 1), (15, 15, 1), (75, 75, 3), (55, 55, 0), (20, 5, 0), (101, 50, None)):
        assert demo_app.smallest_around(instances, x, y, threshold=0.5) == found
    assert demo_app.smallest_around(instances, 30, 30, threshold=0.1) == 2
    assert demo_app.smallest_around(instances, 30, 30, threshold=0.95) is None


def test_a_click_is_scaled_from_the_enlarged_drawing(predictor, picture):
    page = demo_app.Page(predictor)
    detected, drawing, text, sheet = page.upload(str(picture), 0.0)
    assert text.startswith("Detections with a score of 0.00 or more: 100.") and sheet is None
    assert drawing.shape == (256, 384, 3)
    x0, y0, x1, y1 = detected.instances.pred_boxes.tensor[0].tolist()
    middle = [round(2 * (x0 + x1)), round(2 * (y0 + y1))]  # it is four times as large
    found = demo_app.smallest_around(detected.instances, middle[0] / 4, middle[1] / 4, 0.0)
    sheet, text = page.click(detected, drawing.shape[1], middle, 0.0)
    assert f"query {int(detected.instances.query_indices[found])}: " in text and sheet.std() > 0
    sheet, text = page.click(detected, drawing.shape[1], middle, 1.0)
    assert sheet is None and "no box at this point" in text


def test_the_threshold_changes_the_drawing(predictor, picture):
    page = demo_app.Page(predictor)
    detected, every, _, _ = page.upload(str(picture), 0.0)
    none, text = page.draw(detected, 1.0)
    assert "1.00 or more: 0." in text and (none != every).any()
    assert page.draw(None, 0.5) == (None, "")


def test_a_file_that_is_no_image_gets_a_line_that_does_not_say_where_it_is_kept(predictor, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    detected, drawing, text, sheet = demo_app.Page(predictor).upload(str(tmp_path / "notes.txt"), 0.3)
    assert (detected, drawing, sheet) == (None, None, None)
    assert "notes.txt is not an image" in text and str(tmp_path) not in text
    assert demo_app.Page(predictor).upload(None, 0.3) == (None, None, "", None)


def test_attention_that_a_model_does_not_expose_is_said_so(predictor, picture, monkeypatch):
    page = demo_app.Page(predictor)
    detected, *_ = page.upload(str(picture), 0.0)

    def refuse(*_):
        raise samdetr.UserError("does not expose its attention weights")

    monkeypatch.setattr(demo_app, "look_at", refuse)
    x0, y0, x1, y1 = detected.instances.pred_boxes.tensor[0].tolist()
    middle = [round(2 * (x0 + x1)), round(2 * (y0 + y1))]
    assert page.click(detected, 384, middle, 0.0) == (None, "does not expose its attention weights")


def test_an_address_that_cannot_be_used_is_refused_before_the_model_is_loaded():
    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["demo-app", "--weights", "no.pth", *map(str, arguments)])
        return ended.value.code

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"error: --port: 127.0.0.1:{port} cannot be used (Address already in use): name another port" in run(
            "--port", port
        )
    assert "error: --port: 127.0.0.1:70000 cannot be used" in run("--port", 70000)
    assert "error: --host: no.such.host.invalid is no address" in run("--host", "no.such.host.invalid")


def test_a_missing_gradio_is_named(monkeypatch, predictor):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(samdetr.UserError, match="pip install gradio"):
        demo_app.build_page(predictor)


@contextlib.contextmanager
def served(predictor):
    """Serve the page on a free port; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    blocks = demo_app.build_page(predictor)
    demo_app.serve(blocks, "127.0.0.1", port, wait=False)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        blocks.close(verbose=False)


@pytest.mark.slow
def test_the_page_in_a_browser(predictor, picture, tmp_path):
    pytest.importorskip("gradio", reason="needs: pip install gradio")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    (tmp_path / "notes.txt").write_text("no image")
    with served(predictor) as address, playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(60_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        text, drawing, sheet = (page.locator(f"#{name}") for name in ("text", "drawing img", "attention img"))
        page.goto(address)

        page.set_input_files("#image input[type=file]", str(picture))
        text.get_by_text("0.30 or more: 0.").wait_for()  # a model with random weights is not sure of anything
        before = drawing.get_attribute("src")
        number = page.locator("#threshold input[type=number]")
        number.fill("0")
        number.blur()
        text.get_by_text("0.00 or more: 100.").wait_for()
        page.wait_for_function("src => document.querySelector('#drawing img').src != src", arg=before)

        found = predictor(picture)
        x0, y0, x1, y1 = (found.pred_boxes.tensor[0] / torch.tensor([96, 64, 96, 64])).tolist()
        place = drawing.bounding_box()
        position = {"x": place["width"] * (x0 + x1) / 2, "y": place["height"] * (y0 + y1) / 2}
        drawing.click(position=position)
        sheet.wait_for()
        text.get_by_text("attends to, layer by layer").wait_for()

        page.locator("#image").get_by_label("Clear").click()
        page.set_input_files("#image input[type=file]", str(tmp_path / "notes.txt"))
        text.get_by_text("notes.txt is not an image that can be read").wait_for()
        assert drawing.count() == sheet.count() == 0
        chromium.close()
    assert {url.split("/")[2] for url in asked if url.startswith(("http", "ws"))} == {address.split("/")[2]}
