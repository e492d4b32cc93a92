"""Triton kernels of the block map: means of blocks, and the choice of blocks.

What is in capitals is known when a kernel is compiled.
"""

import triton
import triton.language as tl


@triton.jit
def block_means(
  first, second,
  first_means, second_means,
  FIRST: tl.constexpr, SECOND: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
  BLOCK: tl.constexpr,
):  # fmt: skip
  """Means `first_means`, `second_means` [b h n d] of the blocks of `first`, `second` [b s h d].

  FIRST, SECOND: rows of each; SECOND is 0 where there is one array, and then the other argument is
  not read. The grid is (heads, blocks of both, samples): programs that run together read rows that
  lie together. A program has all loads of its block in flight at once.
  """
  ROW: tl.constexpr = HEADS * DIM
  FIRST_BLOCKS: tl.constexpr = (FIRST + BLOCK - 1) // BLOCK
  head, block = tl.program_id(0), tl.program_id(1)
  sample = tl.program_id(2).to(tl.int64)
  x, means = first, first_means
  size, blocks = FIRST, FIRST_BLOCKS
  if SECOND > 0:
    later = block >= FIRST_BLOCKS
    x, means = tl.where(later, second, x), tl.where(later, second_means, means)
    size = tl.where(later, SECOND, FIRST)
    blocks = tl.where(later, (SECOND + BLOCK - 1) // BLOCK, FIRST_BLOCKS)
    block -= tl.where(later, FIRST_BLOCKS, 0)
  column = tl.arange(0, DIM)
  at = tl.arange(0, BLOCK)
  inside = size - block * BLOCK
  x += (sample * size + block * BLOCK) * ROW + head * DIM
  tile = tl.load(x + at[:, None] * ROW + column[None, :], mask=(at < inside)[:, None], other=0.0)
  mean = tl.sum(tile.to(tl.float32), 0) / tl.minimum(inside, BLOCK).to(tl.float32)
  means += ((sample * HEADS + head) * blocks + block) * DIM
  tl.store(means + column, mean.to(means.dtype.element_ty))


@triton.jit
def choose_blocks(
  q_means, k_means, past_means, count, past_blocks,
  index,
  QUERIES: tl.constexpr, KEYS: tl.constexpr, PAST: tl.constexpr, HEADS: tl.constexpr,
  DIM: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
  ENTRIES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
  """Lists `index` [b h q MOST] of the key blocks that score best, in the order of their numbers.

  q_means [b h q d], k_means [b h n d], past_means [b h p d]: q, n, p are QUERIES, KEYS, PAST; PAST
  is 0 where there is no past, and then its arguments are not read. Numbers of past blocks come
  first. count: entries that count [b]; the last of them is repeated behind. past_blocks: valid past
  blocks [b].

  ROWS: query blocks of a program. COLUMNS, ENTRIES: powers of two, no less than PAST + KEYS, which
  is below 1,024, and than MOST. DEPTH: numbers of a mean in one step of the product. The grid is
  (tiles of query blocks, heads, samples).
  """
  ALL: tl.constexpr = PAST + KEYS
  sample = tl.program_id(2).to(tl.int64)
  plane = sample * HEADS + tl.program_id(1)
  row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
  column = tl.arange(0, COLUMNS)
  deep = tl.arange(0, DEPTH)
  q_at = q_means + plane * (QUERIES * DIM) + row * DIM
  k_at = k_means + plane * (KEYS * DIM) + (column - PAST) * DIM
  valid = column < ALL
  if PAST > 0:
    past_at = past_means + plane * (PAST * DIM) + column * DIM
    k_at = tl.where(column < PAST, past_at, k_at)
    valid &= (column >= PAST) | (column < tl.load(past_blocks + sample))
  s = tl.zeros([ROWS, COLUMNS], tl.float32)
  for start in tl.range(0, DIM, DEPTH):
    q_tile = tl.load(
      q_at[:, None] + (start + deep)[None, :], mask=(row < QUERIES)[:, None], other=0.0
    )
    k_tile = tl.load(
      k_at[:, None] + (start + deep)[None, :], mask=(column < ALL)[:, None], other=0.0
    )
    s = tl.dot(q_tile, tl.trans(k_tile), s, input_precision="ieee")

  # Numbers without sign in the order of the scores: 0 for what is no block, all ones for NaN.
  bits = tl.where(s == 0, 0.0, s).to(tl.uint32, bitcast=True)
  rank = bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000)
  rank = tl.where(s == s, rank, 0xFFFFFFFF)
  rank = tl.where(valid[None, :], rank, 0)

  # The largest limit that `wanted` numbers reach, two of its bits at a time. Three counts below
  # 1,024 lie in one number: a sum over a row is what takes time, since it runs over all warps.
  wanted = tl.minimum(tl.maximum(tl.load(count + sample), 1), MOST)
  limit = tl.zeros([ROWS], tl.uint32)
  for i in tl.range(0, 16):
    step = tl.full([ROWS], 1, tl.uint32) << (30 - 2 * i)
    reach = (rank >= (limit + step)[:, None]).to(tl.int32)
    reach += (rank >= (limit + 2 * step)[:, None]).to(tl.int32) << 10
    reach += (rank >= (limit + 3 * step)[:, None]).to(tl.int32) << 20
    counts = tl.sum(reach, 1)
    steps = (counts & 1023 >= wanted).to(tl.uint32)
    steps += ((counts >> 10) & 1023 >= wanted).to(tl.uint32)
    steps += (counts >> 20 >= wanted).to(tl.uint32)
    limit += step * steps

  # Of those at the limit the first ones. Again two counts lie in one number.
  above, level = rank > limit[:, None], rank == limit[:, None]
  reach = above.to(tl.int32) + (level.to(tl.int32) << 10)
  left = wanted - (tl.sum(reach, 1) & 1023)[:, None]
  reach = tl.cumsum(reach, 1)
  chosen = above | (level & (reach >> 10 <= left))
  entry = (reach & 1023) + tl.minimum(reach >> 10, left) - 1
  lists = index + (plane * QUERIES + row) * MOST
  tl.store(
    lists[:, None] + entry,
    tl.broadcast_to(column[None, :], [ROWS, COLUMNS]),
    mask=chosen & (row < QUERIES)[:, None],
  )
  last = tl.max(tl.where(chosen, column[None, :], 0), 1)
  rest = tl.arange(0, ENTRIES)[None, :]
  tl.store(
    lists[:, None] + rest,
    tl.broadcast_to(last[:, None], [ROWS, ENTRIES]),
    mask=(rest >= wanted) & (rest < MOST) & (row < QUERIES)[:, None],
  )
