"""From pages to addresses: which bytes a page has, and which writes copy pages. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..common.errors import ProtocolError
from ..common.wire import PageRun, Region
from .checksum import Segment
from .transport import Write


def expand(runs: Sequence[PageRun]) -> list[int]:
    """The pages of the runs, in order."""
    return [page for run in runs for page in range(run.first, run.first + run.count)]


def check_runs(runs: Sequence[PageRun], region: Region) -> None:
    """Raises ProtocolError unless every run lies inside `region` and no page comes twice."""
    total = 0
    for run in runs:
        total += run.count
        if run.first < 0 or run.count < 1 or run.first + run.count > region.num_pages:
            raise ProtocolError(
                f"run of {run.count} pages at {run.first} is outside of {region.name!r}, "
                f"which has {region.num_pages} pages"
            )
        if total > region.num_pages:
            raise ProtocolError(f"runs of {total} pages or more in {region.num_pages} pages")
    if len(set(expand(runs))) != total:
        raise ProtocolError(f"a page of {region.name!r} comes twice in {runs}")


def check_regions(source: Sequence[Region], target: Sequence[Region]) -> None:
    """Raises ProtocolError unless both sides have the same regions, but for size and address."""

    def shape(regions: Sequence[Region]) -> dict[str, tuple[int, int]]:
        return {each.name: (each.num_layers, each.page_bytes) for each in regions}

    if shape(source) != shape(target):
        raise ProtocolError(f"regions differ: {shape(source)} here, {shape(target)} there")


def plan_writes(
    source: Region,
    target: Region,
    source_pages: Sequence[int],
    target_pages: Sequence[int],
    max_write_bytes: int,
) -> Iterator[Write]:
    """Yields the writes that copy source_pages[i] onto target_pages[i] in every layer.

    Pages contiguous on both sides go in one write, split at `max_write_bytes`.
    """
    size = source.page_bytes
    pieces = [
        (
            first_source * size + start,
            first_target * size + start,
            min(max_write_bytes, count * size - start),
        )
        for first_source, first_target, count in _common_runs(source_pages, target_pages)
        for start in range(0, count * size, max_write_bytes)
    ]
    for layer in range(source.num_layers):
        from_base = source.base_address + layer * source.num_pages * size
        to_base = target.base_address + layer * target.num_pages * size
        for from_offset, to_offset, num_bytes in pieces:
            yield Write(from_base + from_offset, to_base + to_offset, num_bytes)


def _common_runs(left: Sequence[int], right: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yields (first left, first right, count) of stretches that are contiguous on both sides."""
    start = 0
    for end in range(1, len(left) + 1):
        is_contiguous = (
            end < len(left) and left[end] == left[end - 1] + 1 and right[end] == right[end - 1] + 1
        )
        if not is_contiguous:
            yield left[start], right[start], end - start
            start = end


def layer_parts(regions: Sequence[tuple[Region, Sequence[int]]]) -> list[list[Segment]]:
    """The bytes that one checksum covers each: a layer of a region, its pages in order.

    Equal for the same pages wherever they lie, so that source and target compare.

    Args:
        regions: each with the pages in it.
    """
    parts: list[list[Segment]] = []
    for region, pages in regions:
        size = region.page_bytes
        runs = [(first * size, count * size) for first, _, count in _common_runs(pages, pages)]
        for layer in range(region.num_layers):
            base = region.base_address + layer * region.num_pages * size
            parts.append([(base + start, num_bytes) for start, num_bytes in runs])
    return parts
