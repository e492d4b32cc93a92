"""Captions of the world of shapes: scenes in words, and words read back as scenes.

A caption is a row of parts, told in any order: one or two things, each with what it does; what is
behind them; a pillar. Between parts may stand "and" or "while". What describes also reads, by the
same tables; case, punctuation and articles do not matter to the reader.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hfjax.data import shapes
from hfjax.data.rejects import DataError
from hfjax.data.shapes import Scene, Thing

_SIZE_ODDS, _BACKGROUND_ODDS = 0.8, 0.75
_FRONT_ODDS, _BARE_ODDS = 0.25, 0.25  # a background comes first; what is still has no verb

_COLOURS = {name: (name,) for name in shapes.COLOURS} | {
  "cyan": ("cyan", "turquoise"),
  "purple": ("purple", "violet"),
}
_SHAPES = {
  "circle": ("circle", "disc", "ball"),
  "square": ("square", "box"),
  "triangle": ("triangle",),
  "star": ("star",),
  "cross": ("cross", "plus"),
  "ring": ("ring", "hoop"),
}
_SIZES = {
  "small": ("small", "little", "tiny"),
  "medium": ("medium", "mid-sized"),
  "large": ("large", "big", "huge"),
}
_TRAVELS = ("moves", "slides", "drifts", "glides")
_MOTIONS = {
  "still": ("stays still", "stands still", "rests", "does not move"),
  "left": tuple(f"{v} {way}" for v in _TRAVELS for way in ("left", "to the left")),
  "right": tuple(f"{v} {way}" for v in _TRAVELS for way in ("right", "to the right")),
  "up": ("rises", "climbs", *(f"{v} {way}" for v in _TRAVELS for way in ("up", "upwards"))),
  "down": ("sinks", "falls", *(f"{v} {way}" for v in _TRAVELS for way in ("down", "downwards"))),
  "circle": ("circles", "goes round in circles", "moves in circles", "orbits"),
  "bounce": ("bounces", "bounces up and down", "hops up and down"),
  "grow": ("grows and shrinks", "swells and shrinks", "pulses"),
  "spin": ("spins", "rotates", "turns around", "spins around"),
}
_BACKGROUNDS = {
  "plain": ("on a plain background", "over a plain background", "against a plain wall",
            "in front of a plain wall"),
  "gradient": ("over a gradient", "on a gradient", "on a smooth gradient",
               "over a smooth gradient"),
  "stripes": ("on stripes", "over stripes", "in front of stripes", "on a striped background"),
  "pan": ("over a slowly panning checkerboard", "on a slowly panning checkerboard",
          "in front of a slowly panning checkerboard",
          "while the checkered background slowly pans"),
}  # fmt: skip
# Of a pillar, those that can come first, and those that cannot.
_PILLARS_FRONT = ("behind a grey pillar", "behind a grey column")
_PILLARS = (
  *_PILLARS_FRONT,
  "with a grey pillar in front",
  "and a grey pillar stands in front",
  "while a grey column stands in front",
)
_ARTICLES, _JOINTS = ("a", "an", "the"), ("and", "while")


def words(text: str) -> list[str]:
  """Its words in lower case, without hyphens and punctuation."""
  return re.findall(r"[^\W_]+", text.lower())


def describe(scene: Scene, rng: np.random.Generator) -> str:
  """A caption of a complete scene, lower-case; it may leave sizes and the background untold.

  Things come in any order. Raises DataError on a scene that `shapes.check` refuses.
  """
  shapes.check(scene)
  chance = lambda odds: bool(rng.random() < odds)
  pick = lambda choices: choices[int(rng.integers(len(choices)))]
  things = list(scene.things)
  if chance(0.5):
    things.reverse()
  # A verb told of one thing would seem to be of both.
  is_bare = all(thing.motion == "still" for thing in things) and chance(_BARE_ODDS)
  clauses = []
  for thing in things:
    size = pick(_SIZES[str(thing.size)]) if chance(_SIZE_ODDS) else ""
    noun = f"{size} {pick(_COLOURS[str(thing.colour)])} {pick(_SHAPES[str(thing.shape)])}".strip()
    verb = "" if is_bare else pick(_MOTIONS[str(thing.motion)])
    clauses.append(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun} {verb}".strip())
  joint = " and " if is_bare else pick((" and ", " while ", ", "))
  told = joint.join(clauses)
  front, back = [], []
  if chance(_BACKGROUND_ODDS):
    choices = _BACKGROUNDS[str(scene.background)]
    if chance(_FRONT_ODDS):
      front.append(pick(choices))
    else:
      no_while = is_bare or (joint == " while " and len(things) == 2)
      back.append(pick([c for c in choices if not (no_while and c.startswith("while"))]))
  if scene.pillar:
    if not front and chance(_FRONT_ODDS):
      front.append(pick(_PILLARS_FRONT))
    else:
      has_joint = any(part.startswith("while") for part in back) or len(things) == 2
      back.append(pick([c for c in _PILLARS if not (has_joint and c.startswith(_JOINTS))]))
  return ", ".join([*front, " ".join([told, *back])])


def read(caption: str) -> Scene:
  """The scene that a caption tells; None for what it leaves open.

  No verb means that a thing is still, and no word of a pillar that there is none. Things come as
  they are told. A scene that is read need not be one of the world, as `shapes.check` knows it.

  Raises DataError on what is outside the grammar.
  """
  rest = [word for word in words(caption) if word not in _ARTICLES]
  if not rest:
    raise DataError(f"The caption is empty; write one such as {_EXAMPLE!r}.")
  things: list[Thing] = []
  backgrounds: list[str] = []
  pillars = 0
  at, joint = 0, ""
  while at < len(rest):
    if background := _BACKGROUND_PHRASES.find(rest, at):
      backgrounds.append(background.name)
      at, joint = background.end, ""
    elif pillar := _PILLAR_PHRASES.find(rest, at):
      pillars += 1
      at, joint = pillar.end, ""
    elif (found := _thing(rest, at)) is not None:
      thing, at = found
      things.append(thing)
      joint = ""
    elif rest[at] in _JOINTS and at and not joint:
      joint, at = rest[at], at + 1
    else:
      raise DataError(
        f"The caption {caption[:200]!r} cannot be read from {' '.join(rest[at:])[:60]!r} on; write "
        f"as in {_EXAMPLE!r}."
      )
  for what, count, least, most in (
    ("things", len(things), 1, 2),
    ("backgrounds", len(backgrounds), 0, 1),
    ("pillars", pillars, 0, 1),
  ):
    if not least <= count <= most:
      wanted = "1 or 2" if most == 2 else "1 at most"
      raise DataError(f"The caption {caption[:200]!r} tells of {count} {what}; tell of {wanted}.")
  if joint:
    raise DataError(f"The caption {caption[:200]!r} ends in {joint!r}; tell what comes then.")
  return Scene(tuple(things), backgrounds[0] if backgrounds else None, pillars == 1)


class _Found(NamedTuple):
  name: str
  end: int


class _Phrases:
  """Names of phrases, each a tuple of words without articles; the longest counts."""

  def __init__(self, table: Mapping[str, Iterable[str]]):
    self.names: dict[tuple[str, ...], str] = {}
    for name, phrases in table.items():
      for phrase in phrases:
        key = tuple(word for word in words(phrase) if word not in _ARTICLES)
        assert self.names.setdefault(key, name) == name, phrase
    self.longest = max(map(len, self.names))

  def find(self, rest: Sequence[str], at: int) -> _Found | None:
    """What stands at a place, and where it ends."""
    for length in range(self.longest, 0, -1):
      key = tuple(rest[at : at + length])
      if len(key) == length and key in self.names:
        return _Found(self.names[key], at + length)
    return None


def _thing(rest: Sequence[str], at: int) -> tuple[Thing, int] | None:
  told: dict[str, str | None] = {}
  for attribute, phrases in _PARTS.items():
    found = phrases.find(rest, at)
    told[attribute], at = found or (None, at)
    if attribute == "shape" and found is None:
      return None
  return Thing(**told | {"motion": told["motion"] or "still"}), at


_PARTS = {
  "size": _Phrases(_SIZES),
  "colour": _Phrases(_COLOURS),
  "shape": _Phrases(_SHAPES),
  "motion": _Phrases(_MOTIONS),
}
_BACKGROUND_PHRASES = _Phrases(_BACKGROUNDS)
_PILLAR_PHRASES = _Phrases({"pillar": _PILLARS})
_EXAMPLE = "a small red ball moves left while a large blue star spins, on stripes"
_TABLES = (_COLOURS, _SHAPES, _SIZES, _MOTIONS, _BACKGROUNDS, {"pillar": _PILLARS})
# All words of captions, sorted.
WORDS = tuple(
  sorted(
    {
      word
      for table in _TABLES
      for phrases in table.values()
      for phrase in (*phrases, *_ARTICLES, *_JOINTS)
      for word in words(phrase)
    }
  )
)
