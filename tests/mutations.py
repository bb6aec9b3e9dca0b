"""Make datasets, configs, metrics and checkpoints wrong in random ways, and see what becomes of them.

    python tests/mutations.py --kind dataset --number 500

Each ``try_*`` function does one of these, determined by a random generator, and returns "accepted" or "refused". It fails if
the outcome is neither, such as a traceback, or if two ways through the project disagree.
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import logging
import math
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from PIL import Image

from helpers import DN, MULTI_SCALE, ROOT, SMCA, tiny_config
from samdetr.checkpoint import Checkpoint
from samdetr.checks import check_config
from samdetr.config import _all_keys
from samdetr.data import read_coco, register_datasets
from samdetr.engine import Trainer
from samdetr.errors import UserError
from samdetr.limits import value_of
from samdetr.visualization import draw_curves, read_metrics

# Values of every kind that a JSON file may hold.
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 96, 1.0, 1.5, -0.5, 1e30, math.inf, math.nan, 2**63, 2**70, 10**400),
    *("", "0", "1", "2", "1.5", "yes", "no", "x", "a b", "\x00", "\ud800", "\x1b[31m", "$\\frac{1}$", "<b>&amp;</b>"),
    *("a\\b.png", "https://example.org/a.png", "../1.png", "x" * 300, [], [1], {}, {"x": 1}, [None], [[1, 2], [3, 4]]),
    *([1, 2, 3, 4], ["1", "2", "3", "4"], [10, 10, 0, 5], [10, 10, -5, 5], [-50, -50, 500, 500], [math.nan] * 4),
]
RENAMED = {
    "image_id": "item_id",
    "bbox": "box",
    "category_id": "label",
    "file_name": "path",
    "name": "title",
    "id": "ID",
}


def make_dataset(folder: Path) -> dict:
    """Write four small images, and return annotations for them."""
    rng = np.random.RandomState(0)
    data: dict = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    for number in range(1, 5):
        name = f"{number}.{'png' if number % 2 else 'jpg'}"
        Image.fromarray(rng.randint(0, 255, (40, 56, 3), dtype=np.uint8)).save(folder / name)
        data["images"].append({"id": number, "file_name": name, "width": 56, "height": 40})
        for i in range(2):
            box = [int(v) for v in (*rng.randint(0, 20, 2), *rng.randint(8, 20, 2))]
            entry = {"id": len(data["annotations"]) + 1, "image_id": number, "category_id": i + 1, "bbox": box}
            data["annotations"].append({**entry, "area": box[2] * box[3], "iscrowd": 0, "segmentation": []})
    return data


def mutate_json(data: dict, rng: random.Random) -> dict:
    """Change one thing in the annotations."""
    key = rng.choice(["images", "annotations", "annotations", "categories"])
    entries = data[key] if isinstance(data.get(key), list) else []
    kind = rng.randrange(12)
    if kind == 0:
        data[key] = rng.choice([*VALUES, entries[:0]])
    elif kind == 1:
        data.pop(key, None)
    elif not entries:
        return data
    elif kind == 2:
        entries.append(copy.deepcopy(rng.choice(entries)))
    elif kind == 3:
        entries.remove(rng.choice(entries))
    elif kind == 4:
        entries[rng.randrange(len(entries))] = rng.choice(VALUES)
    else:
        chosen = entries if rng.random() < 0.3 else [rng.choice(entries)]
        known = [entry for entry in chosen if isinstance(entry, dict) and entry]
        if known:
            name = rng.choice(sorted({*known[0], "ignore"}))
            value = rng.choice(VALUES)
            for entry in known:
                if kind == 5:
                    entry.pop(name, None)
                elif kind == 6 and name in RENAMED and name in entry:
                    entry[RENAMED[name]] = entry.pop(name)
                elif kind == 7 and name in entry and isinstance(entry[name], (int, float)):
                    entry[name] = str(entry[name])
                else:
                    entry[name] = value
    return data


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Change the bytes of a file."""
    place = rng.randrange(max(1, len(content)))
    kind = rng.randrange(5)
    if kind == 0:
        return b"\xef\xbb\xbf" + content
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content.decode("utf-8", "replace").encode("utf-16")
    if kind == 3:
        return content[:place] + "ä".encode("latin-1") + content[place:]
    return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]


