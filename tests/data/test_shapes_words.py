"""Captions of the world of shapes: told, and read back."""

import dataclasses
import random
import re

import numpy as np
import pytest

from hfjax.data.rejects import DataError
from hfjax.data.shapes import Scene, Thing, draw_scene
from hfjax.data.shapes_words import WORDS, describe, read, words


@pytest.fixture(scope="module")
def told():
  """Scenes and captions, some thousands."""
  rng = np.random.default_rng(0)
  scenes = [draw_scene(rng) for _ in range(6000)]
  return [(scene, describe(scene, rng)) for scene in scenes]


def test_what_is_read_agrees_with_the_scene_wherever_it_is_told(told):
  sizes, backgrounds = [], []
  for scene, caption in told:
    found = read(caption)
    assert found.pillar == scene.pillar and found.background in (None, scene.background), caption
    by_colour = {thing.colour: thing for thing in scene.things}
    assert len(found.things) == len(by_colour), caption
    for thing in found.things:
      want = by_colour.pop(thing.colour)
      assert thing.size in (None, want.size), caption
      assert dataclasses.replace(thing, size=want.size) == want, caption
      sizes.append(thing.size)
    backgrounds.append(found.background)
  assert sizes.count(None) / len(sizes) == pytest.approx(0.2, abs=0.02)
  assert backgrounds.count(None) / len(backgrounds) == pytest.approx(0.25, abs=0.02)


def test_captions_are_short_and_of_known_words(told):
  seen = set()
  for _, caption in told:
    assert re.fullmatch(r"[a-z]+(?:-sized)?(?:,? [a-z]+(?:-sized)?)*", caption), caption
    seen.update(words(caption))
    assert 3 <= len(words(caption)) <= 32, caption
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|while.* while.* while", caption), caption
  assert seen == set(WORDS) and list(WORDS) == sorted(seen)
  assert len({caption for _, caption in told}) > 5000


def test_a_caption_depends_on_the_scene_and_the_generator_alone(told):
  scene = next(scene for scene, _ in told if len(scene.things) == 2)
  draw = lambda seed: describe(scene, np.random.default_rng(seed))
  assert draw(1) == draw(1)
  captions = [draw(seed) for seed in range(60)]
  assert len(set(captions)) > 50
  orders = {tuple(thing.colour for thing in read(caption).things) for caption in captions}
  assert len(orders) == 2


def test_case_punctuation_articles_and_spaces_do_not_matter(told):
  rng = random.Random(0)
  for _, caption in told[:500]:
    want = read(caption)
    loud = "".join(rng.choice((c.upper(), c)) for c in caption)
    assert read(f"  {loud}! ") == want
    assert read(re.sub(r"\b(a|an|the) ", "", caption)) == want
    assert read(" ".join(f"the {w}" for w in words(caption))) == want
    assert read(re.sub(r"[, ]+", lambda _: rng.choice((" ", "\n ", " , ", "; ")), caption)) == want


ball = lambda motion, size=None: Thing("red", "circle", size, motion)


@pytest.mark.parametrize(
  "caption, scene",
  [
    ("a small red circle on stripes", Scene((ball("still", "small"),), "stripes", False)),
    ("A red circle circles.", Scene((ball("circle"),), None, False)),
    ("the red ball goes round in circles", Scene((ball("circle"),), None, False)),
    ("A red disc does not move in front of stripes", Scene((ball("still"),), "stripes", False)),
    (
      "a mid-sized red ball hops up and down and a violet plus moves up",
      Scene((ball("bounce", "medium"), Thing("purple", "cross", None, "up")), None, False),
    ),
    (
      "On stripes, a huge turquoise hoop swells and shrinks while a red disc drifts to the left "
      "behind a grey pillar.",
      Scene((Thing("cyan", "ring", "large", "grow"), ball("left")), "stripes", True),
    ),
    (
      "a red ball rests, and a tiny white box turns around against a plain wall, with a grey "
      "pillar in front",
      Scene((ball("still"), Thing("white", "square", "small", "spin")), "plain", True),
    ),
    (
      "a red ball sinks while the checkered background slowly pans and a grey pillar stands in "
      "front",
      Scene((ball("down"),), "pan", True),
    ),
    ("a star pulses over a smooth gradient",
     Scene((Thing(None, "star", None, "grow"),), "gradient", False)),
    ("behind a grey pillar, on a slowly panning checkerboard, big yellow triangle orbits",
     Scene((Thing("yellow", "triangle", "large", "circle"),), "pan", True)),
    # No scene of the world, but in its words.
    ("a red circle spins", Scene((ball("spin"),), None, False)),
  ],
)  # fmt: skip
def test_captions_that_people_write(caption, scene):
  assert read(caption) == scene


@pytest.mark.parametrize(
  "name, verbs",
  [
    ("left", "moves left|slides to the left|drifts left|glides to the left"),
    ("right", "moves right|slides to the right|drifts right|glides to the right"),
    ("up", "rises|moves up|drifts upwards|glides up|climbs"),
    ("down", "sinks|falls|moves down|slides downwards"),
    ("circle", "circles|orbits|moves in circles|goes round in circles"),
    ("bounce", "bounces|bounces up and down|hops up and down"),
    ("grow", "grows and shrinks|pulses|swells and shrinks"),
    ("spin", "spins|rotates|turns around|spins around"),
    ("still", "stays still|rests|stands still|does not move"),
  ],
)
def test_verbs_mean_motions(name, verbs, told):
  captions = " ".join(caption for _, caption in told)
  for verb in verbs.split("|"):
    assert read(f"a green square {verb}").things[0].motion == name
    assert f" {verb}" in captions  # and are used


@pytest.mark.parametrize(
  "caption, sentence",
  [
    ("", "The caption is empty; write one such as 'a small red ball"),
    ("!?", "The caption is empty"),
    ("a red dog moves left", "cannot be read from 'red dog moves left' on; write as in 'a small"),
    ("a red circle moves", "cannot be read from 'moves' on"),
    ("a red circle moves left left", "cannot be read from 'left' on"),
    ("a red small circle", "cannot be read from 'red small circle' on"),
    ("a red rests", "cannot be read from 'red rests' on"),
    ("a röd circle", "cannot be read from 'röd circle' on"),
    ("on stripes", "tells of 0 things; tell of 1 or 2"),
    ("a red ball, a blue ball and a white ball", "tells of 3 things; tell of 1 or 2"),
    ("on stripes, a red ball over a gradient", "tells of 2 backgrounds; tell of 1 at most"),
    ("behind a grey pillar a star rests behind a grey pillar", "tells of 2 pillars"),
    ("a red ball rests and", "ends in 'and'; tell what comes then"),
    ("a red ball rests and while a star rests", "cannot be read from 'while star rests' on"),
    ("and a red ball rests", "cannot be read from 'and red ball rests' on"),
  ],
)
def test_what_is_outside_the_grammar_is_refused(caption, sentence):
  with pytest.raises(DataError, match=re.escape(sentence)):
    read(caption)


def test_only_complete_scenes_are_described():
  for scene, sentence in (
    (Scene((ball("left"),), "plain", False), "The size of a thing is None"),
    (Scene((ball("left", "small"),), None, False), "The background is None"),
    (Scene((ball("spin", "small"),), "plain", False), "A circle or ring spins"),
  ):
    with pytest.raises(DataError, match=sentence):
      describe(scene, np.random.default_rng(0))
