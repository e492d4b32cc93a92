"""What a video of the world of shapes shows, read from its pixels, and whether that was asked for.

Blobs are followed through the frames, and measured where no pillar covers them. What does not hold
from the beginning to the end of a video is not recognised: it is None, and agrees with nothing.

Series of a thing have one entry a frame. Places and radii are in pixels, angles in radians.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Complex, Float, Int, UInt8
from scipy import optimize

from hfjax.data import shapes_blobs, shapes_words
from hfjax.data.rejects import DataError
from hfjax.data.shapes import FPS, SHAPES, SIZE, SIZES, Scene, Thing, distance
from hfjax.data.shapes_blobs import Blobs, Pictures, lasts, torus, widen

LEAST_FRAMES = 33

_TOLD = ("colour", "shape", "size", "motion")
_SEEN = 0.15  # of all frames, from which a blob is a thing
_CLEAR, _NEARLY = 0.6, 0.85  # of frames and of the greatest area: what is measured beside a pillar
_SUDDEN, _LEAST = 0.25, 6  # logarithm of area, by which a frame is bad; frames to be measured
_ANGLES, _RINGS, _REACH = 60, 18, 1.8  # polar samples, out to so many radii of the disc of its area
_BLURS, _DETAIL, _STEEP = (0.03, 0.12, 0.22, 0.35), 16.0, 1.8
_SHAPE_ERROR = 0.25  # of the squares of a template
_TURNS = {"square": 4, "triangle": 3, "star": 5, "cross": 4}  # equal angles of a turn
# Areas of shapes of radius 1.
_AREAS = {
  "circle": math.pi,
  "square": 1.72**2,
  "triangle": 0.75 * math.sqrt(3) * 1.12**2,
  "star": 5 * 1.15 * 0.5 * math.sin(math.pi / 5),
  "cross": 4 * 0.72 - 0.72**2,
  "ring": math.pi * (1 - 0.55**2),
}
_SAME_RADIUS, _PULSE, _PULSE_MEAN = (
  0.1,
  (0.12, 0.6),
  0.775,
)  # in the median, in the mean, in the greatest
_SLOW = np.linspace(1.7, 3.4, 18)  # seconds of a circle or a pulse
_FAST = np.linspace(0.8, 1.7, 19)  # seconds of a bounce
_SPEED, _ACROSS = (12.0, 80.0), 8.0  # pixels a second, of what travels, and aside
_SPIN = 25.0, 40.0, 220.0  # degrees a second: above none, least and greatest
_STILL = 4.0  # pixels between the ends of all places
_WAVES = ((1, 0), (0, 1), (1, 1), (1, -1))  # of backgrounds, in x and y
_PERIOD = 32  # pixels of a wave
_PATTERN, _SLOPE = 0.04, 0.13  # levels of waves and of gradients, from which they are such
_FREE = 0.05  # of the frame, to tell what is behind
_PAN = 3.5, 16.0  # pixels a second


class _Series(NamedTuple):
  """A thing in every frame; NaN where it was not measured.

  radius: of the disc of its area. errors, angles: of shapes, in squares of templates.
  """

  x: Float[np.ndarray, "t"]
  y: Float[np.ndarray, "t"]
  radius: Float[np.ndarray, "t"]
  errors: Float[np.ndarray, "t shape"]
  angles: Float[np.ndarray, "t shape"]


def judge(caption: str, frames: UInt8[np.ndarray, "t 128 128 3"]) -> dict[str, bool]:
  """Which attributes of a video are as a caption tells; it is right if all are. See `compare`.

  Raises DataError as `look` does, and on a caption that is none of this world.
  """
  return compare(shapes_words.read(caption), look(frames))


def compare(wanted: Scene, seen: Scene) -> dict[str, bool]:
  """Attributes, and whether they are as wanted; what is None in `wanted` may be anything.

  "things" is their number. Things are paired such that most agrees; one that is not there agrees in
  nothing.
  """
  pairs = pair(wanted, seen)
  return {
    "things": len(wanted.things) == len(seen.things),
    **{name: all(_is_right(a, b, name) for a, b in pairs) for name in _TOLD},
    "background": _is_right(wanted, seen, "background"),
    "pillar": wanted.pillar == seen.pillar,
  }


def pair(wanted: Scene, seen: Scene) -> list[tuple[Thing, Thing]]:
  """Each wanted thing and that which is seen for it, such that most agrees; see `compare`.

  Where nothing is left, it is a thing of which nothing is recognised.
  """
  agree = np.array(
    [[sum(_is_right(a, b, n) for n in _TOLD) for b in seen.things] for a in wanted.things]
  )
  agree = agree.reshape(len(wanted.things), len(seen.things))
  rows, columns = optimize.linear_sum_assignment(agree, maximize=True)
  partners = dict(zip(rows.tolist(), columns.tolist()))
  nothing = Thing(None, None, None, None)
  return [
    (thing, seen.things[partners[i]] if i in partners else nothing)
    for i, thing in enumerate(wanted.things)
  ]


def _is_right(wanted: Scene | Thing, seen: Scene | Thing, name: str) -> bool:
  return getattr(wanted, name) in (None, getattr(seen, name))


def look(frames: UInt8[np.ndarray, "t 128 128 3"]) -> Scene:
  """What is seen, of any number of things; what is not recognised, or does not last, is None.

  Of a pillar that comes or goes there is none, and the background is None. Raises DataError on
  frames of another size or type, and on less than 33.
  """
  frames = np.asarray(frames)
  if frames.shape[1:] != (SIZE, SIZE, 3) or frames.dtype != np.uint8:
    raise DataError(
      f"A video is {frames.dtype} {frames.shape}; give RGB frames of {SIZE}x{SIZE} pixels, uint8."
    )
  if len(frames) < LEAST_FRAMES:
    raise DataError(f"A video has {len(frames)} frames; give {LEAST_FRAMES} or more.")
  pictures = shapes_blobs.planes(frames)
  pillar, is_steady = shapes_blobs.find_pillar(pictures)
  covered = widen(pillar, 1, (0,))
  bright = shapes_blobs.find_bright(pictures, covered)
  blobs = shapes_blobs.find_blobs(pictures, bright, covered)
  ways = shapes_blobs.follow(blobs, len(frames))
  things = [_describe(pictures, blobs, w) for w in ways if len(w) >= _SEEN * len(frames)]
  background = _find_background(pictures.grey[::2], bright[::2] | covered) if is_steady else None
  return Scene(tuple(things), background, bool(pillar.any()) and is_steady)


def _describe(pictures: Pictures, blobs: Blobs, way: Sequence[int]) -> Thing:
  """A thing as far as it is recognised."""
  if not shapes_blobs.is_whole(blobs, way, len(pictures.grey)):
    return Thing(None, None, None, None)
  names = [blobs.colour[i] for i in way]
  colour = max(set(names), key=names.count)
  if not lasts(np.array([name == colour for name in names])):
    colour = None
  series = _measure(pictures, blobs, way)
  if series is None:
    return Thing(colour, None, None, None)
  shape = _find_shape(series)
  radius, pulses = _find_radius(series.radius)
  size = None
  if shape and radius:
    radius *= math.sqrt(math.pi / _AREAS[shape])
    size = min(SIZES, key=lambda name: abs(math.log(radius / SIZES[name])))
  path = _find_path(series.x, series.y)
  spins = _find_spin(series, shape)
  changes: dict[Any, str | None] = {
    (False, False): path,
    (True, False): "grow",
    (False, True): "spin",
  }
  motion = changes.get((pulses, spins)) if path == "still" or not (pulses or spins) else None
  return Thing(colour, shape, size, motion)


def _measure(pictures: Pictures, blobs: Blobs, way: Sequence[int]) -> _Series | None:
  """Series of a thing, from frames in which it is free of the pillar; None if it is too big."""
  picked, frames = np.array(way), len(pictures.grey)
  clear = ~blobs.hidden[picked]
  if clear.mean() < _CLEAR:
    clear |= blobs.area[picked] >= _NEARLY * blobs.area[picked].max()
  areas = blobs.area[picked]
  clear &= np.abs(np.log(areas / _median(areas))) < _SUDDEN
  picked = picked[clear]
  if len(picked) < _LEAST:
    return None
  t, x, y = blobs.frame[picked], blobs.x[picked], blobs.y[picked]
  reach = math.ceil(1.6 * math.sqrt(blobs.area[picked].max() / math.pi)) + 5
  if reach >= SIZE // 2:
    return None
  off = np.arange(-reach, reach + 1)
  left, top = np.floor(x).astype(int), np.floor(y).astype(int)
  where = (
    t[:, None, None],
    (top[:, None, None] + off[:, None]) % SIZE,
    (left[:, None, None] + off) % SIZE,
  )
  own = blobs.label[where] == picked[:, None, None] + 1
  other = (blobs.label[where] > 0) & ~own
  cover = _cover(np.stack([plane[where] for plane in pictures.rgb]), own, other)
  area = cover.sum((1, 2)) + 1e-6
  mx, my = (cover.sum(axis) @ off / area for axis in (1, 2))
  radius = np.sqrt(area / math.pi)
  errors, angles = _match(cover, mx + reach, my + reach, radius)

  def fill(values):
    result = np.full((frames, *values.shape[1:]), np.nan)
    result[t] = values
    return result

  places = [
    _unwrap(rough[way], blobs.frame[way], fine + 0.5, t, frames)
    for rough, fine in ((blobs.x, left + mx), (blobs.y, top + my))
  ]
  return _Series(places[0], places[1], fill(radius), fill(errors), fill(angles))


def _cover(
  rgb: UInt8[np.ndarray, "3 n p p"],
  own: Bool[np.ndarray, "n p p"],
  other: Bool[np.ndarray, "n p p"],
) -> Float[np.ndarray, "n p p"]:
  """How much of each pixel a thing covers, in patches around it."""
  near = widen(own, 3, (1, 2)) & ~other
  core = own & ~widen(~own, 1, (1, 2))
  if core.sum() < 4 * len(own):
    core = own
  around = [np.quantile(plane[~near & ~other][::7], (0.05, 0.95)).mean() for plane in rgb]
  axis = np.array([plane[core].mean() for plane in rgb]) - around
  level = np.tensordot(axis.astype(np.float32), rgb.astype(np.float32), 1)
  low = axis @ around
  areas = own.sum((1, 2))
  big = areas >= np.median(areas)  # small ones are dull when blurred
  high = np.median(level[big][core[big]])
  return np.where(near, _sharpen((level - low) / (high - low)), 0)


def _sharpen(cover: np.ndarray) -> np.ndarray:
  """Without what is bright behind a thing."""
  return np.clip(0.5 + _STEEP * (cover - 0.5), 0, 1)


def _unwrap(
  rough: Float[np.ndarray, "n"], rough_t: Int[np.ndarray, "n"],
  fine: Float[np.ndarray, "m"], t: Int[np.ndarray, "m"], frames: int,
) -> Float[np.ndarray, "t"]:  # fmt: skip
  """Coordinates without jumps; rough ones before and after those that are measured."""
  way = rough[0] + np.concatenate([[0], np.cumsum(torus(np.diff(rough)))])
  way = np.interp(np.arange(frames), rough_t, way)
  result = np.interp(np.arange(frames), t, way[t] + torus(fine - way[t]))
  for edge, rest in ((t[0], slice(None, t[0])), (t[-1], slice(t[-1] + 1, None))):
    result[rest] = way[rest] - way[edge] + result[edge]
  return _median(result)


def _median(series: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
  """Medians of five neighbours."""
  return np.median(np.lib.stride_tricks.sliding_window_view(np.pad(series, 2, "edge"), 5), -1)


def _polar() -> tuple[Float[np.ndarray, "a"], Float[np.ndarray, "r"]]:
  """Angles, and distances in radii of the disc of a thing's area."""
  return 2 * np.pi / _ANGLES * np.arange(_ANGLES), _REACH / _RINGS * (np.arange(_RINGS) + 0.5)


