"""Clips with captions become latents; those that cannot be used are named."""

import types

import numpy as np
import pytest

from hfjax.data import videos
from hfjax.data.loading import open_source
from hfjax.data.rejects import DataError, Rejects
from hfjax.video import VideoWriter

SIZE = (32, 16)


class Means:
  """Stands for an autoencoder: mean colours of the first frame, and of each four that follow."""

  config = types.SimpleNamespace(time_factor=4, space_factor=8, z_dim=3)

  def encode(self, frames):
    x = np.asarray(frames, np.float32) / 255
    b, t, rows, columns, _ = x.shape
    x = x.reshape(b, t, rows // 8, 8, columns // 8, 8, 3).mean(axis=(3, 5))
    rest = x[:, 1:].reshape(b, -1, 4, *x.shape[2:]).mean(axis=2)
    return np.concatenate([x[:, :1], rest], axis=1)


def clip(path, colour, frames=9, size=SIZE):
  with VideoWriter(path, *size, 16) as writer:
    writer.write(np.full((frames, size[1], size[0], 3), colour, np.uint8))
  return path


@pytest.fixture
def folder(tmp_path):
  place = tmp_path / "clips"
  (place / "more").mkdir(parents=True)
  for name, colour in (("b.mp4", (250, 0, 0)), ("a.mp4", (0, 250, 0)), ("more/c.mp4", (0, 0, 250))):
    clip(place / name, colour)
    (place / name).with_suffix(".txt").write_text(f"{colour}\n shown ")
  return place


def write(out, place, clips, **options):
  given = {"frames": 9, "size": SIZE, "per_shard": 2} | options
  return videos.write(out, place, clips, Means(), **given)


def test_clips_become_latents_with_their_captions(folder, tmp_path):
  rejects = Rejects()
  clips = videos.find(folder, rejects.add)
  assert [c.file for c in clips] == ["a.mp4", "b.mp4", "more/c.mp4"]
  assert write(tmp_path / "out", folder, clips).examples == 3
  source = open_source("videos", tmp_path / "out", expect={"latents": (3, 2, 4, 3)})
  for i, channel in enumerate((1, 0, 2)):
    example = source[i]
    colour = 250 * (np.arange(3) == channel)
    assert example["prompt"] == f"{tuple(colour.tolist())} shown"
    np.testing.assert_allclose(example["latents"] - colour / 255, 0, atol=0.03)


def test_processes_and_resumption_give_the_same_bytes(folder, tmp_path, monkeypatch):
  clips = videos.find(folder, None)
  write(tmp_path / "whole", folder, clips)
  for i in (1, 0):
    write(tmp_path / "two", folder, clips, process=(i, 2))
  read, calls = videos.read_video, []

  def failing(path, *args):
    calls.append(path.name)
    if len(calls) == 2:
      raise RuntimeError("cut")
    return read(path, *args)

  monkeypatch.setattr(videos, "read_video", failing)
  with pytest.raises(RuntimeError, match="cut"):
    write(tmp_path / "cut", folder, clips)
  write(tmp_path / "cut", folder, clips)
  files = lambda name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
  assert files("two") == files("cut") == files("whole")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_may_be_in_a_file(folder, kind):
  (folder / "captions.jsonl").unlink(missing_ok=True)
  text = {"jsonl": '{"file": "b.mp4", "caption": "x"}\n{"file": "z.mp4"}\n',
          "csv": "file,caption\nb.mp4,x\nz.mp4,\n"}[kind]  # fmt: skip
  (folder / f"captions.{kind}").write_text(text)
  rejects = Rejects("skip")
  assert videos.find(folder, rejects.add) == [("b.mp4", "x")]
  assert rejects.count == 1 and "has no caption" in rejects.first[0]


def test_clips_that_cannot_be_used_are_named_and_left_out(folder, tmp_path):
  (folder / "broken.mp4").write_bytes(b"no video")
  data = clip(folder / "cut.mp4", (1, 2, 3)).read_bytes()
  (folder / "cut.mp4").write_bytes(data[: len(data) // 3])
  clip(folder / "short.mp4", (1, 2, 3), frames=5)
  (folder / "alone.gif").write_bytes(b"")
  for name in ("broken", "cut", "short"):
    (folder / f"{name}.txt").write_text(name)
  rejects = Rejects("skip")
  clips = [*videos.find(folder, rejects.add), videos.Captioned("gone.mp4", "x")]
  assert rejects.count == 1 and "alone.gif has no caption" in rejects.first[0]
  written = write(tmp_path / "out", folder, clips, on_bad="skip", per_shard=4)
  assert written.examples == 3 and written.rejects.count == 4
  told = "\n".join(written.rejects.first)
  for name in ("broken.mp4", "cut.mp4", "short.mp4 has 5 frames", "gone.mp4 is not there"):
    assert name in told
  with pytest.raises(DataError, match=r"broken.mp4 .*on_bad to skip"):
    write(tmp_path / "again", folder, clips)


@pytest.mark.parametrize(
  ("options", "sentence"),
  [
    ({"frames": 8}, "1 and a multiple of 4"),
    ({"size": (30, 16)}, "give multiples of 8"),
    ({"fps": "fast"}, "The frame rate is 'fast'"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(folder, tmp_path, options, sentence):
  with pytest.raises(ValueError, match=sentence):
    write(tmp_path / "out", folder, videos.find(folder, None), **options)
  assert not (tmp_path / "out").exists()


def test_folders_without_clips_are_refused(tmp_path):
  with pytest.raises(DataError, match="holds no clips"):
    videos.find(tmp_path, None)
  with pytest.raises(DataError, match="is no folder"):
    videos.find(tmp_path / "none", None)
