"""Oracle of the Wan transformer and of streaming variant "paper": plain NumPy, float64, loops.

Written from the specification alone, independently of hfjax, and kept slow on purpose: nothing is
incremental or fused. Parameters are a dict under original names (`blocks.0.self_attn.q.weight`),
rotary pairs are neighbouring channels, latents are [frames, rows, columns, channels], and
everything is for one sample; only `predict_flow` takes a batch.

Dimension letters: f frames, n tokens (frame, row, column; column fastest), m model width, h heads,
d head width, t text rows, w text width.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Params = Mapping[str, np.ndarray]
# (layer, q, k, v) -> output before the o projection; all [n h d], q and k normed and unrotated.
Attend = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Sizes(NamedTuple):
  """What the parameters do not tell."""

  heads: int
  text_len: int
  patch: tuple[int, int] = (2, 2)
  eps: float = 1e-6


class Window(NamedTuple):
  """Window of a stream, in frames; share of key blocks kept; tokens in a block."""

  window: int
  sink: int
  chunk: int
  cap: int
  ratio: float
  block: int = 64

  @property
  def previous(self) -> int:
    return self.window - self.sink - self.chunk


# ---- Layers ----


def linear(p: Params, name: str, x: np.ndarray) -> np.ndarray:
  return x @ p[name + ".weight"].T + p[name + ".bias"]


def silu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: np.ndarray, eps: float) -> np.ndarray:
  centred = x - x.mean(axis=-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
  return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def softmax(x: np.ndarray) -> np.ndarray:
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def split_heads(x: np.ndarray, heads: int) -> np.ndarray:
  return x.reshape(x.shape[0], heads, -1)


def attention(
  q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
  """Softmax attention [n h d]; mask [query key] is True where a query sees a key."""
  out = np.zeros(q.shape)
  for h in range(q.shape[1]):
    score = q[:, h] @ k[:, h].T / math.sqrt(q.shape[2])
    if mask is not None:
      score = np.where(mask, score, -np.inf)
    out[:, h] = softmax(score) @ v[:, h]
  return out


def time_sinusoids(t: float, width: int) -> np.ndarray:
  """Cosines, then sines."""
  half = width // 2
  angle = np.array([t * 10000.0 ** (-i / half) for i in range(half)])
  return np.concatenate([np.cos(angle), np.sin(angle)])


# ---- Rotary positions ----


@functools.cache
def token_angles(frame: float, row: int, column: int, pairs: int) -> np.ndarray:
  """Angles of a token's channel pairs: frame pairs first, then row pairs, then column pairs."""
  third = pairs // 3
  angles = []
  for position, count in ((frame, pairs - 2 * third), (row, third), (column, third)):
    for i in range(count):
      angles.append(position * 10000.0 ** (-i / count))
  return np.array(angles)


def rotate(x: np.ndarray, positions: list[int], grid: tuple[int, int]) -> np.ndarray:
  """Channels (2j, 2j + 1) of tokens [n h d] turned; positions: one per frame."""
  rows, columns = grid
  assert x.shape[0] == len(positions) * rows * columns
  pairs = x.shape[2] // 2
  angles = np.array(
    [token_angles(p, r, c, pairs) for p in positions for r in range(rows) for c in range(columns)]
  )
  angles = angles.reshape(-1, 1, pairs)
  even, odd = x[..., 0::2], x[..., 1::2]
  out = np.empty(x.shape)
  out[..., 0::2] = even * np.cos(angles) - odd * np.sin(angles)
  out[..., 1::2] = even * np.sin(angles) + odd * np.cos(angles)
  return out


# ---- Transformer ----


def grid_of(x: np.ndarray, sizes: Sizes) -> tuple[int, int]:
  """Token rows and columns of latents [f y x c]."""
  return x.shape[1] // sizes.patch[0], x.shape[2] // sizes.patch[1]


def patchify(x: np.ndarray, sizes: Sizes) -> np.ndarray:
  """Tokens from latents, each flattened in the order channel, row, column."""
  (rows, columns), (p, q) = grid_of(x, sizes), sizes.patch
  tokens = []
  for f in range(x.shape[0]):
    for r in range(rows):
      for c in range(columns):
        patch = x[f, r * p : (r + 1) * p, c * q : (c + 1) * q]
        tokens.append(np.moveaxis(patch, -1, 0).reshape(-1))
  return np.array(tokens)