def mutate_image(path: Path, rng: random.Random) -> None:
    """Change one image file, once."""
    if not path.is_file():
        return
    kind = rng.randrange(9)
    if kind < 3:
        content = path.read_bytes()
        place = rng.randrange(len(content))
        changed = content[place] ^ (1 << rng.randrange(8))
        whole = content[:place] + bytes([changed]) + content[place + 1 :]
        path.write_bytes([whole, content[:place], b"no image"][kind])
        return
    image = Image.open(path).convert("RGB")
    path.unlink()
    if kind == 4:
        path.mkdir()
    elif kind == 5:
        path.symlink_to(path.name)
    elif kind == 6:
        os.mkfifo(path)
    elif kind == 7:
        mode = rng.choice(["I;16", "RGBA", "P", "L", "CMYK", "1"])
        grey = Image.new("I;16", image.size, 300) if mode == "I;16" else image.convert(mode)
        grey.save(path, format="TIFF")
    elif kind == 8:
        exif = Image.Exif()
        exif[274] = rng.randrange(10)
        image.save(path, exif=exif, format="JPEG")


def try_dataset(rng: random.Random, folder: Path) -> str:
    """Check a mutated dataset; then train two steps on it and evaluate on it. Both accept or both refuse it."""
    from samdetr.cli.check import check_dataset

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    data = make_dataset(folder)
    content = json.dumps(data).encode()
    kind = rng.randrange(10)
    for _ in range(rng.randint(1, 2)):
        if kind < 6:
            data = mutate_json(data, rng)
            content = json.dumps(data).encode()
        elif kind < 7:
            content = mutate_bytes(content, rng)
        else:
            with contextlib.suppress(OSError):  # it is damaged already
                mutate_image(folder / rng.choice(["1.png", "2.jpg", "3.png", "4.jpg"]), rng)
    path = folder / "data.json"
    path.write_bytes(content)
    number, verdict = 2, "refused"
    with contextlib.suppress(UserError):
        annotations = read_coco(path, folder)
        report = check_dataset(annotations)
        report.lines()
        number = max(1, len(annotations.class_names))
        verdict = "refused" if report.errors else "accepted"
    name = f"mutated {rng.random()}"
    options = ["DATASETS.COCO_FORMAT", [[name, str(path), str(folder)]], "DATASETS.TRAIN", (name,)]
    options += ["DATASETS.TEST", (name,), "MODEL.SAMDETR.NUM_CLASSES", number]
    outcome = try_run(lambda: tiny_config(*SHORT, *options), folder / "run")
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(name, None)
    assert verdict == outcome, f"the check: {verdict}, the run: {outcome}: {content!r}"
    return outcome


SHORT = [
    *("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.IMS_PER_BATCH", 4, "SEED", 1, "DATALOADER.NUM_WORKERS", 0),
    *("DATALOADER.ASPECT_RATIO_GROUPING", False, "MODEL.SAMDETR.DECODER.NUM_LAYERS", 2, "TEST.EVAL_PERIOD", 0),
    *("INPUT.MIN_SIZE_TRAIN", (40,), "INPUT.MIN_SIZE_TEST", 40, "INPUT.MAX_SIZE_TRAIN", 64, "INPUT.MAX_SIZE_TEST", 64),
]


class StopAfterTwoSteps(HookBase):
    def before_train(self):
        self.trainer.max_iter = min(self.trainer.max_iter, self.trainer.start_iter + 2)


def try_run(make_config, folder: Path) -> str:
    """Train two steps and evaluate, as train_net.py does."""
    try:
        cfg = make_config()
        cfg.OUTPUT_DIR = str(folder)
        folder.mkdir(exist_ok=True)
        register_datasets(cfg)
        check_config(cfg, training=True)
        trainer = Trainer(cfg)
        trainer.register_hooks([StopAfterTwoSteps()])
        trainer.max_iter = min(trainer.max_iter, 2)
        trainer.resume_or_load(resume=False)
        trainer.train()
    except UserError as error:
        assert "\n" not in str(error)
        return "refused"
    return "accepted"


