"""A small world of moving shapes: scenes, where things are at a time, and their videos.

A scene is what a caption can tell; a layout, drawn from a seed, is what it cannot: places, speeds
and tones. A frame is a closed-form function of both and of its time, so that videos have any length
and any window of one is made without the frames before it.

Pixel i covers [i, i + 1], x goes right and y down; the frame is a torus. Times are seconds.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8

from hfjax.data.rejects import DataError

SIZE, FPS = 128, 16
VERSION = 2  # of what seeds give
COLOURS = {
  "red": (230, 40, 40),
  "orange": (255, 140, 20),
  "yellow": (250, 230, 40),
  "green": (50, 200, 60),
  "cyan": (60, 220, 230),
  "blue": (50, 80, 245),
  "purple": (180, 60, 215),
  "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 12.0, "medium": 15.5, "large": 20.0}
MOTIONS = ("still", "left", "right", "up", "down", "circle", "bounce", "grow", "spin")
BACKGROUNDS = ("plain", "gradient", "stripes", "pan")
SPLITS = ("train", "held_out")
PILLAR, PILLAR_WIDTH = (140, 140, 140), 14

_WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_ROUND = ("circle", "ring")
_PILLAR_ODDS = 0.2
_HELD_OUT = 10  # of so many scenes, one
_ORBIT = 9.0  # radius of a circling thing's way, and half the height of a bounce
_PULSE = 0.775, 0.225  # radius of a pulsing thing: mean and amplitude, in its greatest
_NEAR, _FAR = 32.0, 96.0  # of two rows or columns
_TINTS = ((1.0, 1.0, 1.0), (0.85, 0.95, 1.1), (1.1, 0.97, 0.85), (0.88, 1.1, 0.92))
_PERIOD = 32  # of stripes and of a checkerboard; a divisor of SIZE
# Along which pixels, (x, y), a background changes.
_DIRECTIONS = ((1, 0), (0, 1), (1, 1), (1, -1))
_ACROSS = {"circle": 1.0, "square": 0.86, "triangle": 1.12, "star": 1.15, "cross": 1.0, "ring": 1.0}
_BLOCK = 16  # frames painted at once; their patches stay in the cache


@dataclasses.dataclass(frozen=True)
class Thing:
  """A thing of a scene; None is what a caption leaves open."""

  colour: str | None
  shape: str | None
  size: str | None
  motion: str | None


@dataclasses.dataclass(frozen=True)
class Scene:
  """What can be told of a video. The order of its things means nothing.

  pillar: whether a grey bar stands in front of everything.
  """

  things: tuple[Thing, ...]
  background: str | None
  pillar: bool


class Pose(NamedTuple):
  """A thing at a time: its centre, unwrapped, and radius in pixels; angle in radians, clockwise."""

  x: float
  y: float
  radius: float
  angle: float


@dataclasses.dataclass(frozen=True)
class Track:
  """Way of a thing. x, y: its place at time 0, or the centre about which it moves.

  rate: pixels a second of those that travel, turns a second of those that circle, bounce or pulse
    (negative: the other way round), radians a second of those that spin. phase: in turns.
  """

  motion: str
  x: float
  y: float
  radius: float
  rate: float
  phase: float

  def at(self, time: float) -> Pose:
    """Pose at a time, in seconds."""
    x, y, radius, angle = self.x, self.y, self.radius, 0.0
    turn = 2 * math.pi * ((self.rate * time + self.phase) % 1.0)
    if self.motion in _WAYS:
      dx, dy = _WAYS[self.motion]
      x, y = x + dx * self.rate * time, y + dy * self.rate * time
    elif self.motion == "circle":
      x, y = x + _ORBIT * math.cos(turn), y + _ORBIT * math.sin(turn)
    elif self.motion == "bounce":
      u = (self.rate * time + self.phase) % 1.0
      y += _ORBIT - 8 * _ORBIT * u * (1 - u)
    elif self.motion == "grow":
      radius *= _PULSE[0] + _PULSE[1] * math.cos(turn)
    elif self.motion == "spin":
      angle = (self.rate * time + 2 * math.pi * self.phase) % (2 * math.pi)
    return Pose(x, y, radius, angle)


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where and how the things of a scene move, and the tones of what is behind them.

  tracks: in the order of the scene's things. tint: factors of red, green and blue. tones: darkest
    and brightest, in 0..1. direction: (x, y) along which the background changes. offset: of its
    pattern in x and y, pixels. drift: pixels a second to the right. pillar: its first column, or
    None.
  """

  tracks: tuple[Track, ...]
  tint: tuple[float, float, float]
  tones: tuple[float, float]
  direction: tuple[int, int]
  offset: tuple[float, float]
  drift: float
  pillar: int | None


