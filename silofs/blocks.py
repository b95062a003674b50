"""Page, block and leaf arithmetic. Pure.

A *page* (4 KiB) is the unit of mapping, a *block* (64 KiB) the unit of transfer, a *leaf* (512 pages, 2 MiB) the
run of page references that one record of a layer's map holds. All three are aligned to multiples of their own size.
"""

from __future__ import annotations

from collections.abc import Iterator

PAGE = 4096
PAGE_SHIFT = 12
BLOCK = 65536
BLOCK_PAGES = BLOCK // PAGE
LEAF_PAGES = 512
LEAF_SHIFT = 9
LEAF_MASK = LEAF_PAGES - 1
LEAF_BYTES = LEAF_PAGES * PAGE

ZERO_PAGE = bytes(PAGE)


def pages_for(size: int) -> int:
    """Pages that a volume of `size` bytes spans; the last one may be partial."""
    return (size + PAGE - 1) >> PAGE_SHIFT


def leaves_for(size: int) -> int:
    """Leaves that a volume of `size` bytes spans."""
    return (pages_for(size) + LEAF_PAGES - 1) >> LEAF_SHIFT


def whole_pages(offset: int, length: int) -> tuple[int, int]:
    """(first, end) of the pages that lie wholly inside the byte range; first >= end when there is none."""
    return (offset + PAGE - 1) >> PAGE_SHIFT, (offset + length) >> PAGE_SHIFT


def split_by_page(offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """(page, start in page, end in page, offset in the range) for every page that the byte range touches."""
    done = 0
    while done < length:
        page, start = divmod(offset + done, PAGE)
        end = min(PAGE, start + length - done)
        yield page, start, end, done
        done += end - start
