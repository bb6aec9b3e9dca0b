"""Read datasets in Pascal VOC's format: an XML file per image, and a list of images per split.

    FOLDER/Annotations/NAME.xml     boxes of one image
    FOLDER/ImageSets/Main/SPLIT.txt names of the split's images, one per line
    FOLDER/JPEGImages/NAME.jpg      or whatever <filename> in the XML file says

They are turned into COCO's format and read by its reader, so that the same is repaired and refused. VOC counts pixels from 1
and includes the last one: a box from 1 to W covers an image of width W. In a folder that has a coordinate below 1 they are
taken as they are. Objects marked as difficult are neither learned nor counted.
"""

import functools
import glob
import os
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from ..errors import UserError
from .coco_format import CocoAnnotations, call_cached, read_coco_content
from .findings import Report

__all__ = ["read_voc", "voc_list"]


def voc_list(folder: str | os.PathLike, split: str) -> Path:
    """Return where the list of a split's images is."""
    return Path(folder) / "ImageSets" / "Main" / f"{split}.txt"


def read_voc(folder: str | os.PathLike, split: str) -> CocoAnnotations:
    """Read a split. The classes are those of all files in ``Annotations``, by name, so that every split has the same.

    Folders that have not changed are read once per process.

    Args:
        folder: holds ``Annotations``, ``ImageSets`` and ``JPEGImages``.
        split: such as "train".

    Raises:
        UserError: a folder or the list is missing or unreadable, or there are no annotations. What is wrong with single entries
            is in the ``report``.
    """
    folder, listed = Path(folder), voc_list(folder, split)
    for part in ("Annotations", "JPEGImages"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder} is not in Pascal VOC's format: it has no folder {part}.")
    if not listed.is_file():
        splits = sorted(path.stem for path in listed.parent.glob("*.txt"))
        raise UserError(f"{folder} has no split {split!r}: {listed} does not exist. It has {splits or 'none'}.")
    files = sorted(
        (entry.name, entry.stat())
        for entry in os.scandir(folder / "Annotations")
        if entry.name.endswith(".xml") and entry.is_file()
    )
    versions = tuple((name, status.st_mtime_ns, status.st_size) for name, status in files)
    return call_cached(_read_split, folder, split, (listed.stat().st_mtime_ns, versions))


@functools.lru_cache(maxsize=2)
def _read_files(folder: Path, _version: tuple) -> dict[str, ET.Element | str]:
    """Return the content of each file in ``Annotations`` by its name without suffix; a text, if it says what is wrong."""
    contents: dict[str, ET.Element | str] = {}
    for path in sorted((folder / "Annotations").glob("*.xml")):
        try:
            contents[path.stem] = ET.parse(path).getroot()
        except (ET.ParseError, OSError, UnicodeDecodeError, ValueError) as error:
            contents[path.stem] = f"{path.name}: {error}"
    return contents


@functools.lru_cache(maxsize=8)
def _read_split(folder: Path, split: str, version: tuple) -> CocoAnnotations:
    path, report = str(voc_list(folder, split)), Report()
    contents = _read_files(folder, version[1])
    whole = [root for root in contents.values() if not isinstance(root, str)]
    names = sorted({_text(found, "name") for root in whole for found in root.findall("object")} - {""})
    corners = {
        _text(found, f"bndbox/{key}") for root in whole for found in root.findall("object") for key in ("xmin", "ymin")
    }
    from_zero = any(_number(corner, 1.0) < 1 for corner in corners)
    images, annotations = [], []
    for name, times in Counter(_listed(path, contents)).items():
        if times > 1:
            report.add("image entries that stand twice", name)
        root = contents.get(name)
        if root is None:
            report.add("images without an annotation file", f"{name}.xml")
        elif isinstance(root, str):
            report.add("annotation files that are damaged", root)
        else:
            images.append(_image(folder, name, root))
            for found in root.findall("object"):
                annotation = _annotation(found, names, from_zero)
                annotations.append({**annotation, "id": len(annotations) + 1, "image_id": name})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return read_coco_content(content, path, str(folder / "JPEGImages"), report)


def _number(text: str, default: float) -> float:
    try:
        return float(text)
    except ValueError:
        return default


def _listed(path: str, contents: dict[str, ET.Element | str]) -> list[str]:
    """Return the names in a list, which may have blanks; lists of one class have a second column, which is left out."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    names = []
    for line in filter(None, map(str.strip, lines)):
        first, *_ = line.split()
        names.append(next((name for name in (line, line.rsplit(None, 1)[0]) if name in contents), first))
    return names


def _text(element: ET.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _image(folder: Path, name: str, root: ET.Element) -> dict:
    file = _text(root, "filename")
    if not file or Path(file).stem != name or not (folder / "JPEGImages" / file).exists():
        # <filename> often names where an image came from; the list's name is what counts.
        same = sorted(path.name for path in (folder / "JPEGImages").glob(f"{glob.escape(name)}.*") if path.stem == name)
        file = same[0] if same else f"{name}.jpg"
    sides = (_text(root, f"size/{side}") for side in ("width", "height"))
    width, height = (int(side) if side.isdecimal() else side for side in sides)
    return {"id": name, "file_name": file, "width": width, "height": height}


def _annotation(found: ET.Element, names: list[str], from_zero: bool) -> dict:
    name = _text(found, "name")
    corners = [_text(found, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x0, y0, x1, y1 = (float(value) for value in corners)
    except ValueError:
        box, area = corners, None
    else:
        if not from_zero:
            x0, y0 = x0 - 1, y0 - 1
        box, area = [x0, y0, x1 - x0, y1 - y0], (x1 - x0) * (y1 - y0)
    annotation = {"category_id": names.index(name) + 1 if name else None, "bbox": box}
    return {**annotation, "iscrowd": _text(found, "difficult") or "0", "area": area}