@functools.cache
def _templates() -> tuple[Complex[np.ndarray, "k a r"], Float[np.ndarray, "k"]]:
  """Spectra along angles of all shapes, each ever more blurred, and their sums of squares."""
  theta, rho = _polar()
  x, y = np.meshgrid(np.arange(-40, 41.0), np.arange(-40, 41.0))
  covers = []
  for shape in SHAPES:
    radius = _DETAIL * math.sqrt(math.pi / _AREAS[shape])
    sharp = np.clip(0.5 - distance(shape, x, y, radius), 0, 1)
    for blur in _BLURS:
      cover = _sharpen(_blur(sharp, blur * _DETAIL))
      reach = math.sqrt(cover.sum() / math.pi) * rho
      points = (40 + reach * f(theta)[:, None] for f in (np.sin, np.cos))
      covers.append(_interpolate(cover[None], *(p[None] for p in points))[0])
  return np.fft.rfft(covers, axis=1), (np.square(covers) * rho).sum((1, 2))


def _blur(image: Float[np.ndarray, "y x"], sigma: float) -> Float[np.ndarray, "y x"]:
  """Gaussian blur on a torus."""
  frequencies = [np.fft.fftfreq(side) for side in image.shape]
  loss = [np.exp(-2 * (np.pi * sigma * f) ** 2) for f in frequencies]
  return np.fft.ifft2(np.fft.fft2(image) * loss[0][:, None] * loss[1]).real


