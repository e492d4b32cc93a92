"""Data that are made: always the same, and what their captions say."""

import numpy as np
import pytest

from hfjax.data.loading import batches
from hfjax.data.made import made_latents, made_prompts
from hfjax.data.rejects import DataError

SIGNS = {"to the left": (0, -1), "to the right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def test_prompts_are_plain_and_different():
  prompts = made_prompts()
  assert 24 <= len(prompts) == len(set(prompts)) <= 99
  assert prompts == made_prompts() and "a red ball moves up" in prompts


def test_clips_depend_on_seed_and_number_alone():
  a, b = made_latents(3, 6, 8, 4, 9, seed=1), made_latents(3, 6, 8, 4, 5, seed=1)
  assert len(a) == 9 and a[4]["latents"].shape == (3, 6, 8, 4)
  a[0]
  for i in range(5):
    assert a[i]["prompt"] == b[i]["prompt"]
    np.testing.assert_array_equal(a[i]["latents"], b[i]["latents"])
  assert not np.array_equal(a[4]["latents"], a[5]["latents"])
  assert not np.array_equal(a[4]["latents"], made_latents(3, 6, 8, 4, 5, seed=2)[4]["latents"])
  with pytest.raises(IndexError):
    b[5]
  with pytest.raises(DataError, match="sizes from 1"):
    made_latents(0, 6, 8, 4)
  assert next(batches(a, 3, 0))["latents"].shape == (3, 3, 6, 8, 4)


def phase(power, axis):
  """Where something lies on a circle, by the first Fourier coefficient."""
  line = power.sum(axis=1 - axis)
  return np.angle(np.sum(line * np.exp(2j * np.pi * np.arange(len(line)) / len(line))))


def test_blobs_move_as_captions_say_and_have_the_colour_they_say():
  source, colours = made_latents(4, 12, 16, 8, 40, seed=3), {}
  for i in range(40):
    example = source[i]
    words, clip = example["prompt"].split(" "), example["latents"]
    way = SIGNS[" ".join(words[4:])]
    moves = [[phase((clip[f] ** 2).sum(-1), axis) for axis in (0, 1)] for f in (0, 1)]
    change = np.angle(np.exp(1j * np.subtract(moves[1], moves[0])))
    axis = int(np.flatnonzero(way)[0])
    assert np.sign(change[axis]) == way[axis] and abs(change[axis]) > 5 * abs(change[1 - axis])
    brightest = clip[0].reshape(-1, 8)[np.argmax((clip[0] ** 2).sum(-1))]
    colours.setdefault(words[1], []).append(brightest / np.linalg.norm(brightest))
  assert set(colours) == {"red", "green", "blue", "yellow"}
  means = {k: np.mean(v, axis=0) for k, v in colours.items()}
  for name, rows in colours.items():
    for row in rows:
      assert max(means, key=lambda k: row @ means[k]) == name