def check(scene: Scene):
  """Raises DataError unless the scene is complete and one of this world."""
  for thing in scene.things:
    for name, known in (
      ("colour", COLOURS), ("shape", SHAPES), ("size", SIZES), ("motion", MOTIONS),
    ):  # fmt: skip
      if getattr(thing, name) not in known:
        raise DataError(
          f"The {name} of a thing is {getattr(thing, name)!r}; give one of {', '.join(known)}."
        )
  if scene.background not in BACKGROUNDS:
    raise DataError(
      f"The background is {scene.background!r}; give one of {', '.join(BACKGROUNDS)}."
    )
  if not 1 <= len(scene.things) <= 2:
    raise DataError(f"A scene has {len(scene.things)} things; give 1 or 2.")
  if why := _broken(scene.things):
    raise DataError(why)


def draw_scene(rng: np.random.Generator) -> Scene:
  """One of all scenes: of one thing or two, as often; uniform among those; a pillar in a fifth."""
  count = 1 + int(rng.integers(2))
  while True:
    picks = rng.integers(0, [len(COLOURS), len(SHAPES), len(SIZES), len(MOTIONS)], (count, 4))
    things = tuple(
      Thing(_COLOUR_NAMES[c], SHAPES[s], _SIZE_NAMES[z], MOTIONS[m])
      for c, s, z, m in picks.tolist()
    )
    if not _broken(things):
      break
  background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
  return Scene(things, background, bool(rng.random() < _PILLAR_ODDS))


def held_out(scene: Scene) -> bool:
  """Whether a complete scene, in whatever order its things are, is kept from training."""
  check(scene)
  things = [dataclasses.astuple(thing) for thing in _sorted(scene.things)]
  text = json.dumps([things, scene.background, scene.pillar])
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % _HELD_OUT == 0


def layout(scene: Scene, seed: int | Sequence[int]) -> Layout:
  """Draws what a complete scene leaves open. The order of its things changes nothing else.

  Raises DataError on a scene that `check` refuses.
  """
  check(scene)
  rng = np.random.default_rng(seed)
  order = _sorted(scene.things)
  sideways = {thing.motion in ("left", "right") for thing in order}
  upright = {thing.motion in ("up", "down") for thing in order}
  in_rows = True in sideways or (True not in upright and bool(rng.random() < 0.5))
  lanes = [_NEAR, _FAR] if rng.random() < 0.5 else [_FAR, _NEAR]
  tracks = {}
  for thing, lane in zip(order, lanes):
    track = _draw_track(rng, thing)
    if len(order) == 2:
      where = {"x": track.x, "y": track.y} | {"y" if in_rows else "x": lane}
      track = Track(track.motion, **where, radius=track.radius, rate=track.rate, phase=track.phase)
    tracks[thing] = track
  uniform = lambda low, high: float(rng.uniform(low, high))
  either = lambda: 1 if rng.random() < 0.5 else -1
  tones, ways = (0.0, 0.0), len(_DIRECTIONS)
  if scene.background == "plain":
    tones = (uniform(0.16, 0.26),) * 2
  elif scene.background == "gradient":
    tones = (uniform(0.05, 0.07), uniform(0.34, 0.37))
  elif scene.background == "stripes":
    tones = (uniform(0.11, 0.13), uniform(0.28, 0.32))
  else:
    tones, ways = (uniform(0.11, 0.13), uniform(0.26, 0.30)), 1
  x, y = _DIRECTIONS[int(rng.integers(ways))]
  sign = either()
  return Layout(
    tracks=tuple(tracks[thing] for thing in scene.things),
    tint=_TINTS[int(rng.integers(len(_TINTS)))],
    tones=tones,
    direction=(sign * x, sign * y),
    offset=(uniform(0, _PERIOD), float(rng.integers(_PERIOD))),
    drift=sign * uniform(6, 10) if scene.background == "pan" else 0.0,
    pillar=_draw_pillar(rng, tracks) if scene.pillar else None,
  )


