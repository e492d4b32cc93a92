"""Bright blobs and a grey pillar in videos of the world of shapes; blobs are followed in time.

The frame is a torus; the pillar hides what is behind it.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8
from scipy import ndimage, sparse

from hfjax.data.shapes import COLOURS, SIZE

_COLOURED, _BRIGHT = (
  80,
  150,
)  # grey levels: spread of channels, or their mean, from which a thing is
_WHITE = 60  # spread of channels below which what is bright is white
_GREY, _GREY_SPREAD = (117, 165), 45  # mean levels of a pillar, and spread of its channels
_BAR = 8, 24  # columns of a pillar
_LEAST_AREA = 25  # pixels of a thing
_HUE_ERROR, _COLOUR_ERROR = math.radians(30), 110.0  # of a colour, in hue and in grey levels
_GAP, _HIDDEN_GAP = 8, 16  # frames for which a thing may be out of sight, and beside the pillar
_NEAR, _FAR, _PER_FRAME = 10.0, 36.0, 4.0  # pixels by which a thing may miss where it is expected
_BESIDE = 16.0  # more such pixels beside the pillar
_GROWTH = 3.0  # by which its area may change
_NEW = 10.0  # pixels that being seen once counts as
_OTHER_COLOUR = 8.0  # pixels that a change of colour counts as
_HUES = 360  # steps of a turn


class Pictures(NamedTuple):
  """A video's planes: colours, mean of the channels, and greatest less least channel."""

  rgb: UInt8[np.ndarray, "3 t y x"]
  grey: Float32[np.ndarray, "t y x"]
  spread: UInt8[np.ndarray, "t y x"]


class Blobs(NamedTuple):
  """Connected bright pixels of one frame and one colour each, in the order of frames.

  label: 1 more than the number of a pixel's blob, or 0. hidden: whether the pillar may cover part.
  """

  label: Int[np.ndarray, "t y x"]
  frame: Int[np.ndarray, "n"]
  x: Float[np.ndarray, "n"]
  y: Float[np.ndarray, "n"]
  area: Float[np.ndarray, "n"]
  colour: list[str | None]
  hidden: Bool[np.ndarray, "n"]


def planes(frames: UInt8[np.ndarray, "t y x 3"]) -> Pictures:
  """Planes of frames."""
  rgb = np.ascontiguousarray(np.moveaxis(frames, -1, 0))
  r, g, b = rgb
  total = np.add(r, g, dtype=np.uint16) + b
  spread = np.maximum(np.maximum(r, g), b) - np.minimum(np.minimum(r, g), b)
  return Pictures(rgb, total * np.float32(1 / 3), spread)


def lasts(there: Bool[np.ndarray, "t"]) -> bool:
  """Whether something holds in nearly all frames, from the beginning to the end."""
  return all(part.mean() >= 0.7 for part in np.array_split(there, 4))


def widen(mask: Bool[np.ndarray, "*n"], by: int, axes: Sequence[int]) -> Bool[np.ndarray, "*n"]:
  """A mask on the torus, widened by pixels along axes."""
  for axis in axes:
    for _ in range(by):
      mask = mask | np.roll(mask, 1, axis) | np.roll(mask, -1, axis)
  return mask


def torus(x: Any) -> Any:
  """Differences of places, the short way: in [-64, 64)."""
  return (x + SIZE / 2) % SIZE - SIZE / 2


def find_pillar(pictures: Pictures) -> tuple[Bool[np.ndarray, "x"], bool]:
  """Columns of a grey bar, and whether it, or its lack, lasts."""
  grey, spread = pictures.grey, pictures.spread
  is_grey = (grey > _GREY[0]) & (grey < _GREY[1]) & (spread < _GREY_SPREAD)
  share = is_grey.sum(1, dtype=np.uint8) / SIZE  # [t x]
  # In a fifth of the frames is enough to be found.
  found = np.quantile(share, 0.8, axis=0) > 0.85
  edges = np.flatnonzero(np.diff(found, prepend=False, append=False)).reshape(-1, 2)
  good = [(a, b) for a, b in edges.tolist() if _BAR[0] <= b - a <= _BAR[1]]
  bar = np.zeros(SIZE, bool)
  for a, b in good:
    bar[a:b] = True
  if not len(good):
    return bar, True
  return bar, len(good) == 1 and lasts(share[:, bar].mean(1) > 0.75)


