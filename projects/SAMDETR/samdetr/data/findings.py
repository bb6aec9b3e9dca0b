"""What is found in a dataset while it is read, in any of the formats: errors, repairs and warnings, by kind."""

import logging
from collections import Counter, defaultdict

from ..errors import UserError, one_line

__all__ = ["Report"]

logger = logging.getLogger(__name__)

# What is refused, by kind, and the remedy.
ERRORS = {
    "entries that are no objects": "Each image, annotation and category is a JSON object.",
    "images without an id": 'Give each a whole number or a text as its "id".',
    "image ids duplicated": "Give each image its own id.",
    "images without a file_name": 'Give each its file, relative to the image folder, as its "file_name".',
    "images whose file_name is an address": "Download them, and write their file names.",
    "images whose file_name has backslashes": "Write / in place of \\ between folders.",
    "images missing": "Correct the file names or the image folder.",
    "images without a width and height": "Write them down, in pixels, or repair the file, from which they would be read.",
    "images listed twice with other boxes": "Merge the entries of each file into one.",
    "categories without an id": 'Give each a whole number as its "id".',
    "category ids duplicated": "Give each category its own id.",
    "categories without a name": 'Give each its "name".',
    "annotations without an image_id": 'Each names its image, by the image\'s "id", as its "image_id".',
    "annotations of an unknown category": "Add it to the dataset's classes, or correct the annotation.",
    "annotations without a usable box": 'In pixels: COCO\'s "bbox" is [x, y, width, height], VOC\'s "bndbox" two corners.',
    "annotations whose iscrowd or ignore is neither yes nor no": "Write 0 or 1.",
    "datasets without images": 'List some: as "images" (COCO), in the split\'s file (VOC), or in the folder (YOLO).',
    "datasets without categories": 'Name the classes: as "categories" (COCO) or "names" (YOLO).',
    # In other formats:
    "images without an annotation file": "Add one for each; that of an image without objects has none.",
    "annotation files that are damaged": "Copy or write them again.",
    "labels that are no box": "A line is: class, centre x, centre y, width, height.",
    "labels outside of [0, 1]": "Centre and size are shares of the image's width and height.",
    "labels of an unknown class": 'Add it to "names", or correct the line.',
    # Found by reading the files:
    "images unreadable": "Copy them again, or remove them.",
    "images of another size than the annotation file says": "Correct sizes and boxes.",
    # In training:
    "datasets without boxes": "There is nothing to learn from: annotate some objects that are no crowd.",
}
# What is repaired and counted, by kind, and how.
REPAIRED = {
    "numbers written as text": "read as numbers",
    "category names that are no text": "taken as text",
    "category names that stand twice": "completed by their ids",
    "annotations without an area": "width x height",
    "annotations with a larger area than their box": "width x height",
    "annotations without iscrowd": "taken as 0",
    "annotations with ignore": "taken as crowd",
    "annotation ids that are missing, duplicated or no positive whole number": "numbered again",
    "image ids of mixed types": "taken as text",
    "images without a width and height in the annotation file": "read from the image files",
    "image entries that stand twice": "taken once",
    "images without a label file": "taken as images without objects",
    "polygons": "read as their bounding boxes",
}


class Report:
    """Findings by kind, with the first few examples.

    Attributes:
        counts: how often each kind was found.
        examples: the first five of each kind.
    """

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = defaultdict(list)
        self.logged = False

    def add(self, kind: str, example: object = "", count: int = 1) -> None:
        """Count a finding: an error if its kind is in :data:`ERRORS`, a repair if it is in :data:`REPAIRED`, else a warning."""
        self.counts[kind] += count
        if example != "" and len(self.examples[kind]) < 5:
            self.examples[kind].append(one_line(example)[:200])

    def _kinds(self, level: str) -> list[str]:
        levels = {**dict.fromkeys(ERRORS, "error"), **dict.fromkeys(REPAIRED, "repaired")}
        return sorted(kind for kind in self.counts if levels.get(kind, "warning") == level)

    @property
    def errors(self) -> list[str]:
        """The kinds of errors found."""
        return self._kinds("error")

    def _describe(self, kind: str) -> str:
        more = ", ..." if self.counts[kind] > len(self.examples[kind]) else ""
        examples = f" ({', '.join(self.examples[kind])}{more})" if self.examples[kind] else ""
        return f"{kind}: {self.counts[kind]}{examples}"

    def lines(self) -> list[str]:
        """Return one line per kind, errors first, for a person to read."""
        return [
            *(f"ERROR: {self._describe(kind)}. {ERRORS[kind]}" for kind in self.errors),
            *(f"warning: {self._describe(kind)}" for kind in self._kinds("warning")),
            *(f"repaired: {self._describe(kind)}: {REPAIRED[kind]}" for kind in self._kinds("repaired")),
        ]

    def refuse_errors(self, path: str, except_for: str | None = None) -> None:
        """Raise a :class:`UserError` that names the file, the entries and the remedy, if there are errors.

        Args:
            path: of the file.
            except_for: a kind of error that does not matter.
        """
        errors = [kind for kind in self.errors if kind != except_for]
        if errors:
            kind, *others = errors
            more = f" It has {len(others)} more kinds of errors: {', '.join(others)}." if others else ""
            raise UserError(f"{path} has {self._describe(kind)}. {ERRORS[kind]}{more}")

    def log(self, path: str) -> None:
        """Log warnings and repairs, one line per kind, if they have not been logged yet."""
        if self.logged:
            return
        self.logged = True
        for kind in self._kinds("warning"):
            logger.warning("%s has %s.", path, self._describe(kind))
        for kind in self._kinds("repaired"):
            logger.info("%s has %s: %s.", path, self._describe(kind), REPAIRED[kind])
