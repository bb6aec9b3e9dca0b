"""Fixtures that tests share: seeds, a small dataset, the checkpoint of a short run. Nothing is downloaded."""

import json
import logging
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Also for scripts that run in another folder, so that the embedded dataset is written once.
os.environ.setdefault("DETECTRON2_DATASETS", str(ROOT / "datasets"))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU
# Otherwise a trainer would send detectron2's log to the stream that the first such test captures, and which is closed then.
logging.getLogger("detectron2").setLevel(logging.INFO)
# Several workers (pytest -n) share the cores.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def uninitialised_memory():
    """Let torch fill memory that nobody has written to with NaN, so that a test sees who reads it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory):
    """A COCO-format dataset of six small images with coloured rectangles of two classes; one image has none."""
    from PIL import Image

    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.RandomState(0)
    images, annotations = [], []
    for image_id in range(1, 7):
        width, height = 64 + 8 * image_id, 72
        pixels = rng.randint(0, 80, (height, width, 3)).astype(np.uint8)
        for _ in range(image_id % 3 if image_id != 6 else 0):
            x, y, w, h = rng.randint(0, 30), rng.randint(0, 30), rng.randint(16, 34), rng.randint(16, 34)
            label = rng.randint(2)
            pixels[y : y + h, x : x + w] = (200, 40, 40) if label else (40, 200, 40)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(label) + 1,
                    "bbox": [int(x), int(y), int(w), int(h)],
                    "area": int(w * h),
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(root / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width})
    categories = [{"id": 1, "name": "green"}, {"id": 2, "name": "red"}]
    (root / "annotations.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return root


@pytest.fixture(scope="session")
def shapes_dataset(shapes_root):
    """The name under which :func:`shapes_root` is registered."""
    from detectron2.data.datasets import register_coco_instances

    register_coco_instances("shapes", {}, str(shapes_root / "annotations.json"), str(shapes_root))
    return "shapes"


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """The folder of a short run on the embedded dataset, and what it printed; every test that needs a run shares it."""
    from processes import alone, train_net

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # the folder of all workers
    folder, printed = shared / "trained" / "run", shared / "trained.txt"
    with alone(shared / "trained.lock"):
        if not printed.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what another worker's attempt has left
            result = train_net("OUTPUT_DIR", folder)
            assert result.returncode == 0, result.stderr[-3000:]
            printed.write_text(result.stdout + result.stderr)
    return folder, printed.read_text()


@pytest.fixture
def run_folder(trained_run):
    """The folder of a short run. Tests must not change what is in it."""
    return trained_run[0]


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run a tool in this process; returns its exit status (or message), and what it printed."""

    def run(name, *arguments):
        script = next((ROOT / "tools").rglob(f"{name}.py"))
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        printed = capsys.readouterr()
        return ended.value.code, printed.out + printed.err

    return run


@pytest.fixture
def pictures(tmp_path):
    """A folder of three images, one of them in a folder below."""
    from PIL import Image

    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i, name in enumerate(("one.png", "two.jpg", "below/one.png")):
        pixels = np.random.RandomState(i).randint(0, 255, (100 + i, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder
