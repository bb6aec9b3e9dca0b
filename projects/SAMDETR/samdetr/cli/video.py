"""Read and write videos, by OpenCV."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import UserError, import_extra

cv2 = import_extra("cv2", "opencv-python-headless")


def length_and_rate(path: Path) -> tuple[int, float]:
    """Return how many frames a video says it has (0 if it does not say), and how many per second (25 if it does not say)."""
    capture = cv2.VideoCapture(str(path))
    length, rate = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    capture.release()
    return max(0, int(length)), rate or 25.0


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video, (H, W, 3) uint8, RGB."""
    capture = cv2.VideoCapture(str(path))
    try:
        good, frame = capture.read()
        if not good:
            raise UserError(f"{path} is not a video that can be read.")
        while good:
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            good, frame = capture.read()
    finally:
        capture.release()


class VideoWriter:
    """Write frames to an MP4 file at the rate of the source; the first frame determines the size."""

    def __init__(self, path: Path, rate: float):
        self.path, self.rate = path, rate
        self.writer = None

    def write(self, picture: np.ndarray) -> None:
        height, width = (side // 2 * 2 for side in picture.shape[:2])  # the codec needs even sides
        if self.writer is None:
            fourcc = cv2.VideoWriter_fourcc(*"mp4v")
            self.writer = cv2.VideoWriter(str(self.path), fourcc, self.rate, (width, height))
            if not self.writer.isOpened():
                raise UserError(f"{self.path} cannot be written as a video.")
        self.writer.write(cv2.cvtColor(np.ascontiguousarray(picture[:height, :width]), cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()