def find_bright(pictures: Pictures, covered: Bool[np.ndarray, "x"]) -> Bool[np.ndarray, "t y x"]:
  """Pixels of things; none in columns that are covered."""
  return ((pictures.spread > _COLOURED) | (pictures.grey > _BRIGHT)) & ~covered


def find_blobs(
  pictures: Pictures, bright: Bool[np.ndarray, "t y x"], covered: Bool[np.ndarray, "x"]
) -> Blobs:
  """Blobs of bright pixels, of all frames."""
  label = np.zeros(bright.shape, np.int32)
  # Without the pillar's columns a thing behind it is in one piece.
  label[..., ~covered] = _connect(bright[..., ~covered])
  flat = np.flatnonzero(label)
  rgb = pictures.rgb.reshape(3, -1)[:, flat].astype(np.float32)
  spread = pictures.spread.reshape(-1)[flat]
  ids = _split(label.reshape(-1)[flat] - 1, _nearest_colour(rgb, spread))
  area = np.bincount(ids)
  keep = area >= _LEAST_AREA
  numbers = np.where(keep, np.cumsum(keep), 0)
  label.reshape(-1)[flat] = numbers[ids]
  kept, count = keep[ids], int(keep.sum())
  flat, ids, rgb, spread = flat[kept], numbers[ids[kept]] - 1, rgb[:, kept], spread[kept]
  t, y, x = np.unravel_index(flat, label.shape)
  total = lambda weights: np.bincount(ids, weights, minlength=count)
  frame = np.zeros(count, int)
  frame[ids] = t
  turn = 2 * np.pi / SIZE * (np.arange(SIZE) + 0.5)
  middle = lambda i: np.arctan2(total(np.sin(turn)[i]), total(np.cos(turn)[i])) * (SIZE / 2 / np.pi)
  # Edges are dull; the middle of a blob counts more.
  weight = spread + np.maximum(rgb.min(0) - 60, 0)
  mean = np.stack([total(weight * c) for c in rgb]) / total(weight)
  return Blobs(
    label, frame, middle(x) % SIZE, middle(y) % SIZE, area[keep].astype(float), _name_colours(mean),
    total(widen(covered, 2, (0,))[x]) > 0,
  )  # fmt: skip


def follow(blobs: Blobs, frames: int) -> list[list[int]]:
  """Numbers of the blobs of a thing, frame by frame, for each thing."""
  ways: list[list[int]] = []
  ends = np.searchsorted(blobs.frame, np.arange(frames + 1)).tolist()
  for t in range(frames):
    new = range(ends[t], ends[t + 1])
    costs = []
    for w, way in enumerate(ways):
      if t - int(blobs.frame[way[-1]]) > _HIDDEN_GAP:
        continue
      speed = _velocity(blobs, way[-6:])
      for i in new:
        misses = [_miss(blobs, last, i, speed) for last in way[-2:]]  # the last one may be bad
        if min(misses) < _FAR:
          costs.append((min(misses) + _NEW / len(way), w, i))
    used: set[int] = set()
    for _, w, i in sorted(costs):
      if i not in used and blobs.frame[ways[w][-1]] < t:
        used.add(i)
        ways[w].append(i)
    ways += [[i] for i in new if i not in used]
  return ways


def is_whole(blobs: Blobs, way: Sequence[int], frames: int) -> bool:
  """Whether a thing is there from beginning to end, or hidden for a moment."""
  times = [-1, *blobs.frame[way].tolist(), frames]
  beside = [bool(blobs.hidden[i]) for i in (way[0], *way, way[-1])]
  missing = 0
  for i, gap in enumerate(np.diff(times) - 1):
    is_hidden = beside[i] or beside[i + 1]
    if gap > (_HIDDEN_GAP if is_hidden else _GAP):
      return False
    missing += 0 if is_hidden else int(gap)
  return missing <= 0.2 * frames


def _connect(mask: Bool[np.ndarray, "t y x"]) -> Int[np.ndarray, "t y x"]:
  """Labels of pixels that are connected on the torus, from 1 on, in the order of frames."""
  near = np.zeros((3, 3, 3), bool)
  near[1] = True
  labels, count = ndimage.label(widen(mask, 1, (1, 2)), near)  # type: ignore[attr-defined]
  edges = (labels[:, 0], labels[:, -1]), (labels[:, :, 0], labels[:, :, -1])
  a, b = np.concatenate([np.stack([p.ravel(), q.ravel()]) for p, q in edges], 1)
  both = (a > 0) & (b > 0)
  graph = sparse.coo_array((np.ones(both.sum()), (a[both], b[both])), (count + 1, count + 1))
  groups = sparse.csgraph.connected_components(graph, directed=False)[1]
  return np.where(mask, groups[labels], 0)  # label 0 is group 0


