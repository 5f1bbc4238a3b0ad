"""From pages to addresses: which bytes a page has, and which writes copy pages. Pure functions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from ..common.errors import ProtocolError
from ..common.wire import PageRun, Region
from .checksum import Segment
from .transport import Writes


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


class LayerSpan(NamedTuple):
    """Layers [first, first + num_layers) of all regions' layers, in the order of the regions."""

    first: int
    num_layers: int


def slices(regions: Sequence[Region], num_pages: int, max_bytes: int) -> list[LayerSpan]:
    """Cuts `num_pages` pages by layers into pieces of about equal size, near `max_bytes` at most.

    A layer is never cut, so that runs of pages stay whole: a piece has one at least.
    """
    ends = list(
        accumulate(num_pages * each.page_bytes for each in regions for _ in range(each.num_layers))
    )
    num_pieces = min(len(ends), max(1, -(-ends[-1] // max_bytes)))
    cuts = [0]
    for piece in range(1, num_pieces):
        cut = bisect_right(ends, ends[-1] * piece // num_pieces)
        if cut > cuts[-1]:
            cuts.append(cut)
    cuts.append(len(ends))
    return [LayerSpan(first, end - first) for first, end in pairwise(cuts)]


def layers_in(regions: Sequence[Region], part: LayerSpan) -> dict[str, range]:
    """The layers that each region has in a slice; regions that have none are left out."""
    found: dict[str, range] = {}
    first = 0
    for region in regions:
        begin = max(part.first - first, 0)
        end = min(part.first + part.num_layers - first, region.num_layers)
        if begin < end:
            found[region.name] = range(begin, end)
        first += region.num_layers
    return found


def plan_writes(
    source: Region,
    target: Region,
    source_pages: Sequence[int],
    target_pages: Sequence[int],
    max_write_bytes: int,
    layers: range | None = None,
) -> Writes:
    """The writes that copy source_pages[i] onto target_pages[i] in every layer, or in `layers`.

    Pages contiguous on both sides go in one write, split at `max_write_bytes`. Layer by layer.
    """
    size = source.page_bytes
    pieces = np.array(
        [
            (left * size + start, right * size + start, min(max_write_bytes, count * size - start))
            for left, right, count in _common_runs(source_pages, target_pages)
            for start in range(0, count * size, max_write_bytes)
        ],
        dtype=np.int64,
    ).reshape(-1, 3)
    chosen = range(source.num_layers) if layers is None else layers
    begins = np.zeros((len(chosen), 1, 3), dtype=np.int64)
    numbers = np.arange(chosen.start, chosen.stop, dtype=np.int64)
    begins[:, 0, 0] = source.base_address + numbers * (source.num_pages * size)
    begins[:, 0, 1] = target.base_address + numbers * (target.num_pages * size)
    return Writes((begins + pieces).reshape(-1, 3))


def plan_span(
    span: LayerSpan,
    regions: Sequence[tuple[Region, Region, Sequence[int]]],
    source_pages: Sequence[int],
    max_write_bytes: int,
    *,
    is_hashed: bool,
) -> tuple[Writes, list[list[Segment]]]:
    """What copies some layers of pages that are the same ones in every source region.

    Args:
        span: the layers, of all regions' together.
        regions: source region, target region and the pages in that, each.

    Returns the writes, and what each checksum covers (nothing unless `is_hashed`).
    """
    layers = layers_in([source for source, _, _ in regions], span)
    plans = [
        plan_writes(source, target, source_pages, pages, max_write_bytes, layers[source.name]).rows
        for source, target, pages in regions
        if source.name in layers
    ]
    sources = [(source, source_pages) for source, _, _ in regions]
    parts = layer_parts(sources, span) if is_hashed else []
    return Writes(np.concatenate(plans)), parts


def _common_runs(left: Sequence[int], right: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first left, first right, count) of stretches that are contiguous on both sides, in order."""
    if not left:
        return []
    pairs = np.array((left, right), dtype=np.int64)
    breaks = np.flatnonzero((np.diff(pairs) != 1).any(axis=0)) + 1
    starts = np.concatenate(([0], breaks))
    counts = np.diff(np.append(starts, len(left)))
    return list(zip(*pairs[:, starts].tolist(), counts.tolist(), strict=True))


def layer_parts(
    regions: Sequence[tuple[Region, Sequence[int]]], part: LayerSpan | None = None
) -> list[list[Segment]]:
    """The bytes that one checksum covers each: a layer of a region, its pages in order.

    Equal for the same pages wherever they lie, so that source and target compare.

    Args:
        regions: each with the pages in it.
        part: the layers; default: all.
    """
    chosen = None if part is None else layers_in([region for region, _ in regions], part)
    parts: list[list[Segment]] = []
    for region, pages in regions:
        layers = range(region.num_layers) if chosen is None else chosen.get(region.name, range(0))
        if not layers:
            continue
        size = region.page_bytes
        runs = [(first * size, count * size) for first, _, count in _common_runs(pages, pages)]
        for layer in layers:
            base = region.base_address + layer * region.num_pages * size
            parts.append([(base + start, num_bytes) for start, num_bytes in runs])
    return parts
