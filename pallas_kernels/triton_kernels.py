"""Triton kernels of block-sparse attention: forward, gradient of queries, gradients of keys.

Arrays of tokens are `[b s h d]`, contiguous. A program serves one tile of rows of one head, and
goes through the tiles of the blocks that are listed for it; a block is one tile or several. The
grid is (tiles, heads, samples).

Tiles in the loops are loaded without masks: one that would pass the end of its array is read from
further up, and one that is longer than its array repeats the last row. Rows [low, high) of it
count.

What is in capitals is known when a kernel is compiled. KEYS and PAST are the rows of the current
and of the past buffer; PAST is 0 where there is none, and then its arguments are not read.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Below any score, and finite, also times the scale, so that no difference of two maxima is NaN.
LOWEST = tl.constexpr(-1e36)


@triton.jit
def forward(
  q, k, v, past_k, past_v, index, count, length, past_length,
  out, lse,
  SCALE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PAST: tl.constexpr,
  HEADS: tl.constexpr, DIM: tl.constexpr, LISTED: tl.constexpr, BLOCK_Q: tl.constexpr,
  BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
  """Attention `out` [b s h d], and base-2 log-sum-exp of the scores `lse` [b h s].

  index, count: key blocks of each query block [b h q k], [b h q]. length, past_length: valid keys
  [b]. BRANCH: see `_masked`.
  """
  ROW: tl.constexpr = HEADS * DIM
  FACTOR: tl.constexpr = SCALE * LOG2E
  SPLIT: tl.constexpr = BLOCK_K // TILE_K
  sample, plane, column, rows = _place(HEADS, DIM, TILE_Q)
  inside = rows < QUERIES
  tokens = sample * (QUERIES * ROW) + (rows[:, None] * ROW + column[None, :])
  q_tile = tl.load(q + tokens, mask=inside[:, None], other=0.0)
  k, v, past_k, past_v, length, past_length = _sample_keys(
    sample, k, v, past_k, past_v, length, past_length, KEYS, PAST, ROW
  )
  lists = plane * ((QUERIES + BLOCK_Q - 1) // BLOCK_Q) + tl.program_id(0) // (BLOCK_Q // TILE_Q)
  index += lists * LISTED
  at = tl.arange(0, TILE_K)
  top = tl.full([TILE_Q], LOWEST, tl.float32)
  total = tl.zeros([TILE_Q], tl.float32)
  acc = tl.zeros([TILE_Q, DIM], tl.float32)
  # An entry is read one step before addresses are made of it: then it does not count as a link of
  # a chain of loads, which the compiler would prefetch less far.
  entry = tl.load(index)
  for j in tl.range(0, tl.load(count + lists) * SPLIT):
    k_at, v_at, tile, low, high = _key_tile(
      entry, j % SPLIT, at, column, k, v, past_k, past_v, length, past_length,
      KEYS, PAST, ROW, BLOCK_K, TILE_K,
    )  # fmt: skip
    entry = tl.load(index + tl.minimum((j + 1) // SPLIT, LISTED - 1))
    k_tile = tl.load(k_at + tile)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    s = _masked(s, at, low, high, TILE_K, BRANCH)
    above = tl.maximum(top, tl.max(s, 1))
    shrink = tl.exp2((top - above) * FACTOR)
    p = tl.exp2(s * FACTOR - (above * FACTOR)[:, None])
    total = total * shrink + tl.sum(p, 1)
    top = above
    v_tile = tl.load(v_at + tile)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
  acc = acc / tl.where(total > 0, total, 1.0)[:, None]
  tl.store(out + tokens, acc.to(out.dtype.element_ty), mask=inside[:, None])
  # The total of a row without keys is zero, and its logarithm -inf.
  tl.store(lse + plane * QUERIES + rows, top * FACTOR + tl.log2(total), mask=inside)


@triton.jit
def gradient_of_queries(
  q, k, v, past_k, past_v, index, count, length, past_length, dout, stats, lse, out,
  dq, new_stats,
  SCALE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PAST: tl.constexpr,
  HEADS: tl.constexpr, DIM: tl.constexpr, LISTED: tl.constexpr, BLOCK_Q: tl.constexpr,
  BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BRANCH: tl.constexpr,
  FUSED: tl.constexpr,
):  # fmt: skip
  """Gradient `dq` [b s h d] from that of the output, `dout`.

  stats: two numbers of each row [b h s 2]: log-sum-exp, +inf where there are no keys, and the sum
  over d of out * dout. FUSED: they are made here, from `lse` and `out`, and left in `new_stats`;
  else none of these three is touched. The rest as in `forward`.
  """
  ROW: tl.constexpr = HEADS * DIM
  FACTOR: tl.constexpr = SCALE * LOG2E
  SPLIT: tl.constexpr = BLOCK_K // TILE_K
  sample, plane, column, rows = _place(HEADS, DIM, TILE_Q)
  inside = rows < QUERIES
  tokens = sample * (QUERIES * ROW) + (rows[:, None] * ROW + column[None, :])
  q_tile = tl.load(q + tokens, mask=inside[:, None], other=0.0)
  do_tile = tl.load(dout + tokens, mask=inside[:, None], other=0.0)
  pair = (plane * QUERIES + rows) * 2
  if FUSED:
    row_lse = tl.load(lse + plane * QUERIES + rows, mask=inside, other=0.0)
    row_lse = tl.where(row_lse > float("-inf"), row_lse, float("inf"))
    out_tile = tl.load(out + tokens, mask=inside[:, None], other=0.0)
    row_delta = tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(new_stats + pair, row_lse, mask=inside)
    tl.store(new_stats + pair + 1, row_delta, mask=inside)
  else:
    row_lse = tl.load(stats + pair, mask=inside, other=0.0)
    row_delta = tl.load(stats + pair + 1, mask=inside, other=0.0)
  k, v, past_k, past_v, length, past_length = _sample_keys(
    sample, k, v, past_k, past_v, length, past_length, KEYS, PAST, ROW
  )
  lists = plane * ((QUERIES + BLOCK_Q - 1) // BLOCK_Q) + tl.program_id(0) // (BLOCK_Q // TILE_Q)
  index += lists * LISTED
  at = tl.arange(0, TILE_K)
  acc = tl.zeros([TILE_Q, DIM], tl.float32)
  entry = tl.load(index)
  for j in tl.range(0, tl.load(count + lists) * SPLIT):
    k_at, v_at, tile, low, high = _key_tile(
      entry, j % SPLIT, at, column, k, v, past_k, past_v, length, past_length,
      KEYS, PAST, ROW, BLOCK_K, TILE_K,
    )  # fmt: skip
    entry = tl.load(index + tl.minimum((j + 1) // SPLIT, LISTED - 1))
    k_tile = tl.load(k_at + tile)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    s = _masked(s, at, low, high, TILE_K, BRANCH)
    p = tl.exp2(s * FACTOR - row_lse[:, None])
    v_tile = tl.load(v_at + tile)
    dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
    ds = (p * (dp - row_delta[:, None])).to(k_tile.dtype)
    acc = tl.dot(ds, k_tile, acc, input_precision="ieee")
  tl.store(dq + tokens, (acc * SCALE).to(dq.dtype.element_ty), mask=inside[:, None])


@triton.jit
def gradients_of_keys(
  q, k, v, past_k, past_v, index, count, length, past_length, dout, stats,
  dk, dv, past_dk, past_dv,
  SCALE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PAST: tl.constexpr,
  HEADS: tl.constexpr, DIM: tl.constexpr, BLOCKS: tl.constexpr, SKIPPED: tl.constexpr,
  BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
  TURNED: tl.constexpr,
):  # fmt: skip
  """Gradients of keys and values `dk`, `dv`, `past_dk`, `past_dv` [b s h d].

  index, count: query blocks of each key block [b h n q], [b h n], where n is BLOCKS. In the grid
  the tiles of the past buffer come first. SKIPPED: blocks before the first tile.
  TURNED: scores have keys as rows, so that the products over queries take them as they are.
  """
  ROW: tl.constexpr = HEADS * DIM
  FACTOR: tl.constexpr = SCALE * LOG2E
  SPLIT: tl.constexpr = BLOCK_Q // TILE_Q
  LISTED: tl.constexpr = (QUERIES + BLOCK_Q - 1) // BLOCK_Q
  LAST: tl.constexpr = QUERIES - TILE_Q if QUERIES > TILE_Q else 0
  sample, plane, column, rows = _place(HEADS, DIM, TILE_K)
  block = tl.program_id(0) * TILE_K // BLOCK_K + SKIPPED
  size = KEYS
  if PAST > 0:
    PAST_TILES: tl.constexpr = (PAST + TILE_K - 1) // TILE_K
    older = tl.program_id(0) < PAST_TILES
    k, v = tl.where(older, past_k, k), tl.where(older, past_v, v)
    dk, dv = tl.where(older, past_dk, dk), tl.where(older, past_dv, dv)
    length = tl.where(older, past_length, length)
    size = tl.where(older, PAST, KEYS)
    rows -= tl.where(older, 0, PAST_TILES * TILE_K)
    past_tiles = tl.where(older, 0, PAST_TILES)
    past_blocks = tl.where(older, 0, (PAST + BLOCK_K - 1) // BLOCK_K)
    block = (tl.program_id(0) - past_tiles) * TILE_K // BLOCK_K + past_blocks
  inside = rows < size
  seen = rows < tl.load(length + sample)
  keys = sample * size * ROW + (rows[:, None] * ROW + column[None, :])
  k_tile = tl.load(k + keys, mask=(inside & seen)[:, None], other=0.0)
  v_tile = tl.load(v + keys, mask=(inside & seen)[:, None], other=0.0)

  q += sample * (QUERIES * ROW)
  dout += sample * (QUERIES * ROW)
  stats += plane * (QUERIES * 2)
  lists = plane * BLOCKS + block
  index += lists * LISTED
  at = tl.arange(0, TILE_Q)
  near = tl.minimum(at, QUERIES - 1)
  tile = near[:, None] * ROW + column[None, :]
  # Both numbers at once: separately they would be copied to each thread that wants one of them.
  pair = near[:, None] * 2 + tl.arange(0, 2)[None, :]
  dk_acc = tl.zeros([TILE_K, DIM], tl.float32)
  dv_acc = tl.zeros([TILE_K, DIM], tl.float32)
  entry = tl.load(index)
  for j in tl.range(0, tl.load(count + lists) * SPLIT):
    start = entry * BLOCK_Q + j % SPLIT * TILE_Q
    entry = tl.load(index + tl.minimum((j + 1) // SPLIT, LISTED - 1))
    first = tl.minimum(start, LAST)
    q_tile = tl.load(q + first * ROW + tile)
    do_tile = tl.load(dout + first * ROW + tile)
    row_lse, row_delta = tl.split(tl.load(stats + first * 2 + pair))
    # Queries that do not count have no probabilities. Keys that do not are dropped in the end.
    if (first < start) | (QUERIES < TILE_Q):
      counts = (first + at >= start) & (at < QUERIES)
      row_lse = tl.where(counts, row_lse, float("inf"))
    if TURNED:
      s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
      p = tl.exp2(s * FACTOR - row_lse[None, :])
      dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
      dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision="ieee")
      ds = (p * (dp - row_delta[None, :])).to(q_tile.dtype)
      dk_acc = tl.dot(ds, q_tile, dk_acc, input_precision="ieee")
    else:
      s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
      p = tl.exp2(s * FACTOR - row_lse[:, None])
      dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
      dv_acc = tl.dot(tl.trans(p.to(do_tile.dtype)), do_tile, dv_acc, input_precision="ieee")
      ds = (p * (dp - row_delta[:, None])).to(q_tile.dtype)
      dk_acc = tl.dot(tl.trans(ds), q_tile, dk_acc, input_precision="ieee")
  dk_acc = tl.where(seen[:, None], dk_acc * SCALE, 0.0)
  dv_acc = tl.where(seen[:, None], dv_acc, 0.0)
  tl.store(dk + keys, dk_acc.to(dk.dtype.element_ty), mask=inside[:, None])
  tl.store(dv + keys, dv_acc.to(dv.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _place(HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr):
  """Of this program: sample, sample and head as one number, columns and rows of its tile."""
  sample = tl.program_id(2).to(tl.int64)
  plane = sample * HEADS + tl.program_id(1)
  column = tl.program_id(1) * DIM + tl.arange(0, DIM)
  rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
  return sample, plane, column, rows


@triton.jit
def _sample_keys(
  sample, k, v, past_k, past_v, length, past_length,
  KEYS: tl.constexpr, PAST: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
  """Both buffers of one sample, and their valid rows."""
  k += sample * (KEYS * ROW)
  v += sample * (KEYS * ROW)
  length = tl.load(length + sample)
  if PAST > 0:
    past_k += sample * (PAST * ROW)
    past_v += sample * (PAST * ROW)
    past_length = tl.load(past_length + sample)
  return k, v, past_k, past_v, length, past_length


@triton.jit
def _key_tile(
  block, part, at, column, k, v, past_k, past_v, length, past_length,
  KEYS: tl.constexpr, PAST: tl.constexpr, ROW: tl.constexpr,
  BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
  """Where a tile of a key block lies.

  Returns the addresses of its first rows of keys and of values, offsets from there, low, high.
  """
  last = KEYS - 1
  if PAST > 0:
    older = block < (PAST + BLOCK_K - 1) // BLOCK_K
    k = tl.where(older, past_k, k)
    v = tl.where(older, past_v, v)
    length = tl.where(older, past_length, length)
    last = tl.where(older, PAST - 1, KEYS - 1)
    block -= tl.where(older, 0, (PAST + BLOCK_K - 1) // BLOCK_K)
  start = block * BLOCK_K + part * TILE_K
  first = tl.minimum(start, last + 1 - TILE_K)
  if KEYS < TILE_K or (PAST > 0 and PAST < TILE_K):
    first = tl.maximum(first, 0)
    at = tl.minimum(at, last)
  tile = at[:, None] * ROW + column[None, :]
  return k + first * ROW, v + first * ROW, tile, start - first, length - first


@triton.jit
def _masked(s, at, low, high, TILE_K: tl.constexpr, BRANCH: tl.constexpr):
  """Scores [queries keys], -inf for keys outside [low, high).

  BRANCH: nothing is computed where all keys count. Otherwise a bias is added, for all tiles alike.
  """
  if BRANCH:
    if (low > 0) | (high < TILE_K):
      s = tl.where(((at >= low) & (at < high))[None, :], s, float("-inf"))
  else:
    s += tl.where((at >= low) & (at < high), 0.0, float("-inf"))[None, :]
  return s