def _split(ids: Int[np.ndarray, "p"], kinds: Int[np.ndarray, "p"]) -> Int[np.ndarray, "p"]:
  """Numbers of pixels' blobs, of which those of several colours, things that touch, are parted."""
  count, colours = int(ids.max(initial=-1)) + 1, len(COLOURS)
  votes = np.bincount(ids * colours + kinds, minlength=count * colours).reshape(count, colours)
  strong = (votes >= _LEAST_AREA) & (votes >= 0.25 * votes.sum(1, keepdims=True))
  most = votes.argmax(1)
  strong[np.arange(count), most] = True
  new = np.cumsum(strong).reshape(strong.shape) - 1
  return new[ids, np.where(strong[ids, kinds], kinds, most[ids])]


def _hues(rgb: Float[np.ndarray, "3 n"]) -> Float[np.ndarray, "n"]:
  """Hues in radians; of grey any."""
  r, g, b = rgb
  return np.arctan2(math.sqrt(0.75) * (g - b), r - (g + b) / 2)


@functools.cache
def _palette() -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
  """Colours `[3 n]`; of each step of hue the nearest and how far that is; the number of white."""
  rgb = np.array(list(COLOURS.values()), np.float32).T
  hues = np.where(np.ptp(rgb, axis=0) < _WHITE, np.nan, _hues(rgb))
  steps = 2 * np.pi / _HUES * np.arange(_HUES + 1) - np.pi
  errors = np.abs((steps[:, None] - hues + np.pi) % (2 * np.pi) - np.pi)
  return rgb, np.nanargmin(errors, 1), np.nanmin(errors, 1), int(np.flatnonzero(np.isnan(hues))[0])


def _step(rgb: Float[np.ndarray, "3 n"]) -> Int[np.ndarray, "n"]:
  return np.rint((_hues(rgb) + np.pi) * (_HUES / 2 / np.pi)).astype(np.int32)


def _nearest_colour(rgb: Float[np.ndarray, "3 n"], spread: np.ndarray) -> Int[np.ndarray, "n"]:
  """Numbers of the colours of the nearest hues, or of white."""
  _, nearest, _, white = _palette()
  return np.where(spread < _WHITE, white, nearest[_step(rgb)])


def _name_colours(rgb: Float[np.ndarray, "3 n"]) -> list[str | None]:
  """Colours; None if far from all."""
  palette, _, errors, white = _palette()
  names = list(COLOURS)
  best = _nearest_colour(rgb, np.ptp(rgb, axis=0))
  far = np.sqrt(((rgb - palette[:, best]) ** 2).sum(0)) > _COLOUR_ERROR
  bad = far | ((errors[_step(rgb)] > _HUE_ERROR) & (best != white))
  return [None if b else names[i] for i, b in zip(best, bad)]


def _miss(blobs: Blobs, last: int, i: int, speed: tuple[float, float]) -> float:
  """Pixels by which a blob is not where a thing is expected; infinite if it cannot be that."""
  gap = int(blobs.frame[i] - blobs.frame[last])
  x = torus(blobs.x[i] - blobs.x[last] - gap * speed[0])
  y = torus(blobs.y[i] - blobs.y[last] - gap * speed[1])
  far = math.hypot(x, y)
  # What comes out from behind the pillar is seen beyond it, and may be a small part.
  is_beside = bool(blobs.hidden[last] and blobs.hidden[i])
  ratio = blobs.area[i] / blobs.area[last]
  if far > _NEAR + _PER_FRAME * gap + _BESIDE * is_beside:
    return math.inf
  if not is_beside and not 1 / _GROWTH < ratio < _GROWTH:
    return math.inf
  return far + _OTHER_COLOUR * (blobs.colour[i] != blobs.colour[last])


def _velocity(blobs: Blobs, way: Sequence[int]) -> tuple[float, float]:
  """Pixels a frame in x and y."""
  if len(way) < 3:
    return 0.0, 0.0
  time = np.diff(blobs.frame[way])
  x, y = (float(np.median(torus(np.diff(place[way])) / time)) for place in (blobs.x, blobs.y))
  return x, y