def _interpolate(
  images: Float[np.ndarray, "n p p"], y: Float[np.ndarray, "n a r"], x: Float[np.ndarray, "n a r"]
) -> Float[np.ndarray, "n a r"]:
  """Linearly, at fractional numbers of pixels."""
  side = images.shape[-1]
  flat = np.asarray(images, np.float32).reshape(-1)
  row, column = (np.clip(p, 0, side - 2).astype(np.int32) for p in (y, x))
  fy, fx = ((np.clip(p, 0, side - 1) - i).astype(np.float32) for p, i in ((y, row), (x, column)))
  at = (np.arange(len(images), dtype=np.int32)[:, None, None] * side + row) * side + column
  upper, lower = (flat[i] + fx * (flat[i + 1] - flat[i]) for i in (at, at + side))
  return upper + fy * (lower - upper)


def _match(
  cover: Float[np.ndarray, "n p p"], x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"],
  radius: Float[np.ndarray, "n"],
) -> tuple[Float[np.ndarray, "n shape"], Float[np.ndarray, "n shape"]]:  # fmt: skip
  """Errors of the templates, each at its best angle, in their squares; and the angles."""
  theta, rho = _polar()
  reach = (radius[:, None, None] * rho).astype(np.float32)
  points = (
    centre[:, None, None].astype(np.float32) + reach * wave[:, None].astype(np.float32)
    for centre, wave in ((y, np.sin(theta)), (x, np.cos(theta)))
  )
  seen = _interpolate(cover, *points)
  spectra, power = _templates()
  product = np.einsum("nar,kar,r->nka", np.fft.rfft(seen, axis=1), spectra.conj(), rho)
  match = np.fft.irfft(product, _ANGLES, axis=-1)
  best = match.argmax(-1)
  take = lambda step: np.take_along_axis(match, (best + step)[..., None] % _ANGLES, -1)[..., 0]
  before, peak, after = take(-1), take(0), take(1)
  bend = np.maximum(2 * peak - before - after, 1e-9)
  angle = (best + np.clip(0.5 * (after - before) / bend, -0.5, 0.5)) * (2 * np.pi / _ANGLES)
  own = (seen**2 * rho).sum((1, 2))[:, None]
  errors = (own + power - 2 * peak) / power
  errors, angle = (a.reshape(len(cover), len(SHAPES), -1) for a in (errors, angle))
  blur = errors.argmin(-1)[..., None]
  return np.take_along_axis(errors, blur, -1)[..., 0], np.take_along_axis(angle, blur, -1)[..., 0]


