"""Videos of the world of shapes are seen as what they were made of, and wrong ones as wrong."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from hfjax.data.rejects import DataError
from hfjax.data.shapes import FPS, SIZES, Layout, Scene, Shapes, Thing, Track, paint
from hfjax.data.shapes_judge import LEAST_FRAMES, compare, judge, look

FRAMES = 81


def canonical(scene):
  return sorted(dataclasses.astuple(t) for t in scene.things), scene.background, scene.pillar


def is_seen(scene, video):
  seen = look(video)
  whole = all(None not in dataclasses.astuple(thing) for thing in seen.things)
  return whole and canonical(seen) == canonical(scene)


def misread(clips, numbers, change=lambda video, rng: video):
  rng = lambda i: np.random.default_rng(i)
  return [i for i in numbers if not is_seen(clips.scene(i), change(clips.video(i), rng(i)))]


def to_pixels(video):
  return np.clip(np.rint(video), 0, 255).astype(np.uint8)


def blur(video, rng):
  return to_pixels(ndimage.gaussian_filter(video.astype(np.float32), (0, 1, 1, 0)))


def noise(video, rng):
  return to_pixels(video + rng.normal(0, 6, video.shape).astype(np.float32))


def coarse(video, rng):
  return to_pixels(np.rint(video / 16) * 16)


def brightness(video, rng):
  return to_pixels(video * np.float32(rng.choice([0.95, 1.05])))


def shift(video, rng):
  y, x = rng.uniform(-0.5, 0.5, 2)
  return to_pixels(ndimage.shift(video.astype(np.float32), (0, y, x, 0), order=1, mode="grid-wrap"))


def bad_frames(video, rng):
  video = video.copy()
  for t, other in zip(rng.choice(len(video), 3, replace=False), (0, 255, 128)):
    video[t] = other
  return video


def everything(video, rng):
  for change in (blur, brightness, shift, noise):
    video = change(video, rng)
  return video


CHANGES = (blur, noise, coarse, brightness, shift, bad_frames, everything)


def test_scenes_are_seen_as_they_were_drawn():
  assert not misread(Shapes("held_out", 100, seed=7, frames=49), range(16))


@pytest.mark.parametrize("change", CHANGES)
def test_scenes_are_seen_through_flaws(change):
  assert not misread(Shapes("held_out", 100, seed=8, frames=49), range(3), change)


@pytest.mark.slow
def test_nearly_all_scenes_are_seen():
  assert len(misread(Shapes("held_out", 100, seed=9, frames=FRAMES), range(100))) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_nearly_all_scenes_are_seen_through_flaws(change):
  clips = Shapes("held_out", 1000, seed=10, frames=FRAMES)
  assert len(misread(clips, range(20), change)) <= 1


def test_short_clips_are_seen():
  assert not misread(Shapes("held_out", 100, seed=11, frames=LEAST_FRAMES), range(8))


# Two things and what is behind them, to be spoilt.
RING = Thing("orange", "ring", "medium", "right")
STAR = Thing("cyan", "star", "large", "spin")
PAIR = Scene((RING, STAR), "stripes", False)
TRACKS = (Track("right", 20, 32, SIZES["medium"], 30, 0), Track("spin", 70, 96, 20, 1.8, 0.1))
PLACE = Layout(TRACKS, (0.88, 1.1, 0.92), (0.12, 0.3), (1, 1), (5, 7), 0, None)
HALF = FRAMES // 2


@dataclasses.dataclass(frozen=True)
class Retimed:
  """A track at other times."""

  track: Track
  time: object

  motion = property(lambda self: self.track.motion)

  def at(self, time):
    return self.track.at(self.time(time))


def spoilt(number, thing=None, track=None, scene=PAIR, place=PLACE, **kwargs):
  """Video with another thing, or one that moves otherwise, or with another background or pillar."""
  things, tracks = list(scene.things), list(place.tracks)
  if number is not None:
    things[number] = dataclasses.replace(things[number], **(thing or {}))
    tracks[number] = dataclasses.replace(tracks[number], **(track or {}))
  scene = dataclasses.replace(
    scene, things=tuple(things), background=kwargs.pop("background", scene.background)
  )
  place = dataclasses.replace(place, tracks=tuple(tracks), **kwargs)
  return paint(scene, place, FRAMES)


def retimed(number, time):
  tracks = list(TRACKS)
  tracks[number] = Retimed(TRACKS[number], time)
  return paint(PAIR, dataclasses.replace(PLACE, tracks=tuple(tracks)), FRAMES)


def without(number):
  keep = [i for i in (0, 1) if i != number]
  scene = dataclasses.replace(PAIR, things=tuple(PAIR.things[i] for i in keep))
  return paint(scene, dataclasses.replace(PLACE, tracks=tuple(TRACKS[i] for i in keep)), FRAMES)


def joined(first, second, at=HALF):
  return np.concatenate([first[:at], second[at:]])


def with_third(colour):
  third = Thing(colour, "square", "small", "still")
  scene = dataclasses.replace(PAIR, things=(*PAIR.things, third))
  track = Track("still", 20, 96, 10, 0, 0)
  return paint(scene, dataclasses.replace(PLACE, tracks=(*TRACKS, track)), FRAMES)


def right():
  return paint(PAIR, PLACE, FRAMES)


RED, SQUARE = {"colour": "red"}, {"shape": "square"}
SMALL = {"size": "small"}, {"radius": SIZES["small"]}
MEDIUM = {"size": "medium"}, {"radius": SIZES["medium"]}
PAN = {"background": "pan", "direction": (1, 0)}
STOP = lambda time: min(time, HALF / FPS)
# What is made, and what of it is wrong; all else must be seen to be right.
WRONG = {
  "colour": (lambda: spoilt(0, RED), "colour"),
  "shape": (lambda: spoilt(1, SQUARE), "shape"),
  "size": (lambda: spoilt(0, *SMALL), "size"),
  "stands": (lambda: spoilt(0, {"motion": "still"}, {"motion": "still"}), "motion"),
  "other way": (lambda: spoilt(0, {"motion": "left"}, {"motion": "left"}), "motion"),
  "does not spin": (lambda: retimed(1, lambda time: 0), "motion"),
  "frozen": (lambda: np.repeat(right()[:1], FRAMES, 0), "motion"),
  "stops": (lambda: retimed(0, STOP), "motion"),
  "stops to spin": (lambda: retimed(1, STOP), "motion"),
  "starts late": (lambda: retimed(0, lambda time: max(time, HALF / FPS)), "motion"),
  "turns back": (lambda: retimed(0, lambda time: abs(time - HALF / FPS)), "motion"),
  "changes colour": (lambda: joined(right(), spoilt(0, RED)), "colour"),
  "changes shape": (lambda: joined(right(), spoilt(1, SQUARE)), "shape size motion"),
  "changes size": (lambda: joined(right(), spoilt(1, *MEDIUM)), "size motion"),
  "vanishes": (lambda: joined(right(), without(0), 48), "colour shape size motion"),
  "comes late": (lambda: joined(without(1), right(), 33), "colour shape size motion"),
  "is not there": (lambda: without(1), "things colour shape size motion"),
  "a third": (lambda: with_third("white"), "things"),
  "a third of the same colour": (lambda: with_third("cyan"), "things"),
  "background": (lambda: spoilt(None, background="gradient"), "background"),
  "pan": (lambda: spoilt(None, **PAN, drift=8), "background"),
  "changes background": (lambda: joined(right(), spoilt(None, background="plain")), "background"),
  "a pillar": (lambda: spoilt(None, pillar=100), "pillar"),
  "a pillar comes": (lambda: joined(right(), spoilt(None, pillar=100)), "background"),
}  # fmt: skip


def test_what_is_to_be_spoilt_is_right():
  assert all(compare(PAIR, look(right())).values())


@pytest.mark.parametrize("name", WRONG)
def test_wrong_videos_are_wrong_in_what_is_wrong(name):
  make, attributes = WRONG[name]
  told = compare(PAIR, look(make()))
  assert " ".join(key for key, is_right in told.items() if not is_right) == attributes


def test_a_checkerboard_that_stands_does_not_pan():
  scene = dataclasses.replace(PAIR, background="pan")
  make = lambda drift: look(spoilt(None, **PAN, drift=drift)).background
  assert scene.background == make(-8) and make(0) is None


def test_noise_holds_nothing():
  video = np.random.default_rng(0).integers(0, 256, (LEAST_FRAMES, 128, 128, 3), dtype=np.uint8)
  seen = look(video)
  assert seen.background is None and not seen.pillar
  assert not any(compare(PAIR, seen)[key] for key in ("colour", "shape", "size", "motion"))


@pytest.mark.parametrize("level", [0, 40, 255])
def test_a_screen_of_one_level(level):
  seen = look(np.full((LEAST_FRAMES, 128, 128, 3), level, np.uint8))
  assert not any(thing.shape for thing in seen.things) and len(seen.things) == (level == 255)
  assert level == 255 or seen.background == "plain"


MIRROR = {"left": "right", "right": "left"}
REVERSED = MIRROR | {"up": "down", "down": "up"}


@pytest.mark.parametrize("index", range(4))
def test_mirrored_reversed_and_rolled_videos(index):
  clips = Shapes("train", 10, seed=12, frames=49)
  scene, video = clips.scene(index), clips.video(index)
  swap = lambda ways: dataclasses.replace(
    scene,
    things=tuple(dataclasses.replace(t, motion=ways.get(t.motion, t.motion)) for t in scene.things),
  )
  assert is_seen(swap(MIRROR), video[:, :, ::-1])
  # A bounce backwards is a bounce.
  assert is_seen(swap(REVERSED), video[::-1])
  rolled = look(np.roll(video, (37, 50), (1, 2)))
  assert canonical(rolled)[0] == canonical(scene)[0] and rolled.pillar == scene.pillar


def test_captions_are_kept_by_their_videos_and_not_by_others():
  clips = Shapes("held_out", 12, seed=13, frames=49)
  for i in range(6):
    video = clips.video(i)
    told = judge(clips.prompt(i), video)
    assert all(told.values()), (clips.prompt(i), told)
    other = clips.scene(i + 6)
    # No word of a scene that is wholly told is left out.
    assert all(judge(clips.prompt(i + 6), video).values()) == (
      canonical(other) == canonical(clips.scene(i))
    )


def test_captions_that_tell_nothing_of_this_world():
  video = Shapes("train", 1, frames=LEAST_FRAMES).video(0)
  with pytest.raises(DataError):
    judge("a fish swims in the sea", video)


def seen(things, background="plain", pillar=False):
  return Scene(tuple(Thing(*t.split()) for t in things), background, pillar)


def test_what_is_untold_may_be_anything():
  wanted = Scene((Thing("red", "ring", None, "up"),), None, False)
  for size in ("small", "large"):
    for background in ("pan", None):
      assert all(compare(wanted, seen([f"red ring {size} up"], background)).values())
  told = compare(wanted, Scene((Thing("red", None, None, "up"),), None, False))
  assert [key for key, is_right in told.items() if not is_right] == ["shape"]


def test_things_are_paired_by_what_agrees():
  wanted = seen(["red ring small up", "blue star large still"])
  assert all(compare(wanted, seen(["blue star large still", "red ring small up"])).values())
  told = compare(
    wanted, seen(["blue star small still", "red ring small up", "white cross small up"])
  )
  assert [key for key, is_right in told.items() if not is_right] == ["things", "size"]
  # Each is paired once.
  twins = compare(seen(["red ring small up"] * 2), seen(["red ring small up", "red star small up"]))
  assert [key for key, is_right in twins.items() if not is_right] == ["shape"]


def test_nothing_agrees_with_a_thing_that_is_not_there():
  told = compare(seen(["red ring small up"]), seen([]))
  assert [k for k, is_right in told.items() if is_right] == ["background", "pillar"]
  told = compare(seen([]), seen(["red ring small up"], "pan", True))
  wrong = ["things", "background", "pillar"]
  assert [key for key, is_right in told.items() if not is_right] == wrong


@pytest.mark.parametrize(
  "shape, kind, told",
  [
    ((32, 128, 128, 3), np.uint8, "A video has 32 frames; give 33 or more."),
    ((81, 64, 128, 3), np.uint8, "give RGB frames of 128x128 pixels, uint8"),
    ((81, 128, 128), np.uint8, "give RGB frames of 128x128 pixels, uint8"),
    ((81, 128, 128, 3), np.float32, "A video is float32"),
  ],
)
def test_other_arrays_are_refused(shape, kind, told):
  with pytest.raises(DataError, match=told):
    look(np.zeros(shape, kind))