def render(
  scene: Scene, seed: int | Sequence[int], frames: int, start: int = 0
) -> UInt8[np.ndarray, "t 128 128 3"]:
  """Frames `start` to before `start + frames` of the video of a complete scene and a seed.

  Raises DataError on a scene that `check` refuses, and on no frames.
  """
  return paint(scene, layout(scene, seed), frames, start)


def paint(
  scene: Scene, place: Layout, frames: int, start: int = 0
) -> UInt8[np.ndarray, "t 128 128 3"]:
  """As `render`, of a layout."""
  if frames < 1 or start < 0:
    raise DataError(f"{frames} frames from {start} on are asked for; give 1 or more, from 0 on.")
  video = _background(scene, place, frames, start)
  for thing, track in zip(scene.things, place.tracks, strict=True):
    for i in range(0, frames, _BLOCK):
      block = video[i : i + _BLOCK]
      # One by one: functions of whole arrays may round by where in the array a number stands.
      poses = [track.at((start + i + j) / FPS) for j in range(len(block))]
      _paint(block, thing, poses)
  if place.pillar is not None:
    video[:, :, place.pillar : place.pillar + PILLAR_WIDTH] = PILLAR
  return video


def distance(
  shape: str,
  x: Float[np.ndarray, "*n"],
  y: Float[np.ndarray, "*n"],
  radius: float | Float[np.ndarray, "*n"],
) -> Float[np.ndarray, "*n"]:
  """Signed distance in pixels from the outline of an upright shape about (0, 0), negative inside.

  Beyond corners it is that of the sides' lines; of points, at most that of the circle around.
  """
  if shape == "square":
    return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
  if shape == "cross":
    x, y, width = np.abs(x), np.abs(y), 0.36 * radius
    upright = np.maximum(x - width, y - radius)
    return np.minimum(upright, np.maximum(x - radius, y - width))
  rho = np.sqrt(x * x + y * y)
  if shape == "circle":
    return rho - radius
  if shape == "ring":
    return np.abs(rho - 0.775 * radius) - 0.225 * radius
  if shape == "triangle":
    outer = 1.12 * radius
    sides = np.maximum(np.abs(x) * math.sin(math.pi / 3) - 0.5 * y, y)
    return np.maximum(sides - 0.5 * outer, rho - outer)
  if shape == "star":
    outer, c, s = 1.15 * radius, math.cos(math.pi / 5), math.sin(math.pi / 5)
    # Two mirrors bring every point to the half of it that holds the upper tip.
    x, y = np.abs(x), -y
    for side in (c, -c):
      beyond = 2 * np.maximum(side * x - s * y, 0)
      x, y = x - side * beyond, y + s * beyond
    # The side runs from (0, 1.15) to (0.5 s, 0.5 c); (nx, ny) is normal to it.
    nx, ny = 1.15 - 0.5 * c, 0.5 * s
    norm = math.hypot(nx, ny)
    return np.maximum(np.abs(x) * (nx / norm) + (y - outer) * (ny / norm), rho - outer)
  raise DataError(f"The shape is {shape!r}; give one of {', '.join(SHAPES)}.")