def _find_shape(series: _Series) -> str | None:
  """The shape that fits best, if it does so throughout."""
  known = ~np.isnan(series.radius)
  weights = series.radius[known, None] ** 6  # of a thing that pulses, what is big is seen best
  errors = series.errors[known] * weights
  best = int(errors.sum(0).argmin())
  if errors[:, best].sum() > _SHAPE_ERROR * weights.sum():
    return None
  parts = [part for part in np.array_split(errors, 3) if len(part)]
  return SHAPES[best] if all(part.sum(0).argmin() == best for part in parts) else None


def _find_radius(radius: Float[np.ndarray, "t"]) -> tuple[float | None, bool | None]:
  """The greatest radius, and whether it pulses; None if it changes otherwise."""
  t = np.flatnonzero(~np.isnan(radius))
  r = _median(radius[t])
  middle = float(np.median(r))
  parts = [part for part in np.array_split(r, 6) if len(part)]
  if all(abs(np.median(part) / middle - 1) < _SAME_RADIUS for part in parts):
    return middle, False
  waves, error = _fit_wave(t, r, _SLOW)
  mean, height = float(waves[0].real), 2 * float(abs(waves[1]))
  if not _PULSE[0] < height / mean < _PULSE[1] or not _is_close(error, 0.35 * height):
    return None, None
  return (mean + height + mean / _PULSE_MEAN) / 2, True


