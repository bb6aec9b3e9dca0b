"""samdetr.data.images: one way from a picture to the model, whatever holds it."""

import io
import os
import socket

import numpy as np
import pytest
from PIL import Image

from samdetr.data import images
from samdetr.data.images import open_picture, read_image, read_size
from samdetr.errors import UserError


@pytest.fixture
def photograph():
    """Smooth, so that formats with loss change little."""
    y, x = np.mgrid[0:30, 0:44]
    return np.stack([5 * x, 8 * y, 255 - 5 * x], axis=-1).astype(np.uint8)


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def test_paths_bytes_pil_images_and_arrays_are_the_same(photograph, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    content = saved(Image.fromarray(photograph), "PNG", exif=exif)
    (tmp_path / "a.png").write_bytes(content)
    upright = np.rot90(photograph, -1)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), content, Image.open(tmp_path / "a.png"), upright):
        assert np.array_equal(read_image(source), upright)
    assert read_size(tmp_path / "a.png") == (30, 44)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_turns_files_upright(orientation, photograph):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[274] = orientation
    content = saved(Image.fromarray(photograph), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(read_image(content), np.asarray(expected))


def test_grey_of_sixteen_bits_is_scaled():
    grey = np.array([[0, 257, 25700, 65535]], np.uint16)
    expected = np.array([[0, 1, 100, 255]], np.uint8)
    for source in (saved(Image.fromarray(grey), "PNG"), saved(Image.fromarray(grey), "TIFF"), grey):
        picture = open_picture(source)
        assert np.array_equal(picture.pixels, np.repeat(expected[..., None], 3, axis=2))
        assert picture.notes == ["16 bits per pixel are scaled to 8"]


@pytest.mark.parametrize(("highest", "expected"), [(1.0, [0, 51, 255]), (200.0, [0, 40, 200]), (800.0, [0, 51, 255])])
def test_floating_point_is_scaled(highest, expected):
    values = np.array([[0, highest / 5, highest]], np.float32)
    picture = open_picture(saved(Image.fromarray(values), "TIFF"))
    assert picture.pixels[0, :, 0].tolist() == expected and len(picture.notes) == 1


@pytest.mark.parametrize(
    ("mode", "format", "note"),
    [
        *(("RGBA", "PNG", "transparency is ignored"), ("LA", "PNG", "transparency is ignored")),
        *(("P", "PNG", None), ("CMYK", "JPEG", None), ("L", "PNG", None), ("1", "PNG", None)),
    ],
)
def test_modes_are_converted(mode, format, note, photograph):
    image = Image.fromarray(photograph).convert(mode)
    picture = open_picture(saved(image, format, **({"quality": 95} if format == "JPEG" else {})))
    expected = np.asarray(image.convert("RGB"))
    assert np.abs(picture.pixels.astype(int) - expected).max() <= (12 if format == "JPEG" else 0)
    assert picture.notes == ([note] if note else [])


def test_of_several_frames_the_first_is_taken(photograph):
    frames = [Image.fromarray(photograph), Image.fromarray(255 - photograph)]
    picture = open_picture(saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]))
    assert np.array_equal(picture.pixels, photograph)
    assert picture.notes == ["several frames, of which the first is used"]


def test_notes_are_logged_once(photograph, caplog, monkeypatch):
    monkeypatch.setattr(images, "_LOGGED", set())
    content = saved(Image.fromarray(photograph).convert("RGBA"), "PNG")
    for _ in range(3):
        read_image(content)
    assert caplog.text.count("transparency is ignored") == 1


def test_any_bit_flipped_inside_a_png_is_seen_if_it_matters(photograph):
    content = saved(Image.fromarray(photograph), "PNG")
    rng = np.random.RandomState(0)
    refused = 0
    for place in rng.randint(8, len(content), 60):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randint(8)
        try:
            pixels = read_image(bytes(damaged))
        except UserError:
            refused += 1
        else:
            assert np.array_equal(pixels, photograph)
    assert refused > 50  # all but those in the checksum of the last chunk, which is empty


def test_sizes_that_do_not_fit_the_annotations(photograph):
    with pytest.raises(UserError, match=r"has 44 x 30 pixels \(width x height\), but its annotations are for 40 x 30"):
        open_picture(photograph, annotated_size=(40, 30))


def test_large_pictures_are_refused_by_a_limit_that_can_be_raised(photograph):
    content = saved(Image.fromarray(photograph), "PNG")
    with pytest.raises(UserError, match=r"44 x 30 pixels, more than INPUT\.MAX_PIXELS \(1000\)") as refused:
        read_image(content, max_pixels=1000)
    assert refused.value.argument == "max_pixels"
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 100  # Pillow's own limit does not count
    try:
        assert read_image(content, max_pixels=44 * 30).shape == (30, 44, 3)
        assert Image.MAX_IMAGE_PIXELS == 100
    finally:
        Image.MAX_IMAGE_PIXELS = before


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the addresses of sockets are short
        server.bind("socket.jpg")
        for name, message in (
            *(("pipe", "is a pipe, not a file"), ("folder", "is a folder, not a file"), ("socket", "is a socket")),
            *(
                ("loop", "Too many levels of symbolic links"),
                ("dangling", "cannot be opened"),
                ("none", "no such file"),
            ),
        ):
            with pytest.raises(UserError, match=message):
                read_image(tmp_path / f"{name}.jpg")
    with pytest.raises(UserError, match="device"):
        read_image("/dev/zero")
    with pytest.raises(UserError, match="cannot be opened"):
        read_image("nul\0.jpg")


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), np.float32), np.zeros((0, 4), np.uint8)]
)
def test_arrays_of_other_forms_are_refused(array):
    with pytest.raises(UserError, match="array"):
        read_image(array)