class Shapes:
  """Videos with captions, by number; each depends on its number, the split and the seeds alone."""

  def __init__(
    self,
    split: str = "train",
    count: int = 10_000,
    seed: int = 0,
    frames: int = 81,
    text_seed: int | None = None,
    spins: float = 0.0,
  ):
    """split: "train" or "held_out", which share no scene. text_seed: of captions; else `seed`.
    spins: share of clips in which something must spin, which is learnt last; it does in some of the
    others too.

    Raises DataError on another split, on counts below 1, and on a share that is none.
    """
    if split not in SPLITS:
      raise DataError(f"The split is {split!r}; give one of {', '.join(SPLITS)}.")
    if min(count, frames) < 1 or min(seed, text_seed or 0) < 0:
      raise DataError(
        f"{count} clips of {frames} frames of seed {seed} are asked for; give 1 or more of each, "
        "and seeds from 0 on."
      )
    if not 0 <= spins <= 1:
      raise DataError(f"In a share of {spins} of the clips something shall spin; give 0 to 1.")
    self.split, self.count, self.seed, self.frames = split, count, seed, frames
    self.spins = spins
    self.text_seed = seed if text_seed is None else text_seed

  @property
  def identity(self) -> str:
    """The same for the same clips and captions."""
    told = ["shapes", VERSION, self.split, self.count, self.seed, self.frames, self.text_seed]
    told += [self.spins] if self.spins else []
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{"prompt": str, "video": uint8 `[t y x 3]`}; IndexError beyond the last."""
    return {"prompt": self.prompt(index), "video": self.video(index)}

  def scene(self, index: int) -> Scene:
    """What is seen in a clip; complete."""
    rng = np.random.default_rng(self._key(self.seed, index, 0))
    must_spin = np.random.default_rng(self._key(self.seed, index, 3)).random() < self.spins
    while True:
      scene = draw_scene(rng)
      if must_spin and all(thing.motion != "spin" for thing in scene.things):
        continue
      if held_out(scene) == (self.split == "held_out"):
        return scene

  def prompt(self, index: int) -> str:
    """Caption of a clip."""
    from hfjax.data import shapes_words  # which knows scenes

    rng = np.random.default_rng(self._key(self.text_seed, index, 1))
    return shapes_words.describe(self.scene(index), rng)

  def layout(self, index: int) -> Layout:
    """Layout of a clip."""
    return layout(self.scene(index), self._key(self.seed, index, 2))

  def video(
    self, index: int, frames: int | None = None, start: int = 0
  ) -> UInt8[np.ndarray, "t 128 128 3"]:
    """Frames of a clip; any window, beyond its length too."""
    return paint(self.scene(index), self.layout(index), frames or self.frames, start)

  def _key(self, seed: int, index: int, use: int) -> list[int]:
    if not 0 <= index < self.count:
      raise IndexError(index)
    return [seed, SPLITS.index(self.split), index, use]


def prompts(split: str, count: int, seed: int = 0, spins: float = 0.0) -> list[str]:
  """Captions of `Shapes(split, count, seed, spins=spins)`."""
  clips = Shapes(split, count, seed, spins=spins)
  return [clips.prompt(i) for i in range(count)]


_COLOUR_NAMES, _SIZE_NAMES = tuple(COLOURS), tuple(SIZES)


def _sorted(things: Sequence[Thing]) -> list[Thing]:
  return sorted(things, key=lambda thing: str(thing.colour))


def _broken(things: Sequence[Thing]) -> str:
  """The rule that complete things break, as a sentence; empty if none."""
  motions = {thing.motion for thing in things}
  if len({thing.colour for thing in things}) < len(things):
    return f"Both things are {things[0].colour}; give them two colours."
  if any(thing.motion == "spin" and thing.shape in _ROUND for thing in things):
    return "A circle or ring spins, which none can see; give another shape or motion."
  if motions & {"left", "right"} and motions & {"up", "down"}:
    return "One thing moves sideways, one up or down, and they would meet; give other motions."
  return ""


def _draw_track(rng: np.random.Generator, thing: Thing) -> Track:
  assert thing.motion and thing.size
  x, y = rng.uniform(_NEAR + 1, _FAR - 1, 2).tolist()
  anywhere, phase, share = rng.uniform(0, SIZE), rng.random(), rng.random()
  sign = 1 if rng.random() < 0.5 else -1
  rate = 0.0
  if thing.motion in _WAYS:
    x, y = (anywhere, y) if _WAYS[thing.motion][0] else (x, anywhere)
    rate = 24 + 16 * share
  elif thing.motion == "spin":
    rate = sign * math.radians(90 + 30 * share)
  elif thing.motion != "still":
    seconds = 1.2 if thing.motion == "bounce" else 2.4
    rate = (sign if thing.motion == "circle" else 1) / (seconds * (0.9 + 0.2 * share))
  return Track(thing.motion, x, y, SIZES[thing.size], float(rate), float(phase))


def _draw_pillar(rng: np.random.Generator, tracks: dict[Thing, Track]) -> int:
  """First column, where the bar covers least of what does not move sideways."""
  columns = rng.integers(0, SIZE - PILLAR_WIDTH + 1, 64).tolist()

  def covered(column: int) -> float:
    total = 0.0
    for thing, track in tracks.items():
      if thing.motion not in ("left", "right"):
        reach = _extent(thing) + _ORBIT * (thing.motion == "circle")
        both = min(column + PILLAR_WIDTH, track.x + reach) - max(column, track.x - reach)
        total += max(0.0, both)
    return total

  return min(columns, key=covered)  # of equals the first


def _extent(thing: Thing) -> float:
  """Greatest distance of a thing's pixels from its centre, along an axis."""
  assert thing.shape and thing.size
  turned = math.sqrt(2) if (thing.shape, thing.motion) == ("square", "spin") else 1.0
  turned = math.hypot(1, 0.36) if (thing.shape, thing.motion) == ("cross", "spin") else turned
  return _ACROSS[thing.shape] * turned * SIZES[thing.size]