def unpatchify(tokens: np.ndarray, frames: int, grid: tuple[int, int], sizes: Sizes) -> np.ndarray:
  """Latents from tokens, each flattened in the order row, column, channel."""
  (rows, columns), (p, q) = grid, sizes.patch
  x = np.zeros((frames, rows * p, columns * q, tokens.shape[1] // (p * q)))
  n = 0
  for f in range(frames):
    for r in range(rows):
      for c in range(columns):
        x[f, r * p : (r + 1) * p, c * q : (c + 1) * q] = tokens[n].reshape(p, q, -1)
        n += 1
  return x


def embed_text(p: Params, sizes: Sizes, context: np.ndarray) -> np.ndarray:
  padded = np.zeros((sizes.text_len, context.shape[1]))
  padded[: context.shape[0]] = context
  return linear(p, "text_embedding.2", gelu_tanh(linear(p, "text_embedding.0", padded)))


def cross_attention(
  p: Params, sizes: Sizes, name: str, x: np.ndarray, text: np.ndarray
) -> np.ndarray:
  q = rms_norm(linear(p, name + ".q", x), p[name + ".norm_q.weight"], sizes.eps)
  k = rms_norm(linear(p, name + ".k", text), p[name + ".norm_k.weight"], sizes.eps)
  v = linear(p, name + ".v", text)
  out = attention(*(split_heads(a, sizes.heads) for a in (q, k, v)))
  return linear(p, name + ".o", out.reshape(x.shape))


def self_attention(
  p: Params, sizes: Sizes, layer: int, x: np.ndarray, attend: Attend
) -> np.ndarray:
  name = f"blocks.{layer}.self_attn"
  q = rms_norm(linear(p, name + ".q", x), p[name + ".norm_q.weight"], sizes.eps)
  k = rms_norm(linear(p, name + ".k", x), p[name + ".norm_k.weight"], sizes.eps)
  v = linear(p, name + ".v", x)
  out = attend(layer, *(split_heads(a, sizes.heads) for a in (q, k, v)))
  return linear(p, name + ".o", out.reshape(x.shape))


def layer_count(p: Params) -> int:
  return sum(name.endswith("self_attn.q.weight") for name in p)


def forward(
  p: Params, sizes: Sizes, x: np.ndarray, t: np.ndarray, context: np.ndarray, attend: Attend
) -> np.ndarray:
  """Flow [f y x c] of latents whose frame i is at time t[i]."""
  frames, grid = x.shape[0], grid_of(x, sizes)
  per_frame = grid[0] * grid[1]
  kernel = p["patch_embedding.weight"]
  tokens = patchify(x, sizes) @ kernel.reshape(kernel.shape[0], -1).T + p["patch_embedding.bias"]
  width = tokens.shape[1]

  emb = np.array([time_sinusoids(s, p["time_embedding.0.weight"].shape[1]) for s in t])
  e = linear(p, "time_embedding.2", silu(linear(p, "time_embedding.0", emb)))
  e0 = linear(p, "time_projection.1", silu(e)).reshape(frames, 6, width)
  text = embed_text(p, sizes, context)

  def spread(per_frame_rows):
    """Rows per frame, repeated for its tokens."""
    return np.repeat(per_frame_rows, per_frame, axis=0)

  for i in range(layer_count(p)):
    name = f"blocks.{i}"
    m = p[name + ".modulation"] + e0
    shift1, scale1, gate1, shift2, scale2, gate2 = (spread(m[:, j]) for j in range(6))
    y = layer_norm(tokens, sizes.eps) * (1 + scale1) + shift1
    tokens = tokens + gate1 * self_attention(p, sizes, i, y, attend)
    y = layer_norm(tokens, sizes.eps) * p[name + ".norm3.weight"] + p[name + ".norm3.bias"]
    tokens = tokens + cross_attention(p, sizes, name + ".cross_attn", y, text)
    y = layer_norm(tokens, sizes.eps) * (1 + scale2) + shift2
    y = linear(p, name + ".ffn.2", gelu_tanh(linear(p, name + ".ffn.0", y)))
    tokens = tokens + gate2 * y

  m = p["head.modulation"] + e[:, None]
  y = layer_norm(tokens, sizes.eps) * (1 + spread(m[:, 1])) + spread(m[:, 0])
  return unpatchify(linear(p, "head.head", y), frames, grid, sizes)


# ---- Whole clips ----


def block_causal_mask(
  frames: int, chunk: int, tokens: int, window: int = -1, first_alone: bool = False
) -> np.ndarray:
  """Who sees whom, [query key]: tokens up to the end of the query's chunk, and in the window."""
  total = frames * tokens
  end = []
  for i in range(total):
    frame = i // tokens
    if first_alone:
      last = 1 if frame == 0 else 1 + ((frame - 1) // chunk + 1) * chunk
    else:
      last = (frame // chunk + 1) * chunk
    end.append(last * tokens)
  mask = np.zeros((total, total), bool)
  for i in range(total):
    for j in range(total):
      seen = j < end[i] and (window == -1 or j >= end[i] - window * tokens)
      mask[i, j] = seen or i == j
  return mask


def teacher_forcing_mask(frames: int, chunk: int, tokens: int) -> np.ndarray:
  """Who sees whom, [query key], over the clean tokens and then the noisy ones."""
  half = frames * tokens
  step = chunk * tokens
  mask = np.zeros((2 * half, 2 * half), bool)
  for i in range(2 * half):
    for j in range(2 * half):
      if i < half:
        seen = j < (i // step + 1) * step and j < half
      else:
        b = (i - half) // step
        own = half + b * step <= j < half + (b + 1) * step
        seen = own or j < b * step
      mask[i, j] = seen or i == j
  return mask


def predict_flow(
  p: Params,
  sizes: Sizes,
  x: np.ndarray,
  t: np.ndarray,
  context: np.ndarray,
  mask: np.ndarray | None = None,
  clean: np.ndarray | None = None,
  clean_t: np.ndarray | None = None,
) -> np.ndarray:
  """Flows [b f y x c] of whole clips, bidirectional without a mask.

  t: [b] or [b f]. clean: clean clips put before the noisy ones, with times clean_t [b f] or 0;
  rotary positions start again at the noisy ones, whose flow alone is returned.
  """
  frames = x.shape[1]
  flows = []
  for n in range(x.shape[0]):
    latents = x[n]
    times = np.broadcast_to(np.asarray(t[n], np.float64), (frames,))
    positions = list(range(frames))
    if clean is not None:
      latents = np.concatenate([clean[n], latents])
      before = np.zeros(frames) if clean_t is None else clean_t[n]
      times = np.concatenate([before, times])
      positions = positions + positions
    grid = grid_of(latents, sizes)

    def attend(layer, q, k, v, positions=positions, grid=grid):
      return attention(rotate(q, positions, grid), rotate(k, positions, grid), v, mask)

    flow = forward(p, sizes, latents.astype(np.float64), times, context[n], attend)
    flows.append(flow[-frames:])
  return np.array(flows)


# ---- Block-sparse attention ----


def cut(start: int, stop: int, block: int) -> list[range]:
  """Blocks of tokens; the last may be shorter."""
  return [range(i, min(i + block, stop)) for i in range(start, stop, block)]


def kept_blocks(ratio: float, blocks: int) -> int:
  return max(1, int(ratio * blocks))


def sparse_attention(
  q: np.ndarray,
  past: tuple[np.ndarray, np.ndarray],
  current: tuple[np.ndarray, np.ndarray],
  ratio: float,
  block: int,
) -> tuple[np.ndarray, float]:
  """Attention [n h d] of each query block to its best key blocks, and the narrowest choice.

  past, current: keys and values; their blocks are cut apart from each other. The second result is
  the smallest score difference between a kept block and a dropped one, infinity if none is dropped.
  """
  k = np.concatenate([past[0], current[0]])
  v = np.concatenate([past[1], current[1]])
  border = past[0].shape[0]
  key_blocks = cut(0, border, block) + cut(border, k.shape[0], block)
  kept = kept_blocks(ratio, len(key_blocks))
  out = np.zeros(q.shape)
  gap = math.inf
  for rows in cut(0, q.shape[0], block):
    for h in range(q.shape[1]):
      q_mean = q[rows, h].mean(axis=0)
      scores = np.array([q_mean @ k[columns, h].mean(axis=0) for columns in key_blocks])
      order = np.argsort(-scores)
      if kept < len(key_blocks):
        gap = min(gap, scores[order[kept - 1]] - scores[order[kept]])
      tokens = [j for n in sorted(order[:kept]) for j in key_blocks[n]]
      weight = softmax(q[rows, h] @ k[tokens, h].T / math.sqrt(q.shape[2]))
      out[rows, h] = weight @ v[tokens, h]
  return out, float(gap)


# ---- Streaming ----


class Stream:
  """One stream that never forgets: unrotated keys and values of every committed frame, for ever.

  k, v: per layer, a list of frames [n h d]. begun: committed frames and length of each chunk begun.
  memory: per layer, what the current chunk remembers (see `remember`).
  gap: narrowest choice of key blocks so far (see `sparse_attention`); a choice narrower than
  `min_gap` is an error, because rounding would then decide a comparison with it.
  """

  def __init__(
    self,
    p: Params,
    sizes: Sizes,
    window: Window,
    grid: tuple[int, int],
    context: np.ndarray,
    min_gap: float = 1e-5,
  ):
    self.p, self.sizes, self.window, self.grid, self.context = p, sizes, window, grid, context
    self.k: list[list[np.ndarray]] = [[] for _ in range(layer_count(p))]
    self.v: list[list[np.ndarray]] = [[] for _ in range(layer_count(p))]
    self.latents: list[np.ndarray] = []
    self.begun: list[tuple[int, int]] = []
    self.memory: list[tuple[np.ndarray, np.ndarray] | None] = []
    self.min_gap, self.gap = min_gap, math.inf
    self.has_memory = "blocks.0.self_attn.linear_proj.weight" in p

  @property
  def committed(self) -> int:
    return len(self.latents)

  def begin(self, frames: int):
    """Opens a chunk; what leaves the window leaves now."""
    self.begun.append((self.committed, frames))
    self.memory = [self.remember(i) for i in range(len(self.k))]

  def start(self, committed: int, frames: int) -> int:
    """Rotary position of a chunk's first frame."""
    return min(committed, self.window.cap - frames)

  def sink(self) -> list[int]:
    """Committed frames of the sink, by number."""
    return [n for n in range(self.committed) if n < self.window.sink]

  def previous(self) -> list[int]:
    """Frames before the current chunk that are seen and are not the sink."""
    rest = [n for n in range(self.committed) if n >= self.window.sink]
    return rest[max(0, len(rest) - self.window.previous) :]

  def left(self) -> list[tuple[int, int]]:
    """Frames that have left, each with the rotary position at which it left."""
    gone: list[tuple[int, int]] = []
    for committed, frames in self.begun:
      rest = [n for n in range(committed) if n >= self.window.sink]
      excess = rest[: max(0, len(rest) - self.window.previous)]
      leaving = [n for n in excess if n not in [m for m, _ in gone]]
      end = self.start(committed, frames) - self.window.previous
      gone += [(n, end - len(leaving) + i) for i, n in enumerate(leaving)]
    return gone

  def remember(self, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Means over all tokens that have left: key-value products [h d d] and mapped keys [h d]."""
    left = self.left()
    if not left:
      return None
    products, keys = [], []
    for n, position in left:
      k, v = np.maximum(self.k[layer][n], 0), self.v[layer][n]
      rotated = rotate(k, [position], self.grid)
      for token in range(k.shape[0]):
        products.append(rotated[token, :, :, None] * v[token, :, None, :])
        keys.append(k[token])
    return np.mean(products, axis=0), np.mean(keys, axis=0)

  def flow(self, x: np.ndarray, t: float | np.ndarray) -> np.ndarray:
    """Flow of the chunk's latents [f y x c] at time t, one or one per frame; changes nothing."""
    return self._forward(x, t)[0]

  def commit(self, x0: np.ndarray) -> np.ndarray:
    """Appends the keys and values of clean latents; their flow at time 0."""
    flow, made = self._forward(x0, 0.0)
    per_frame = self.grid[0] * self.grid[1]
    for layer, (k, v) in enumerate(made):
      for f in range(x0.shape[0]):
        self.k[layer].append(k[f * per_frame : (f + 1) * per_frame])
        self.v[layer].append(v[f * per_frame : (f + 1) * per_frame])
    self.latents += list(x0)
    return flow

  def _forward(self, x, t):
    committed, frames = self.begun[-1]
    assert committed == self.committed and frames == x.shape[0]
    w = self.window
    start = self.start(committed, frames)
    sink, previous = self.sink(), self.previous()
    past_frames = sink + previous
    past_positions = sink + list(range(start - len(previous), start))
    positions = list(range(start, start + frames))
    made = []

    def attend(layer, q, k, v):
      made.append((k, v))
      past_k = [
        rotate(self.k[layer][n], [at], self.grid)
        for n, at in zip(past_frames, past_positions, strict=True)
      ]
      past_v = [self.v[layer][n] for n in past_frames]
      nothing = [k[:0]]
      out, gap = sparse_attention(
        rotate(q, positions, self.grid),
        (np.concatenate(past_k + nothing), np.concatenate(past_v + nothing)),
        (rotate(k, positions, self.grid), v),
        w.ratio,
        w.block,
      )
      assert gap > self.min_gap, f"block scores {gap:.1e} apart: choose another seed"
      self.gap = min(self.gap, gap)
      if self.has_memory and self.memory[layer] is not None:
        out = out + self._recall(layer, q, positions)
      return out

    times = np.broadcast_to(np.asarray(t, np.float64), (frames,))
    flow = forward(self.p, self.sizes, x.astype(np.float64), times, self.context, attend)
    return flow, made

  def _recall(self, layer: int, q: np.ndarray, positions: list[int]) -> np.ndarray:
    """What the linear memory adds to the output of attention, [n h d]."""
    kv, k_mean = self.memory[layer]
    mapped = np.maximum(q, 0)
    rotated = rotate(mapped, positions, self.grid)
    out = np.zeros(q.shape)
    for h in range(q.shape[1]):
      for n in range(q.shape[0]):
        out[n, h] = rotated[n, h] @ kv[h] / (mapped[n, h] @ k_mean[h] + 1e-6)
    return linear(self.p, f"blocks.{layer}.self_attn.linear_proj", out)
