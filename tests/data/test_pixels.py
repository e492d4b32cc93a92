"""Examples of pixels become latents: in batches, by several threads, and gone on with."""

import itertools

import encode_videos
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax import pipeline
from hfjax.data import command, made, shapes, videos
from hfjax.data.loading import open_source
from hfjax.data.made import MadeClips
from hfjax.data.rejects import DataError
from tests.data.test_videos import Means

CLIPS = MadeClips(9, 16, 24, 3, count=7, seed=2)
LATENTS = (3, 2, 3, 3)


def write(out, source=CLIPS, autoencoder=None, **options):
  given = {"batch": 3, "per_shard": 4, "model": "means"} | options
  return videos.write_pixels(out, source, autoencoder or Means(), **given)


def files(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_latents_are_those_of_the_autoencoder(tmp_path):
  """Each clip by itself, whatever batch it was in."""
  seen = []

  class Spy(Means):
    def encode(self, frames):
      assert frames.dtype == jnp.uint8
      seen.append(len(frames))
      return super().encode(frames)

  written = write(tmp_path / "out", autoencoder=Spy())
  assert (written.examples, written.missing) == (7, 0)
  assert set(seen) == {3}  # so that one program serves all
  source = open_source("videos", tmp_path / "out", expect={"latents": LATENTS})
  assert len(source) == 7 and source.dtypes == {"latents": "float16"}
  for i in range(7):
    want = Means().encode(CLIPS[i]["video"][None])[0].astype(np.float16)
    assert source[i]["prompt"] == CLIPS[i]["prompt"]
    np.testing.assert_array_equal(source[i]["latents"], want)


def test_what_is_cut_is_gone_on_with(tmp_path):
  write(tmp_path / "whole")
  for i in (1, 0):
    write(tmp_path / "two", process=(i, 2))
  calls = []

  class Cut(Means):
    def encode(self, frames):
      calls.append(len(frames))
      if len(calls) == 3:  # the first batch of the second file
        raise RuntimeError("cut")
      return super().encode(frames)

  with pytest.raises(RuntimeError, match="cut"):
    write(tmp_path / "cut", autoencoder=Cut())
  assert len([*(tmp_path / "cut").glob("videos*")]) == 1
  calls[:] = [0] * 9
  assert write(tmp_path / "cut", autoencoder=Cut()).examples == 7
  assert len(calls) == 10  # a second file is three clips, one batch
  assert files(tmp_path / "two") == files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.slow
def test_threads_that_read_give_the_same_bytes(tmp_path):
  for workers in (0, 2):
    write(tmp_path / str(workers), workers=workers)
  assert files(tmp_path / "0") == files(tmp_path / "2")


def test_another_source_or_network_does_not_go_on_with_it(tmp_path):
  write(tmp_path / "out")
  with pytest.raises(DataError, match="model is 'means' and not 'others'"):
    write(tmp_path / "out", model="others")
  others = MadeClips(9, 16, 24, 3, count=7, seed=3)
  with pytest.raises(DataError, match="begun with other settings: clips is"):
    write(tmp_path / "out", others)


@pytest.mark.parametrize(
  ("shape", "sentence"),
  [
    ((8, 16, 24, 3), "8 frames of 24x16 are asked for; give 1 and a multiple of 4 frames, and mul"),
    ((9, 12, 24, 3), "9 frames of 24x12 are asked for; .* and multiples of 8 pixels"),
    ((9, 16, 20, 3), "9 frames of 20x16"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, shape, sentence):
  with pytest.raises(DataError, match=sentence):
    write(tmp_path / "out", MadeClips(*shape, count=2, seed=0))
  assert not (tmp_path / "out").exists()


# The tool


@pytest.fixture
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(command.signal, "signal", lambda *args: None)
  means = lambda *args: Means()
  Means.params = {"x": jnp.ones(3)}
  monkeypatch.setattr(pipeline, "load_autoencoder", means)
  yield tmp_path
  del Means.params


def test_the_tool_encodes_the_world_of_shapes(here, capsys):
  args = ["--weights", "random:tiny", "--shapes", "3", "--frames", "5", "--out", "v", "--quiet"]
  args += ["--split", "held_out", "--seed", "4", "--batch", "2"]
  assert encode_videos.main(args) == 0
  assert "Wrote v: 3 examples." in capsys.readouterr().out
  clips, source = shapes.Shapes("held_out", 3, 4, 5), open_source("videos", "v")
  for i in range(3):
    assert source[i]["prompt"] == clips[i]["prompt"]
    want = Means().encode(clips[i]["video"][None])[0].astype(np.float16)
    np.testing.assert_array_equal(source[i]["latents"], want)


@pytest.mark.parametrize(
  ("args", "sentence"),
  [
    ([], "Give either --clips DIR or --shapes N."),
    (["--shapes", "2", "--clips", "."], "Give either --clips DIR or --shapes N."),
    (["--shapes", "2", "--frames", "6"], "6 frames of 128x128 are asked for; give 1 and a mult"),
    (["--shapes", "0"], "0 clips of 81 frames"),
    (["--shapes", "2", "--seed", "-1"], "seeds from 0 on"),
    (["--shapes", "2", "--batch", "0"], "give at least 1 clip"),
    (["--shapes", "2", "--workers", "-1"], "0 or more threads"),
  ],
)
def test_what_cannot_be_is_said_in_a_sentence(here, capsys, args, sentence):
  assert encode_videos.main(["--weights", "w", "--out", "v", "--quiet", *args]) == 2
  told = capsys.readouterr().err
  assert told.startswith("encode_videos: ") and sentence in told and "Traceback" not in told
  assert not (here / "v").exists()


# Clips that are made


def test_clips_depend_on_seed_and_number_alone():
  a, b = CLIPS, MadeClips(9, 16, 24, 3, count=3, seed=2)
  assert (len(a), len(b)) == (7, 3) and a[6]["video"].shape == (9, 16, 24, 3)
  for i in range(3):
    assert a[i]["prompt"] == b[i]["prompt"] and a[i]["video"].dtype == np.uint8
    np.testing.assert_array_equal(a[i]["video"], b[i]["video"])
  assert np.any(a[0]["video"] != a[1]["video"])
  assert np.any(a[0]["video"] != MadeClips(9, 16, 24, 3, count=3, seed=1)[0]["video"])
  for number in (-1, 7):
    with pytest.raises(IndexError):
      a[number]
  for shape in ((0, 16, 24, 3), (16, 24, 3)):
    with pytest.raises(DataError, match="give four sizes from 1 on"):
      MadeClips(*shape, count=1, seed=0)


@pytest.mark.parametrize("number", range(7))
def test_squares_move_as_captions_say(number):
  example = CLIPS[number]
  way = made._WAYS[example["prompt"].removeprefix("a square moves ")]
  clip = example["video"].astype(int)
  assert len(np.unique(clip[0].reshape(-1, 3), axis=0)) == 2
  for before, after in itertools.pairwise(clip):
    np.testing.assert_array_equal(np.roll(before, way, axis=(0, 1)), after)