def extreme(value, rng: random.Random):
    """Return an extreme value of about the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return rng.choice([0, -1, 1, 10**9, -(10**9), 0.5, -0.5, math.nan, math.inf, 1e-30])
    if isinstance(value, str):
        return rng.choice(["", "x", "None", "a" * 300, "cuda:7", "res9"])
    if isinstance(value, (list, tuple)):
        inner = value[0] if value else 1
        return type(value)(rng.choice([[], [extreme(inner, rng)], [extreme(inner, rng)] * 3, [*value, *value]]))
    return rng.choice([0, -1, "x", [1], None])


def try_setting(rng: random.Random, folder: Path, dataset: list[str]) -> str:
    """Train two steps and evaluate with one key of the config at an extreme value.

    Args:
        rng: the random generator.
        folder: for the run.
        dataset: an entry of DATASETS.COCO_FORMAT of two classes.
    """
    shutil.rmtree(folder, ignore_errors=True)
    base = tiny_config()
    keys = [key for key in _all_keys(base) if not isinstance(value_of(base, key), dict) and read_here(key)]
    key = rng.choice(keys)
    value = extreme(value_of(base, key), rng)
    variant = rng.choice([[], SMCA, DN, [*MULTI_SCALE, *DN]])

    def make_config():
        options = ["DATASETS.COCO_FORMAT", [dataset], "DATASETS.TRAIN", (dataset[0],), "DATASETS.TEST", (dataset[0],)]
        return tiny_config(*variant, *SHORT, "MODEL.SAMDETR.NUM_CLASSES", 2, *options, key, value)

    try:
        return try_run(make_config, folder)
    except Exception as error:
        raise AssertionError(f"{key} {value!r} with {variant}: {type(error).__name__}: {error}") from error


def read_here(key: str) -> bool:
    """Return whether a key is read by what is tried here: not those of other architectures, nor the place of the run."""
    others = ("ROI_", "RPN", "RETINANET", "PROPOSAL", "SEM_SEG", "PANOPTIC", "ANCHOR", "FPN", "KEYPOINT", "OUTPUT_DIR")
    return not any(part in key for part in others) and key not in ("VERSION", "GLOBAL.HACK", "MODEL.META_ARCHITECTURE")


def try_metrics(rng: random.Random, path: Path) -> str:
    """Read and draw mutated metrics."""
    lines = [{"iteration": i, "total_loss": 10.0 / (i + 1), "lr": 0.1, "epoch": i / 4, "bbox/AP": i} for i in range(6)]
    for _ in range(rng.randint(1, 3)):
        line = rng.choice(lines)
        if isinstance(line, dict) and rng.random() < 0.8:
            line[rng.choice([*line, "<b>", "$x$"])] = rng.choice(VALUES)
        else:
            lines[lines.index(line)] = rng.choice(VALUES)
    content = "\n".join(json.dumps(line) for line in lines).encode()
    path.write_bytes(mutate_bytes(content, rng) if rng.random() < 0.5 else content)
    try:
        draw_curves({"a $ run <b>": read_metrics(path)}).savefig(path.with_suffix(".png"), dpi=30)
    except UserError:
        return "refused"
    return "accepted"


def try_checkpoint(rng: random.Random, whole: bytes, entries: dict, path: Path) -> str:
    """Read a checkpoint with one damage: it is refused, or every tensor is the same."""
    place = rng.randrange(len(whole))
    if rng.random() < 0.3:  # among the names and the directory, of which there are few bytes
        place = rng.choice([rng.randrange(200), len(whole) - 1 - rng.randrange(min(4000, len(whole)))])
    kind = rng.randrange(6)
    if kind == 0:
        damaged = whole[:place]
    elif kind == 1:
        damaged = whole[:place] + bytes(16) + whole[place + 16 :]
    else:
        damaged = whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]
    path.write_bytes(damaged)
    try:
        checkpoint = Checkpoint.read(path)
        checkpoint.class_names, checkpoint.average, checkpoint.metric, checkpoint.config()
    except UserError:
        return "refused"
    assert same(checkpoint.entries, entries), f"damage at byte {place} of {len(whole)} was not seen"
    return "accepted"


def same(a, b) -> bool:
    """Return whether nested containers hold the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def make_checkpoint(folder: Path) -> tuple[bytes, dict]:
    """Train two steps; return the bytes of the checkpoint, and its entries."""
    cfg = tiny_config(*SHORT, "SOLVER.EMA.ENABLED", True, "DATASETS.TEST", (), "OUTPUT_DIR", str(folder))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    path = folder / "model_final.pth"
    return path.read_bytes(), Checkpoint.read(path).entries


def make_entry(folder: Path) -> list[str]:
    """Write a good dataset; return its entry of DATASETS.COCO_FORMAT."""
    folder.mkdir(exist_ok=True)
    (folder / "data.json").write_text(json.dumps(make_dataset(folder)))
    return [f"good {folder}", str(folder / "data.json"), str(folder)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["dataset", "setting", "metrics", "checkpoint"], required=True)
    parser.add_argument("--number", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tools"))
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        silence = contextlib.redirect_stdout(io.StringIO())
        if arguments.kind == "checkpoint":
            with silence:
                whole, entries = make_checkpoint(folder)
        attempt = {
            "dataset": lambda rng: try_dataset(rng, folder / "dataset"),
            "setting": lambda rng: try_setting(rng, folder / "run", make_entry(folder / "good")),
            "metrics": lambda rng: try_metrics(rng, folder / "metrics.json"),
            "checkpoint": lambda rng: try_checkpoint(rng, whole, entries, folder / "damaged.pth"),
        }[arguments.kind]
        for seed in range(arguments.first, arguments.first + arguments.number):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    outcome = attempt(random.Random(seed))
            except Exception as error:
                outcome = "wrong"
                print(f"seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
            counts[outcome] += 1
    print(f"{arguments.number} of kind {arguments.kind}: {dict(counts)}, {time.perf_counter() - start:.0f} s")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
