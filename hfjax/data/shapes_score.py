"""How many videos of the shapes world show what their captions tell, and what others get wrong."""

import collections
import dataclasses
import math
import multiprocessing
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from hfjax.data import shapes_judge, shapes_words
from hfjax.data.shapes import Scene

_Z = 1.959964  # of 95 % of a normal distribution


@dataclasses.dataclass
class Score:
  """Counts of videos. attributes: right ones, by attribute.

  confusion: by attribute, how often something was seen where another thing was told, as
  "told, seen: number"; "nothing" where nothing was recognised.
  """

  total: int
  right: int
  attributes: dict[str, int]
  confusion: dict[str, dict[str, int]]

  @property
  def accuracy(self) -> float:
    """Share of videos in which every attribute is right."""
    return self.right / self.total

  def to_json(self) -> dict[str, Any]:
    """Shares, the 95 % interval of the accuracy, and the confusion."""
    low, high = interval(self.right, self.total)
    return {
      "accuracy": self.accuracy,
      "low": low,
      "high": high,
      "videos": self.total,
      "attributes": {k: n / self.total for k, n in self.attributes.items()},
      "confusion": self.confusion,
    }


def score(captions: Sequence[str], seen: Sequence[Scene]) -> Score:
  """Scores what was seen in videos, by `look`, against their captions."""
  attributes: collections.Counter[str] = collections.Counter()
  confusion: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  right = 0
  for caption, scene in zip(captions, seen, strict=True):
    wanted = shapes_words.read(caption)
    found = shapes_judge.compare(wanted, scene)
    right += all(found.values())
    attributes.update({name: int(is_right) for name, is_right in found.items()})
    for name, told, shown in _differences(wanted, scene):
      confusion[name][f"{told}, {shown}"] += 1
  ordered = {k: dict(v.most_common()) for k, v in sorted(confusion.items())}
  return Score(len(captions), right, dict(attributes), ordered)


def _differences(wanted: Scene, seen: Scene) -> Iterable[tuple[str, Any, Any]]:
  """Attribute, what was told and what is seen, wherever these differ."""
  if len(wanted.things) != len(seen.things):
    yield "things", len(wanted.things), len(seen.things)
  for a, b in shapes_judge.pair(wanted, seen):
    for name in ("colour", "shape", "size", "motion"):
      told, shown = getattr(a, name), getattr(b, name)
      if told is not None and told != shown:
        yield name, told, shown or "nothing"
  if wanted.background not in (None, seen.background):
    yield "background", wanted.background, seen.background or "nothing"
  if wanted.pillar != seen.pillar:
    yield "pillar", "there" if wanted.pillar else "none", "there" if seen.pillar else "none"


def interval(right: int, total: int) -> tuple[float, float]:
  """Wilson's 95 % interval of a share."""
  share, z = right / total, _Z**2 / total
  middle = (share + z / 2) / (1 + z)
  reach = math.sqrt(share * (1 - share) * z + z * z / 4) / (1 + z)
  return max(0.0, middle - reach), min(1.0, middle + reach)


def look(videos: Sequence[UInt8[np.ndarray, "t y x 3"]], workers: int = 0) -> list[Scene]:
  """What is seen in each video. workers: processes that look; 0 for none beside this one."""
  if not workers:
    return [shapes_judge.look(video) for video in videos]
  # Forks of a process with threads can hang.
  with multiprocessing.get_context("spawn").Pool(workers) as pool:
    return pool.map(shapes_judge.look, videos, chunksize=4)
