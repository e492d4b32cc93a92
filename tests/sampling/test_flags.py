"""Flags from the command line, and from files."""

import json
from pathlib import Path

import pytest

from hfjax.sampling import flags
from hfjax.sampling.flags import FLAGS, UsageError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def test_a_file_holds_any_flags_and_the_command_line_goes_before_it():
  Path("night.yaml").write_text(
    "size: 64x32\nprompt: [a, b]\nsteps: [1000, 500]\nendless: true\nseed: 3\nguidance: 2.5\n"
    "guidance_interval: [500, 1000.0]\n"
    "image:\n"
  )
  flags.parse(["--config=night.yaml", "--size=96x64"])
  assert FLAGS.size == "96x64" and FLAGS.prompt == ["a", "b"] and FLAGS.seed == [3]
  assert FLAGS.steps == ["1000", "500"] and FLAGS.endless and FLAGS.guidance == 2.5
  assert FLAGS.guidance_interval == ["500", "1000.0"]
  saved = {name: flags.set_flags()[name] for name in ("steps", "guidance_interval")}
  flags.parse([])
  flags.fill(saved, "a.json")  # as a saved stream, or the file beside a video, has them
  assert flags.set_flags() == saved and FLAGS.guidance_interval == ["500", "1000.0"]
  flags.parse(["--config=night.yaml", "--size=96x64"])
  assert FLAGS.image is None and FLAGS.window is None
  flags.parse(["--config=night.yaml", "--prompt=c", "--noendless"])
  assert FLAGS.prompt == ["c"] and not FLAGS.endless
  Path("long.yaml").write_text("frames: 30.0\nsamples: 2")
  flags.parse(["--config=long.yaml"])
  assert FLAGS.frames == 30
  flags.parse(["--config=long.yaml", "--seconds=1"])  # the length of the command line goes before
  assert FLAGS.frames is None and FLAGS.samples == 2
  flags.parse([])
  assert FLAGS.prompt == [] and FLAGS.config is None and flags.set_flags() == {}


def test_the_file_beside_a_video_makes_it_again():
  about = {"prompt": "x", "flags": {"prompt": ["x"], "window": 6, "out": "a.mp4", "quiet": True}}
  Path("a.json").write_text(json.dumps(about))
  flags.parse(["--config=a.json"])
  assert FLAGS.prompt == ["x"] and FLAGS.window == 6
  assert FLAGS.out is None and not FLAGS.quiet  # where to, and how loud, are of that run


def test_a_saved_stream_fills_what_neither_command_line_nor_file_say():
  Path("c.yaml").write_text("preview: true")
  flags.parse(["--config=c.yaml", "--out=b.mp4"])
  flags.fill({"weights": "w", "preview": False, "out": "a.mp4"}, "a.state.safetensors")
  assert FLAGS.weights == "w" and FLAGS.preview and FLAGS.out == "b.mp4"


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    ("sise: 64x32", "c.yaml has 'sise', which is no flag; size is one"),
    ("size: 64x32\nprompt: [a", "c.yaml, line 2, is no YAML"),
    ("- a", "c.yaml holds no settings"),
    ("prompt: {a: b}", "'prompt' is nested"),
    ("prompt: [[a]]", "'prompt' is nested"),
    ("prompt: yes", "'prompt' is True; put it in quotes"),
    ("size: [64x32, 32x32]", "2 values of 'size'; give one"),
    ("prompt: 2026-13-45", "c.yaml cannot be read"),
    ("resumed_from: a", "went on with a stream"),
    ("window: wide", "c.yaml: flag --window=wide"),
    ("vae: huge", "c.yaml: flag --vae=huge"),
  ],
)
def test_files_that_make_no_sense(text, sentence):
  Path("c.yaml").write_text(text)
  with pytest.raises(UsageError) as e:
    flags.parse(["--config=c.yaml"])
  assert sentence in str(e.value)


def test_files_that_cannot_be_read():
  Path("c.json").write_text('{"size": \n "64x32",}')
  Path("b.yaml").write_bytes(b"\xff\xfe\x00size")
  for name, sentence in (
    ("none.yaml", "none.yaml cannot be read"),
    ("c.json", "c.json, line 2, is no JSON"),
    ("b.yaml", "b.yaml is no UTF-8 text"),
  ):
    with pytest.raises(UsageError, match=sentence):
      flags.parse([f"--config={name}"])