def _background(
  scene: Scene, place: Layout, frames: int, start: int
) -> UInt8[np.ndarray, "t 128 128 3"]:
  low, high = place.tones
  colours = lambda tones: (tones[..., None] * (255 * np.asarray(place.tint)) + 0.5).astype(np.uint8)
  pixels = np.arange(SIZE) + 0.5
  if scene.background == "pan":
    drift = np.array([place.drift * ((start + i) / FPS) % _PERIOD for i in range(frames)])
    wave = _wave(pixels - place.offset[0] - drift[:, None])
    kinds = colours(low + (high - low) * np.stack([wave, 1 - wave], 1))  # [t 2 x 3]
    rows = (np.arange(SIZE) + int(place.offset[1])) // (_PERIOD // 2) % 2
    return kinds[:, rows]
  along = place.direction[0] * pixels + place.direction[1] * pixels[:, None]
  if scene.background == "stripes":
    level = _wave(along - place.offset[0])
  else:
    span = SIZE * (abs(place.direction[0]) + abs(place.direction[1]))
    level = (along - min(place.direction[0], 0) * SIZE - min(place.direction[1], 0) * SIZE) / span
  still = colours(np.broadcast_to(low + (high - low) * level, (SIZE, SIZE)))
  return np.broadcast_to(still, (frames, SIZE, SIZE, 3)).copy()


def _wave(x: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
  """0 and 1 by turns, each half a period long, with edges two pixels wide."""
  return np.clip(0.5 + (_PERIOD / 4 - np.abs(x % _PERIOD - _PERIOD / 2)) / 2, 0, 1)


def _paint(video: UInt8[np.ndarray, "t 128 128 3"], thing: Thing, poses: Sequence[Pose]):
  """Paints a thing over frames."""
  assert thing.colour and thing.shape
  reach = math.ceil(_extent(thing) + 1)
  shown = poses if thing.motion != "still" else poses[:1]
  cover = _cover(thing.shape, shown, reach)
  cover = np.repeat(cover, 3, -1)
  cover = np.broadcast_to(cover, (len(poses), *cover.shape[1:]))
  colour = np.tile(np.array(COLOURS[thing.colour], np.float32), 2 * reach + 1)
  flat = video.reshape(len(video), SIZE, SIZE * 3)  # channels beside columns: long inner loops
  for frame, pose, part in zip(flat, poses, cover, strict=True):
    top, left = math.floor(pose.y % SIZE) - reach, math.floor(pose.x % SIZE) - reach
    bottom, right = top + 2 * reach + 1, left + 2 * reach + 1
    where: Any = slice(top, bottom), slice(3 * left, 3 * right)
    if top < 0 or left < 0 or bottom > SIZE or right > SIZE:
      where = np.ix_(np.arange(top, bottom) % SIZE, np.arange(3 * left, 3 * right) % (3 * SIZE))
    below = frame[where].astype(np.float32)
    frame[where] = below + part * (colour - below) + np.float32(0.5)


def _cover(shape: str, poses: Sequence[Pose], reach: int) -> Float32[np.ndarray, "t p p"]:
  """How much of each pixel, within `reach` of the one that holds the centre, a shape covers."""
  column = lambda values: np.array(values, np.float32)[:, None, None]
  pixels = np.arange(-reach, reach + 1, dtype=np.float32) + np.float32(0.5)
  x = pixels - column([p.x % SIZE - math.floor(p.x % SIZE) for p in poses])
  y = pixels[:, None] - column([p.y % SIZE - math.floor(p.y % SIZE) for p in poses])
  if any(p.angle for p in poses):
    c, s = (column([f(p.angle) for p in poses]) for f in (math.cos, math.sin))
    x, y = c * x + s * y, c * y - s * x
  return np.clip(0.5 - distance(shape, x, y, column([p.radius for p in poses])), 0, 1)
