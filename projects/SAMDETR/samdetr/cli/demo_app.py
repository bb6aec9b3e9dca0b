"""Show detections on a page in the browser: upload an image, move the threshold, click a box to see what its query attends to.

    samdetr demo-app --weights output/demo/model_final.pth

The page is at http://127.0.0.1:7860 until the program is interrupted. It can be opened on this machine only, unless --host
names another address: with 0.0.0.0, everyone on the network can open it. It sends nothing to anyone else. It needs:
pip install gradio
"""

import argparse
import os
import socket
from dataclasses import dataclass

import numpy as np
from detectron2.structures import Instances

from ..errors import UserError, import_extra
from ..predictor import Predictor
from ..visualization import draw_attention, draw_detections
from .attention import describe, look_at
from .common import SCORE_THRESHOLD, add_model_arguments, load_predictor


@dataclass
class Detected:
    """An uploaded image, (H, W, 3) uint8, RGB, and what was detected in it."""

    image: np.ndarray
    instances: Instances


class Page:
    """What the page does: each method answers an event with the new values of the components that change.

    A session's state is its :class:`Detected`, or None before an image is uploaded.
    """

    def __init__(self, predictor: Predictor):
        self.predictor = predictor

    def upload(self, path: str | None, threshold: float) -> tuple[Detected | None, np.ndarray | None, str, None]:
        """Return state, drawing, a line of text, and no attention, for an uploaded file or for one that was taken away."""
        if path is None:
            return None, None, "", None
        try:
            image = self.predictor.read(path)
        except UserError as error:
            name = os.path.basename(path)  # not where this machine keeps it
            return None, None, f"Upload another file: {str(error).replace(path, name)}", None
        detected = Detected(image, self.predictor(image))
        return (detected, *self.draw(detected, threshold), None)

    def draw(self, detected: Detected | None, threshold: float) -> tuple[np.ndarray | None, str]:
        """Return the drawing of what is above the threshold, and a line of text."""
        if detected is None:
            return None, ""
        number = int((detected.instances.scores >= threshold).sum())
        text = f"Detections with a score of {threshold:.2f} or more: {number}. Click a box to see what its query attends to."
        drawing = draw_detections(detected.image, detected.instances, self.predictor.class_names, threshold)
        return drawing, text

    def click(self, detected: Detected, drawing_width: int, index: list[int], threshold: float) -> tuple:
        """Return the sheet of the query whose box was clicked, and a line of text.

        Args:
            detected: the state.
            drawing_width: of the drawing, in pixels; it may be an enlarged image.
            index: x and y of the click, in the drawing's pixels.
            threshold: boxes of a lower score are not shown, and cannot be clicked.
        """
        x, y = (value * detected.image.shape[1] / drawing_width for value in index)
        found = smallest_around(detected.instances, x, y, threshold)
        if found is None:
            return None, "There is no box at this point: click inside one."
        try:
            instances, layers = look_at(self.predictor, detected.image)
        except UserError as error:
            return None, str(error)
        query = int(instances.query_indices[found])
        title = describe(query, found, instances, self.predictor)
        return draw_attention(detected.image, layers, query, title), f"This is what {title} attends to, layer by layer."


def smallest_around(instances: Instances, x: float, y: float, threshold: float) -> int | None:
    """Return the detection with the smallest box around a point, of those with a score of ``threshold`` or more.

    Args:
        instances: with boxes in pixels.
        x, y: the point, in pixels.

    Returns:
        Its index, or None if there is no box around the point.
    """
    left, top, right, bottom = instances.pred_boxes.tensor.unbind(1)
    around = (left <= x) & (x <= right) & (top <= y) & (y <= bottom) & (instances.scores >= threshold)
    found = around.nonzero().flatten()
    return int(found[instances.pred_boxes.area()[found].argmin()]) if len(found) else None


def check_address(host: str, port: int) -> None:
    """Refuse an address at which nothing can be served, before a model is loaded.

    Raises:
        UserError: the port is in use or out of range, or the host is none of this machine.
    """
    try:
        socket.getaddrinfo(host, None)
        socket.create_server((host, port)).close()
    except socket.gaierror as error:
        raise UserError(f"{host} is no address of this machine ({error.strerror}).", argument="host") from error
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) else error
        raise UserError(f"{host}:{port} cannot be used ({reason}): name another port.", argument="port") from error


def build_page(predictor: Predictor):
    """Return the page, a ``gradio.Blocks``.

    Raises:
        UserError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which reads it
    gradio = import_extra("gradio", "gradio")

    page = Page(predictor)
    with gradio.Blocks(title="SAM-DETR++", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        state = gradio.State()
        picture = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}  # none that shares it
        with gradio.Row():
            with gradio.Column(scale=1):
                file = gradio.File(label="Image", elem_id="image")
                threshold = gradio.Slider(
                    0, 1, SCORE_THRESHOLD, step=0.01, label="Score threshold", elem_id="threshold"
                )
                text = gradio.Markdown(elem_id="text")
            with gradio.Column(scale=2):
                drawing = gradio.Image(label="Detections", elem_id="drawing", **picture)
        sheet = gradio.Image(label="Attention", elem_id="attention", **picture)

        def clicked(detected, drawn, value, event: gradio.SelectData):
            return page.click(detected, drawn.shape[1], event.index, value)

        # One at a time: hooks of the model record what it attends to.
        alone = {"concurrency_limit": 1, "concurrency_id": "model"}
        file.change(page.upload, [file, threshold], [state, drawing, text, sheet], **alone)
        threshold.release(page.draw, [state, threshold], [drawing, text])
        drawing.select(clicked, [state, drawing, threshold], [sheet, text], **alone)
    return blocks


def serve(blocks, host: str, port: int, wait: bool = True) -> None:
    """Serve a page of :func:`build_page`; with ``wait``, until the program is interrupted."""
    import gradio

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # not those of a server elsewhere
    blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        theme=gradio.themes.Default(**fonts),
        prevent_thread_lock=not wait,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860)


def main(arguments: argparse.Namespace) -> None:
    check_address(arguments.host, arguments.port)
    blocks = build_page(load_predictor(arguments))
    print(f"http://{arguments.host}:{arguments.port} (end with Ctrl-C)", flush=True)
    serve(blocks, arguments.host, arguments.port)