def _fit_wave(
  t: Int[np.ndarray, "n"], values: np.ndarray, periods: np.ndarray, harmonics: int = 1
) -> tuple[Complex[np.ndarray, "k"], Float[np.ndarray, "n"]]:
  """Factors of 1, exp(iwt), exp(-iwt), exp(2iwt), ... at the best period, in seconds; errors."""
  turns = [0] + [sign * k for k in range(1, harmonics + 1) for sign in (1, -1)]
  fits = []
  for period in periods:
    basis = np.exp(2j * np.pi / FPS / period * t[:, None] * np.array(turns))
    waves = np.linalg.lstsq(basis, values.astype(complex), rcond=None)[0]
    fits.append((waves, np.abs(basis @ waves - values)))
  return min(fits, key=lambda fit: float((fit[1] ** 2).sum()))


def _is_close(error: Float[np.ndarray, "n"], limit: float) -> bool:
  """Whether errors are small everywhere."""
  return all(np.sqrt((p**2).mean()) < limit for p in np.array_split(error, 4) if len(p))


def _find_spin(series: _Series, shape: str | None) -> bool | None:
  """Whether a thing turns; None if not always, or if its shape is not known."""
  if shape is None:
    return None
  if shape not in _TURNS:
    return False
  turn = 2 * np.pi / _TURNS[shape]
  steps = np.diff(series.angles[:, SHAPES.index(shape)])
  steps = (steps + turn / 2) % turn - turn / 2
  parts = [p[~np.isnan(p)] for p in np.array_split(steps, max(3, len(steps) // 12))]
  rates = np.array([np.degrees(np.median(p)) * FPS for p in parts if len(p) >= 4])
  none, least, greatest = _SPIN
  if not len(rates) or np.abs(rates).max() < none:
    return False
  forward = rates * np.sign(np.median(rates))
  return True if least < forward.min() and forward.max() < greatest else None


def _find_path(x: Float[np.ndarray, "t"], y: Float[np.ndarray, "t"]) -> str | None:
  """How a thing's centre moves; None if in no way that is known, or not always."""
  if max(np.ptp(x), np.ptp(y)) < _STILL:
    return "still"
  speeds = np.stack([_speeds(x), _speeds(y)])
  main = int(np.abs(speeds).mean(1).argmax())
  sign = np.sign(np.median(speeds[main]))
  along, across = sign * speeds[main], np.abs(speeds[1 - main])
  least = max(_SPEED[0], 0.5 * np.median(along))
  if along.min() > least and along.max() < _SPEED[1] and across.max() < _ACROSS:
    return (("left", "right"), ("up", "down"))[main][int(sign > 0)]
  t = np.arange(len(x))
  waves, error = _fit_wave(t, x + 1j * y, _SLOW)
  one, other = np.sort(np.abs(waves[1:]))
  if 5 < other < 15 and one < 0.35 * other and _is_close(error, 0.3 * other):
    return "circle"
  waves, error = _fit_wave(t, y, _FAST, harmonics=3)
  height = 4 * abs(waves[1])
  is_bounce = np.ptp(x) < 5 and 8 < height < 30 and _is_close(error, 0.15 * height)
  return "bounce" if is_bounce else None


def _speeds(x: Float[np.ndarray, "t"]) -> Float[np.ndarray, "n"]:
  """Pixels a second in windows of a second that overlap by half."""
  time = np.arange(FPS) - (FPS - 1) / 2
  starts = np.linspace(0, len(x) - FPS, max(2, 2 * len(x) // FPS - 1)).astype(int)
  return np.array([time @ x[i : i + FPS] for i in starts]) / (time @ time) * FPS


@functools.cache
def _background_basis() -> tuple[Float[np.ndarray, "p k"], Float[np.ndarray, "p k2"]]:
  """Of blocks of 2x2 pixels: 1, x, y, cosines and sines of the waves; and products of each two."""
  y, x = (np.mgrid[: SIZE // 2, : SIZE // 2].reshape(2, -1) + 0.5) * 2
  angles = [2 * np.pi / _PERIOD * (a * x + b * y) for a, b in _WAVES]
  columns = [np.ones_like(x), x / SIZE - 0.5, y / SIZE - 0.5]
  basis = np.stack(columns + [f(a) for a in angles for f in (np.cos, np.sin)], -1)
  return basis, (basis[:, :, None] * basis[:, None, :]).reshape(len(basis), -1)


def _find_background(
  grey: Float[np.ndarray, "t y x"], hidden: Bool[np.ndarray, "t y x"]
) -> str | None:
  """What is behind the things, if it is so throughout; of every second frame."""
  corners = [(slice(None), slice(i, None, 2), slice(j, None, 2)) for i in (0, 1) for j in (0, 1)]
  values = functools.reduce(np.add, [grey[c] for c in corners]).reshape(len(grey), -1) / (4 * 255)
  free = ~widen(functools.reduce(np.logical_or, [hidden[c] for c in corners]), 2, (1, 2))
  weights = free.reshape(values.shape).astype(float)
  basis, products = _background_basis()
  gram = (weights @ products).reshape(-1, basis.shape[1], basis.shape[1])
  gram += 1e-3 * np.eye(basis.shape[1])
  fit = np.linalg.solve(gram, ((weights * values) @ basis)[..., None])[..., 0]
  error = np.sqrt((((values - fit @ basis.T) ** 2) * weights).sum(1) / (weights.sum(1) + 1))
  waves = fit[:, 3::2] - 1j * fit[:, 4::2]
  kinds = [
    _name_background(*each) if is_free else None
    for is_free, *each in zip(weights.mean(1) > _FREE, fit[:, 1:3], np.abs(waves), error)
  ]
  kind = max(set(kinds), key=kinds.count)
  if kind is None or not lasts(np.array([k == kind for k in kinds])):
    return None
  if kind == "pan":
    # Both of its waves shift alike if it moves along x.
    speeds = np.stack([_drift(waves[:, 2]), _drift(waves[:, 3])])
    is_right = (np.abs(speeds) > _PAN[0]) & (np.abs(speeds) < _PAN[1])
    return kind if is_right.all() and np.ptp(np.sign(speeds)) == 0 else None
  if kind == "stripes":
    strongest = np.abs(waves).mean(0).argmax()
    return kind if np.abs(_drift(waves[:, strongest])).max() < _PAN[0] / 2 else None
  return kind


def _drift(wave: Complex[np.ndarray, "t"]) -> Float[np.ndarray, "4"]:
  """Pixels a second along x, in each quarter, of a wave in every second frame."""
  steps = np.angle(wave[1:] * wave[:-1].conj())
  middles = np.array([np.median(part) for part in np.array_split(steps, 4)])
  return -middles * (_PERIOD / 2 / np.pi) * (FPS / 2)


def _name_background(slopes: Any, waves: Any, error: float) -> str | None:
  """Kind of background of one frame."""
  second, first = np.sort(waves)[-2:]
  if first > _PATTERN:
    if error > 0.065:
      return None
    if min(waves[2:]) > 0.6 * first and max(waves[:2]) < 0.4 * first:
      return "pan"
    return "stripes" if second < 0.4 * first else None
  if error > 0.035:
    return None
  return "gradient" if np.abs(slopes).sum() > _SLOPE else "plain"
