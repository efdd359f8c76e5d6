"""How the work of a kernel is cut: the tile of a program, and the programs that share a channel."""

from typing import NamedTuple

import torch

_MAX_SPLITS = 256  # of a sum: one program adds up so many
_PROGRAMS = 4  # of eight warps, for each multiprocessor


class Tile(NamedTuple):
    """Values of ``(outer, channels, inner)`` at a time; ``vector`` divides inner, or channels if ``width`` is 1."""

    rows: int
    block: int
    width: int
    vector: int


def choose_tile(outer: int, channels: int, inner: int, dtype: torch.dtype) -> Tile:
    """Choose the tile for a view of `layout.dense_view`: few different ones, as each is compiled."""
    num_values, vector = 512 if dtype == torch.float64 else 2048, 16 // dtype.itemsize if inner < 2**31 else 1
    while (channels if inner == 1 else inner) % vector:
        vector //= 2
    if inner == 1:
        block = min(1 << (channels - 1).bit_length(), 128 // dtype.itemsize)  # 128 bytes are a line of the cache
        return Tile(num_values // block, block, 1, min(vector, 4))  # more take too many registers
    width = next((width for width in (16, 64, 256) if inner <= width), num_values // 2)
    if width > 256 and -inner % width > inner // 8:  # of a last tile most is empty
        width = 256
    rows = min(num_values // width, 1 << (outer - 1).bit_length())
    return Tile(rows, min(num_values // width // rows, 1 << (channels - 1).bit_length(), 8), width, vector)


def choose_splits(tile: Tile, outer: int, channels: int, inner: int, num_multiprocessors: int) -> tuple[int, int]:
    """Choose how many programs share a block of channels, in a sum and elsewhere: as many tiles for each."""
    num_tiles = -(-outer // tile.rows) * -(-inner // tile.width)
    wanted = -(-num_multiprocessors * _PROGRAMS // -(-channels // tile.block))
    each = [-(-num_tiles // max(s, 1)) for s in (min(num_tiles // 2, wanted, _MAX_SPLITS), wanted)]
    return max(1, -(-num_tiles // max(each[0], 1))), max(1, -(-num_tiles // max(each[1], 1)))
