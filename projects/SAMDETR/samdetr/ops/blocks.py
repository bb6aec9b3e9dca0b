"""Split work into blocks whose intermediate results stay small, and accumulate over them without losing precision."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["accumulate_product_", "blocks", "empty_to_accumulate", "place", "resized_blocks"]

# Number of elements of a block's largest intermediate matrix: on a CPU it fits the cache, on a GPU it occupies all cores.
_ELEMENTS = {"cpu": 2**21}
_ELEMENTS_ELSEWHERE = 2**26


def blocks(images: int, rows: int, row_elements: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Split (images, rows) into blocks whose largest intermediate matrix stays small.

    Args:
        images: number of images.
        rows: number of rows (for example queries) per image.
        row_elements: number of elements of the intermediate matrix per row.
        device: where the matrix is computed.

    Yields:
        A slice of images and a slice of rows: either several whole images, or some rows of one image.
    """
    elements = _ELEMENTS.get(device.type, _ELEMENTS_ELSEWHERE)
    images_per_block = max(1, elements // max(rows * row_elements, 1))
    rows_per_block = max(1, rows if images_per_block > 1 else elements // row_elements)
    for image in range(0, images, images_per_block):
        for row in range(0, max(rows, 1), rows_per_block):  # one block without rows, so that sums over none are zeros
            yield slice(image, image + images_per_block), slice(row, row + rows_per_block)


@contextlib.contextmanager
def resized_blocks(elements: int, device_type: str = "cpu") -> Iterator[None]:
    """Use blocks of at most ``elements`` elements on a type of device inside this context (for tests and measurements)."""
    before = _ELEMENTS.get(device_type, _ELEMENTS_ELSEWHERE)
    _ELEMENTS[device_type] = elements
    try:
        yield
    finally:
        _ELEMENTS[device_type] = before


def place(whole: Tensor, block: tuple[slice, ...], part: Tensor) -> Tensor:
    """Put a block's result into its place in ``whole``; without a copy, if the block is everything.

    Args:
        whole: of the shape and dtype of the result of all blocks.
        block: the index of its part.
        part: the block's result, of the shape of ``whole[block]``.

    Returns:
        ``whole``, or ``part`` itself.
    """
    if part.shape == whole.shape and part.dtype == whole.dtype:
        return part
    whole[block] = part
    return whole


def empty_to_accumulate(like: Tensor) -> Tensor:
    """Return a contiguous tensor in float32 or better, not initialised, for :func:`accumulate_product_`.

    A sum over many blocks exceeds what lower precision can hold.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def accumulate_product_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add the batched product a @ b, (B, I, J) @ (B, J, K), to ``total`` in place, or set it if it is the first.

    ``total`` may be of higher precision.
    """
    if total.dtype == a.dtype:
        total.baddbmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b
