"""The kernels of the masked cross-entropy over logits; the derivation is in masked_cross_entropy.py."""

# mypy: disable-error-code=assignment
# Tuples of tiles grow in loops that the compiler unrolls.

from __future__ import annotations

import triton
import triton.language as tl

from sft.samples import NOT_TRAINED

IGNORED = tl.constexpr(NOT_TRAINED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ALIGNMENT = tl.constexpr(16)  # elements: a row that starts elsewhere is read in vectors from the next multiple on
LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def cross_entropy_kernel(
    logits: tl.tensor,
    gradient: tl.tensor,  # None, or where the gradient goes, with the row stride of logits; it may be logits
    labels: tl.tensor,
    weights: tl.tensor,  # None = all ones
    losses: tl.tensor,
    entropies: tl.tensor,  # None = no details
    correct: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    grad_scale: tl.tensor,  # one number, in memory
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    HELD: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row starts at a multiple of ALIGNMENT elements
) -> None:
    """One row: its loss and, unless `gradient` is None, its gradient; a masked row is not read."""
    row = tl.program_id(0).to(tl.int64)
    start = row * stride
    if ALIGNED:
        lead = 0  # columns before the first slab
        body = start
    else:
        lead = tl.minimum(-start & (ALIGNMENT - 1), columns).to(tl.int32)
        body = tl.multiple_of(start + lead, ALIGNMENT)  # not so for a row that ends before, which has no slabs
    label = tl.load(labels + row)
    cells = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    if label == IGNORED:
        tl.store(losses + row, 0.0)
        if entropies is not None:
            tl.store(entropies + row, 0.0)
            tl.store(correct + row, False)
        if gradient is not None:
            _write_zeros(gradient + start, gradient + body, cells, lead, columns - lead)
    else:
        valid = (label >= 0) & (label < columns)
        x_label = tl.load(logits + start + label, mask=valid, other=float("nan")).to(tl.float32)
        policy: tl.constexpr = "evict_first" if gradient is None else ("evict_last" if KEEP else "")
        at, ends = (logits + start, logits + body), (lead, columns - lead)
        DETAILS: tl.constexpr = entropies is not None
        kept, state = _read_row(at, cells, ends, label, x_label, UNROLL, HELD, STAGES, policy, ALIGNED, DETAILS)
        entropy, is_correct = None, None
        if DETAILS:
            entropy, is_correct = entropies + row, correct + row
        factor = tl.load(grad_scale)  # here, to be on its way while the lanes are joined
        if weights is not None:
            factor *= tl.load(weights + row).to(tl.float32)
        base, total = _write_results(losses + row, entropy, is_correct, x_label, state)
        if gradient is not None:
            factor = tl.where(valid, factor, float("nan"))
            tl.debug_barrier()  # whoever writes the label's column must not overtake those who still read it
            at, ends = (gradient + start, gradient + body), (lead, columns - lead)
            _write_gradient(logits + body, at, cells, ends, kept, base, factor / total, UNROLL, HELD, STAGES, ALIGNED)
            tl.debug_barrier()  # the label's column is written last
            at_label = (tl.exp2(x_label * LOG2E - base) / total - 1.0) * factor
            tl.store(gradient + start + label, at_label.to(gradient.dtype.element_ty), mask=valid)


@triton.jit
def _write_zeros(start: tl.tensor, body: tl.tensor, cells: tl.tensor, lead: tl.tensor, inner: tl.tensor) -> None:
    SLAB: tl.constexpr = cells.shape[0] * cells.shape[1]
    edge = tl.arange(0, ALIGNMENT)
    tl.store(start + edge, tl.zeros((ALIGNMENT,), start.dtype.element_ty), mask=edge < lead)
    zeros = tl.zeros(cells.shape, start.dtype.element_ty)
    full = inner // SLAB
    for i in range(full):
        tl.store(body + i * SLAB + cells, zeros, eviction_policy="evict_first")
    cell = full * SLAB + cells
    tl.store(body + cell, zeros, mask=cell < inner)


@triton.jit
def _read_row(
    at: tl.tensor,
    cells: tl.tensor,
    ends: tl.tensor,
    label: tl.tensor,
    x_label: tl.tensor,
    UNROLL: tl.constexpr,
    HELD: tl.constexpr,
    STAGES: tl.constexpr,
    POLICY: tl.constexpr,
    ALIGNED: tl.constexpr,
    DETAILS: tl.constexpr,
) -> tl.tensor:
    """The first pass: what stays in registers for the second, and the state of each lane, see _add_tiles."""
    SLAB: tl.constexpr = cells.shape[0] * cells.shape[1]
    start, body = at
    lead, inner = ends
    full = inner // (SLAB * UNROLL)
    ragged = ()
    for u in tl.static_range(UNROLL):
        cell = (full * UNROLL + u) * SLAB + cells
        ragged += (tl.load(body + cell, mask=cell < inner, other=LOWEST),)
    held = ()
    for u in tl.static_range(HELD * UNROLL):
        held += (tl.load(body + u * SLAB + cells, eviction_policy="evict_first"),)

    top = tl.full((cells.shape[0],), LOWEST, tl.float32)
    total = tl.zeros((cells.shape[0],), tl.float32)
    moment = tl.zeros((cells.shape[0],), tl.float32)
    beaten = tl.zeros((cells.shape[0],), tl.int32)
    edge = tl.arange(0, ALIGNMENT)[None, :]
    x_edge = tl.zeros((1, ALIGNMENT), start.dtype.element_ty)
    if not ALIGNED:  # every lane reads the columns before `lead`, and the first one counts them
        x_edge = tl.load(start + edge, mask=edge < lead, other=LOWEST)
        mine = tl.where(tl.arange(0, cells.shape[0])[:, None] == 0, x_edge, LOWEST)
        top, total, moment, beaten = _add_tiles(
            (mine,), 0, edge, label, x_label, top, total, moment, beaten, 1, DETAILS
        )
    label -= lead
    first = full * UNROLL * SLAB
    top, total, moment, beaten = _add_tiles(
        ragged, first, cells, label, x_label, top, total, moment, beaten, UNROLL, DETAILS
    )
    for i in tl.static_range(HELD):
        tiles = held[i * UNROLL : (i + 1) * UNROLL]
        top, total, moment, beaten = _add_tiles(
            tiles, i * UNROLL * SLAB, cells, label, x_label, top, total, moment, beaten, UNROLL, DETAILS
        )
    for i in tl.range(HELD, full, num_stages=STAGES):
        first = i * UNROLL * SLAB
        tiles = ()
        for u in tl.static_range(UNROLL):
            tiles += (tl.load(body + first + u * SLAB + cells, eviction_policy=POLICY),)
        top, total, moment, beaten = _add_tiles(
            tiles, first, cells, label, x_label, top, total, moment, beaten, UNROLL, DETAILS
        )
    return (ragged, held, x_edge), (top, total, moment, beaten)


@triton.jit
def _add_tiles(
    tiles: tl.tensor,
    first: tl.tensor,
    cells: tl.tensor,
    label: tl.tensor,
    x_label: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    moment: tl.tensor,
    beaten: tl.tensor,
    COUNT: tl.constexpr,
    DETAILS: tl.constexpr,
) -> tl.tensor:
    """The state of each lane, maximum * log2(e), sum, moment, beaten, with COUNT more slabs (LANES, VECTOR)."""
    peak = tiles[0].to(tl.float32)
    for i in tl.static_range(1, COUNT):
        peak = tl.maximum(peak, tiles[i].to(tl.float32))
    new_top = tl.maximum(top, tl.max(peak, axis=1) * LOG2E)
    base = tl.where(new_top == LOWEST, 0.0, new_top)  # -inf - -inf would be NaN
    shrink = tl.exp2(top - base)
    if DETAILS:
        moment = (moment + total * tl.where(top == LOWEST, 0.0, top - base)) * shrink
    added = tl.zeros_like(peak)
    for i in tl.static_range(COUNT):
        x = tiles[i].to(tl.float32)
        z = x * LOG2E - base[:, None]
        power = tl.exp2(z)
        added += power
        if DETAILS:
            moment += tl.sum(power * tl.where(power > 0.0, z, 0.0), axis=1)
            column = first + i * cells.shape[0] * cells.shape[1] + cells
            beats = (x > x_label) | ((x == x_label) & (column < label))
            beaten = tl.maximum(beaten, tl.max(beats.to(tl.int32), axis=1))
    return new_top, total * shrink + tl.sum(added, axis=1), moment, beaten


@triton.jit
def _write_results(
    loss: tl.tensor, entropy: tl.tensor, correct: tl.tensor, x_label: tl.tensor, state: tl.tensor
) -> tl.tensor:
    """The row's base and the sum of exp2(x * log2(e) - base); the loss is written, and unless None the details."""
    top, total, moment, beaten = state
    row_top = tl.max(top, axis=0)
    base = tl.where(row_top == LOWEST, 0.0, row_top)
    shrink = tl.exp2(top - base)
    row_total = tl.sum(total * shrink, axis=0)
    log2_total = tl.log2(row_total)
    row_loss = (log2_total - (x_label * LOG2E - base)) * LN2
    tl.store(loss, row_loss)
    if entropy is not None:
        moment = (moment + total * tl.where(top == LOWEST, 0.0, top - base)) * shrink
        tl.store(entropy, (log2_total - tl.sum(moment, axis=0) / row_total) * LN2)
        tl.store(correct, (tl.max(beaten, axis=0) == 0) & (row_loss < float("inf")))  # not so for NaN
    return base, row_total


@triton.jit
def _gradient(x: tl.tensor, base: tl.tensor, scale: tl.tensor) -> tl.tensor:
    return (tl.exp2(x.to(tl.float32) * LOG2E - base) * scale).to(x.dtype)


@triton.jit
def _write_gradient(
    body: tl.tensor,
    at: tl.tensor,
    cells: tl.tensor,
    ends: tl.tensor,
    kept: tl.tensor,
    base: tl.tensor,
    scale: tl.tensor,
    UNROLL: tl.constexpr,
    HELD: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """The second pass, backwards: scale * exp2(x * log2(e) - base), in the label's column as in any other."""
    SLAB: tl.constexpr = cells.shape[0] * cells.shape[1]
    gradient_start, gradient_body = at
    lead, inner = ends
    ragged, held, x_edge = kept
    full = inner // (SLAB * UNROLL)
    for i in tl.range(HELD, full, num_stages=STAGES):
        first = (full - 1 - (i - HELD)) * UNROLL * SLAB
        tiles = ()
        for u in tl.static_range(UNROLL):  # all loads before the first store, behind which they would have to wait
            tiles += (tl.load(body + first + u * SLAB + cells, eviction_policy="evict_first"),)
        for u in tl.static_range(UNROLL):
            g = _gradient(tiles[u], base, scale)
            tl.store(gradient_body + first + u * SLAB + cells, g, eviction_policy="evict_first")
    for u in tl.static_range(HELD * UNROLL):
        g = _gradient(held[u], base, scale)
        tl.store(gradient_body + u * SLAB + cells, g, eviction_policy="evict_first")
    for u in tl.static_range(UNROLL):
        cell = (full * UNROLL + u) * SLAB + cells
        g = _gradient(ragged[u], base, scale)
        tl.store(gradient_body + cell, g, mask=cell < inner, eviction_policy="evict_first")
    if not ALIGNED:
        edge = tl.arange(0, ALIGNMENT)[None, :]
        tl.store(gradient_start + edge, _gradient(x_edge, base, scale), mask=edge < lead)


@triton.jit
def scale_kernel(
    tensor: tl.tensor,
    factor: tl.tensor,
    divisor: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """tensor *= factor / divisor, by a fixed number of programs; nothing is touched when they are equal."""
    numerator, told = tl.load(factor).to(tl.float32), tl.load(divisor).to(tl.float32)
    if numerator != told:
        ratio = numerator / told
        per_row = tl.cdiv(columns, BLOCK)
        blocks = tl.full((), per_row, tl.int64) * rows
        cells = tl.arange(0, BLOCK)
        for block in range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0)):
            row = (block // per_row).to(tl.int64)
            column = (block - row * per_row) * BLOCK + cells
            place = tensor + row * stride + column
            x = tl.load(place, mask=column < columns, eviction_policy="evict_first").to(tl.float32)
            y = (x * ratio).to(tensor.dtype.element_ty)
            tl.store(place, y, mask=column < columns, eviction_policy="evict_first")
