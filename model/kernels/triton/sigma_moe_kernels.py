"""The kernels of model/kernels/triton/sigma_moe.py, which says what they do together.

R rows: slots sorted by expert. D model width, G expert width, K experts per token. A program that holds only a part of
an expert's hidden layer (`chunk`, where G is above BLOCK_HIDDEN) writes a row of its own for the sum to add.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_rows(
    load_ptr, tile, FIRST_EXPERT: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOTAL_EXPERTS: tl.constexpr,
    EXPERTS_POWER: tl.constexpr, BLOCK_ROWS: tl.constexpr
):  # fmt: skip
    """-> of the NUM_EXPERTS experts here, from FIRST_EXPERT on, the one of `tile` (NUM_EXPERTS or more past the last);
    the tile's first row, and the end of the expert's rows, both among the rows of all experts."""
    experts = tl.arange(0, EXPERTS_POWER)
    load = tl.load(load_ptr + experts, mask=experts < TOTAL_EXPERTS, other=0).to(tl.int32)
    here = (experts >= FIRST_EXPERT) & (experts < FIRST_EXPERT + NUM_EXPERTS)
    tiles = tl.where(here, (load + BLOCK_ROWS - 1) // BLOCK_ROWS, 0)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = experts < expert
    tile_in_segment = tile - tl.sum(tl.where(before, tiles, 0), 0)
    begin = tl.sum(tl.where(before, load, 0), 0)
    end = tl.sum(tl.where(experts <= expert, load, 0), 0)
    return expert - FIRST_EXPERT, begin + tile_in_segment * BLOCK_ROWS, end


@triton.jit
def tile_mask(rows, columns, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """`rows` [M] bool and `columns` [BLOCK] below SIZE, the latter only where blocks do not divide SIZE."""
    if SIZE % BLOCK != 0:
        return rows[:, None] & (columns < SIZE)[None, :]
    else:
        return rows[:, None]


@triton.jit
def load_weight(
    ptr, first, second, FIRST: tl.constexpr, SECOND: tl.constexpr, FIRST_STRIDE: tl.constexpr,
    SECOND_STRIDE: tl.constexpr, BLOCK_FIRST: tl.constexpr, BLOCK_SECOND: tl.constexpr
):  # fmt: skip
    """A tile [BLOCK_FIRST, BLOCK_SECOND] of one expert's matrix, or of its transpose; no mask where none is needed."""
    ptrs = ptr + first[:, None] * FIRST_STRIDE + second[None, :] * SECOND_STRIDE
    if FIRST % BLOCK_FIRST != 0 and SECOND % BLOCK_SECOND != 0:
        return tl.load(ptrs, mask=(first < FIRST)[:, None] & (second < SECOND)[None, :], other=0.0)
    elif FIRST % BLOCK_FIRST != 0:
        return tl.load(ptrs, mask=(first < FIRST)[:, None], other=0.0)
    elif SECOND % BLOCK_SECOND != 0:
        return tl.load(ptrs, mask=(second < SECOND)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def forward_kernel(
    x_ptr, scores_ptr, order_ptr, load_ptr, up_ptr, down_ptr, hidden_ptr, rows_ptr, present_ptr,
    D: tl.constexpr, G: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr, FIRST_EXPERT: tl.constexpr,
    NUM_EXPERTS: tl.constexpr, TOTAL_EXPERTS: tl.constexpr, EXPERTS_POWER: tl.constexpr, SWIGLU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_REDUCE: tl.constexpr, BLOCK_OUT: tl.constexpr
):  # fmt: skip
    """Slots of one expert: hidden [R, G] (SwiGLU: both halves before the activation, [R, 2 G]) and rows [slots, D]."""
    WIDTH: tl.constexpr = 2 * G if SWIGLU else G
    CHUNKS: tl.constexpr = (G + BLOCK_HIDDEN - 1) // BLOCK_HIDDEN
    expert, first_row, end = find_rows(
        load_ptr, tl.program_id(0), FIRST_EXPERT, NUM_EXPERTS, TOTAL_EXPERTS, EXPERTS_POWER, BLOCK_ROWS
    )
    if expert >= NUM_EXPERTS:
        return
    chunk = tl.program_id(1)
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    valid = rows < end
    slots = tl.load(order_ptr + rows, mask=valid, other=0)
    source = x_ptr + (slots // K)[:, None] * D
    hidden_columns = chunk * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    up_ptr += expert.to(tl.int64) * (D * WIDTH)

    product = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
    linear = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
    for start in range(0, D, BLOCK_REDUCE):
        columns = start + tl.arange(0, BLOCK_REDUCE)
        x = tl.load(source + columns[None, :], mask=tile_mask(valid, columns, D, BLOCK_REDUCE), other=0.0)
        weight = load_weight(up_ptr, columns, hidden_columns, D, G, WIDTH, 1, BLOCK_REDUCE, BLOCK_HIDDEN)
        product = tl.dot(x, weight, product, input_precision="ieee")
        if SWIGLU:
            weight = load_weight(up_ptr + G, columns, hidden_columns, D, G, WIDTH, 1, BLOCK_REDUCE, BLOCK_HIDDEN)
            linear = tl.dot(x, weight, linear, input_precision="ieee")

    local = tl.arange(0, BLOCK_ROWS)[:, None]
    hidden_ptrs = hidden_ptr + first_row.to(tl.int64) * WIDTH + (local * WIDTH + hidden_columns[None, :])
    hidden_mask = tile_mask(valid, hidden_columns, G, BLOCK_HIDDEN)
    if SWIGLU:
        tl.store(hidden_ptrs, product.to(hidden_ptr.dtype.element_ty), mask=hidden_mask)
        tl.store(hidden_ptrs + G, linear.to(hidden_ptr.dtype.element_ty), mask=hidden_mask)
        hidden = product * tl.sigmoid(product) * linear
    else:
        hidden = tl.maximum(product, 0.0)
        tl.store(hidden_ptrs, hidden.to(hidden_ptr.dtype.element_ty), mask=hidden_mask)
    gate = tl.load(scores_ptr + slots, mask=valid, other=0.0).to(tl.float32)
    gated = (hidden * gate[:, None]).to(x_ptr.dtype.element_ty)
    if present_ptr is not None:
        tl.store(present_ptr + slots, tl.full((BLOCK_ROWS,), 1, tl.int8), mask=valid & (chunk == 0))

    targets = rows_ptr + (slots * CHUNKS + chunk)[:, None] * ROW_STRIDE
    down_ptr += expert.to(tl.int64) * (G * D)
    for start in range(0, D, BLOCK_OUT):
        columns = start + tl.arange(0, BLOCK_OUT)
        weight = load_weight(down_ptr, hidden_columns, columns, G, D, D, 1, BLOCK_HIDDEN, BLOCK_OUT)
        out = tl.dot(gated, weight, input_precision="ieee")
        out_mask = tile_mask(valid, columns, D, BLOCK_OUT)
        tl.store(targets + columns[None, :], out.to(rows_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def through_gate(
    grad_gated, gate, hidden_ptr, grad_hidden_ptr, gated_ptr, start, valid, G: tl.constexpr, WIDTH: tl.constexpr,
    SWIGLU: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_PIECE: tl.constexpr,
    COLUMNS: tl.constexpr
):  # fmt: skip
    """From the gradient of the gated hidden layer [BLOCK_ROWS, COLUMNS] to those of the gate [BLOCK_ROWS], of the
    product and of SwiGLU's linear half. Stores the latter two and the gated hidden layer, from column `start` on.

    At most BLOCK_PIECE columns at a time: what is loaded for them takes registers beside the whole gradient."""
    if COLUMNS > BLOCK_PIECE:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = tl.split(tl.permute(tl.reshape(grad_gated, (BLOCK_ROWS, 2, HALF)), (0, 2, 1)))
        left_gate, left_product, left_linear = through_gate(
            left, gate, hidden_ptr, grad_hidden_ptr, gated_ptr, start, valid, G, WIDTH, SWIGLU, BLOCK_ROWS,
            BLOCK_HIDDEN, BLOCK_PIECE, HALF
        )  # fmt: skip
        right_gate, right_product, right_linear = through_gate(
            right, gate, hidden_ptr, grad_hidden_ptr, gated_ptr, start + HALF, valid, G, WIDTH, SWIGLU, BLOCK_ROWS,
            BLOCK_HIDDEN, BLOCK_PIECE, HALF
        )  # fmt: skip
        grad_product = side_by_side(left_product, right_product, BLOCK_ROWS, COLUMNS)
        grad_linear = side_by_side(left_linear, right_linear, BLOCK_ROWS, COLUMNS)
        return left_gate + right_gate, grad_product, grad_linear
    else:
        columns = start + tl.arange(0, COLUMNS)
        mask = tile_mask(valid, columns, G, BLOCK_HIDDEN)
        local, gate = tl.arange(0, BLOCK_ROWS)[:, None], gate[:, None]
        offsets = local * WIDTH + columns[None, :]
        dtype: tl.constexpr = gated_ptr.dtype.element_ty
        product = tl.load(hidden_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if SWIGLU:
            linear = tl.load(hidden_ptr + G + offsets, mask=mask, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(product)
            hidden = product * sigmoid * linear
            grad_gate = tl.sum(grad_gated * hidden, 1)
            grad_linear = (grad_gated * gate * product * sigmoid).to(dtype)
            grad_product = (grad_gated * gate * linear * sigmoid * (1.0 + product * (1.0 - sigmoid))).to(dtype)
            tl.store(grad_hidden_ptr + G + offsets, grad_linear, mask=mask)
        else:
            hidden = product
            grad_gate = tl.sum(grad_gated * hidden, 1)
            grad_product = tl.where(product > 0.0, grad_gated * gate, 0.0).to(dtype)
            grad_linear = grad_product
        tl.store(grad_hidden_ptr + offsets, grad_product, mask=mask)
        tl.store(gated_ptr + (local * G + columns[None, :]), (hidden * gate).to(dtype), mask=mask)
        return grad_gate, grad_product, grad_linear


@triton.jit
def side_by_side(left, right, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Two [ROWS, COLUMNS / 2] as one [ROWS, COLUMNS]."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (ROWS, COLUMNS))


@triton.jit
def backward_kernel(
    grad_ptr, scores_ptr, order_ptr, load_ptr, up_ptr, down_ptr, hidden_ptr, grad_hidden_ptr, gated_ptr,
    grad_scores_ptr, rows_ptr, present_ptr,
    D: tl.constexpr, G: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr, FIRST_EXPERT: tl.constexpr,
    NUM_EXPERTS: tl.constexpr, TOTAL_EXPERTS: tl.constexpr, EXPERTS_POWER: tl.constexpr, SWIGLU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_REDUCE: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_PIECE: tl.constexpr
):  # fmt: skip
    """The way back through one expert: gradients of hidden layer and gates, the gated hidden layer again, and rows."""
    WIDTH: tl.constexpr = 2 * G if SWIGLU else G
    CHUNKS: tl.constexpr = (G + BLOCK_HIDDEN - 1) // BLOCK_HIDDEN
    expert, first_row, end = find_rows(
        load_ptr, tl.program_id(0), FIRST_EXPERT, NUM_EXPERTS, TOTAL_EXPERTS, EXPERTS_POWER, BLOCK_ROWS
    )
    if expert >= NUM_EXPERTS:
        return
    chunk = tl.program_id(1)
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    valid = rows < end
    slots = tl.load(order_ptr + rows, mask=valid, other=0)
    source = grad_ptr + (slots // K)[:, None] * D
    hidden_columns = chunk * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    down_ptr += expert.to(tl.int64) * (G * D)

    grad_gated = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
    for start in range(0, D, BLOCK_REDUCE):
        columns = start + tl.arange(0, BLOCK_REDUCE)
        grad = tl.load(source + columns[None, :], mask=tile_mask(valid, columns, D, BLOCK_REDUCE), other=0.0)
        weight = load_weight(down_ptr, columns, hidden_columns, D, G, 1, D, BLOCK_REDUCE, BLOCK_HIDDEN)
        grad_gated = tl.dot(grad, weight, grad_gated, input_precision="ieee")

    gate = tl.load(scores_ptr + slots, mask=valid, other=0.0).to(tl.float32)
    first = first_row.to(tl.int64)
    grad_gate, grad_product, grad_linear = through_gate(
        grad_gated, gate, hidden_ptr + first * WIDTH, grad_hidden_ptr + first * WIDTH, gated_ptr + first * G,
        chunk * BLOCK_HIDDEN, valid, G, WIDTH, SWIGLU, BLOCK_ROWS, BLOCK_HIDDEN, BLOCK_PIECE, BLOCK_HIDDEN
    )  # fmt: skip
    # Loaded again: kept across the loop, they would take registers of it.
    slots = tl.load(order_ptr + rows, mask=valid, other=0)
    tl.store(grad_scores_ptr + slots * CHUNKS + chunk, grad_gate.to(grad_scores_ptr.dtype.element_ty), mask=valid)
    if present_ptr is not None:
        tl.store(present_ptr + slots, tl.full((BLOCK_ROWS,), 1, tl.int8), mask=valid & (chunk == 0))

    targets = rows_ptr + (slots * CHUNKS + chunk)[:, None] * ROW_STRIDE
    up_ptr += expert.to(tl.int64) * (D * WIDTH)
    for start in range(0, D, BLOCK_OUT):
        columns = start + tl.arange(0, BLOCK_OUT)
        weight = load_weight(up_ptr, hidden_columns, columns, G, D, 1, WIDTH, BLOCK_HIDDEN, BLOCK_OUT)
        out = tl.dot(grad_product, weight, input_precision="ieee")
        if SWIGLU:
            weight = load_weight(up_ptr + G, hidden_columns, columns, G, D, 1, WIDTH, BLOCK_HIDDEN, BLOCK_OUT)
            out = tl.dot(grad_linear, weight, out, input_precision="ieee")
        out_mask = tile_mask(valid, columns, D, BLOCK_OUT)
        tl.store(targets + columns[None, :], out.to(rows_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def sum_kernel(
    rows_ptr, present_ptr, residual_ptr, y_ptr, num_tokens,
    D: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, ROW_STRIDE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_OUT: tl.constexpr
):  # fmt: skip
    """y[n] = sum over the K * CHUNKS rows of token n, in fp32, in their order, then residual[n] if given."""
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    valid = tokens < num_tokens
    mask = tile_mask(valid, columns, D, BLOCK_OUT)
    tokens = tokens.to(tl.int64)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), tl.float32)
    for j in tl.static_range(K * CHUNKS):
        ptrs = rows_ptr + (tokens * (K * CHUNKS) + j)[:, None] * ROW_STRIDE + columns[None, :]
        if present_ptr is not None:
            present = tl.load(present_ptr + tokens * K + j // CHUNKS, mask=valid, other=0) != 0
            total += tl.load(ptrs, mask=mask & present[:, None], other=0.0).to(tl.float32)
        else:
            total += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    places = tokens[:, None] * D + columns[None, :]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + places, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradient_kernel(
    narrow_ptr, source_ptr, order_ptr, load_ptr, out_ptr,
    D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, D_STRIDE: tl.constexpr, WIDTH_STRIDE: tl.constexpr,
    FIRST_EXPERT: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOTAL_EXPERTS: tl.constexpr, EXPERTS_POWER: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """out[split, e] = sum over the rows r of expert e (of its part `split`) of narrow[r] (x) source[token of r]:
    [WIDTH, D] with the given strides."""
    part = tl.program_id(1)
    expert, split = part // SPLITS, part % SPLITS
    experts = tl.arange(0, EXPERTS_POWER)
    load = tl.load(load_ptr + experts, mask=experts < TOTAL_EXPERTS, other=0).to(tl.int32)
    begin = tl.sum(tl.where(experts < FIRST_EXPERT + expert, load, 0), 0)
    count = tl.sum(tl.where(experts == FIRST_EXPERT + expert, load, 0), 0)
    end = begin + count
    if SPLITS > 1:
        share = (count + SPLITS * BLOCK_ROWS - 1) // (SPLITS * BLOCK_ROWS) * BLOCK_ROWS
        begin += split * share
        end = tl.minimum(end, begin + share)
    NUM_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    widths = tl.program_id(0) // NUM_D * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    columns = tl.program_id(0) % NUM_D * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_WIDTH, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        valid = rows < end
        tokens = tl.load(order_ptr + rows, mask=valid, other=0) // K
        # Loaded transposed: a tl.trans between load and product keeps cp.async from it on sm_80.
        narrow_ptrs = narrow_ptr + widths[:, None] + rows.to(tl.int64)[None, :] * WIDTH
        if WIDTH % BLOCK_WIDTH != 0:
            narrow = tl.load(narrow_ptrs, mask=(widths < WIDTH)[:, None] & valid[None, :], other=0.0)
        else:
            narrow = tl.load(narrow_ptrs, mask=valid[None, :], other=0.0)
        source_ptrs = source_ptr + tokens[:, None] * D + columns[None, :]
        source = tl.load(source_ptrs, mask=tile_mask(valid, columns, D, BLOCK_D), other=0.0)
        total = tl.dot(narrow, source, total, input_precision="ieee")
    out_ptr += (split * NUM_EXPERTS + expert).to(tl.int64) * (D * WIDTH)
    mask = tile_mask(widths < WIDTH, columns, D, BLOCK_D)
    ptrs = out_ptr + widths[:, None] * WIDTH_STRIDE + columns[None, :] * D_STRIDE
    tl.store(ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)
