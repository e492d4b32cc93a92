"""The command that makes videos, on random weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hfjax import sample
from hfjax.video import read_video, write_image

ROOT = Path(__file__).resolve().parents[1]
FAST = [
  "--weights=random:tiny",
  "--size=64x32",
  "--dtype=float32",
  "--window=6",
  "--steps=1000,500",
]
WORDS = "--prompt=A red square, moving!"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def refused(capsys, *args, status=2):
  """Sentence of a command that must fail."""
  assert sample.main([*args]) == status
  error = capsys.readouterr().err
  assert error.startswith("sample: ") and len(error.strip().splitlines()) == 1, error
  return error


def test_prompts_and_seeds_become_videos(capsys):
  args = [*FAST, WORDS, "--fps=24", "--preview", "--log_json=log.jsonl", "--quiet"]
  assert sample.main([*args, "--frames=22", "--seed=1", "--seed=2"]) == 0
  paths = [Path(f"outputs/a-red-square-moving-{seed}.mp4") for seed in (1, 2)]
  clips = [read_video(path) for path in paths]
  assert all(clip.frames.shape == (22, 32, 64, 3) and clip.fps == 24 for clip in clips)
  assert np.any(clips[0].frames != clips[1].frames)
  about = json.loads(paths[1].with_suffix(".json").read_text())
  assert about["prompt"] == "A red square, moving!" and about["seed"] == 2
  assert about["timings"]["frames"] == 22 and about["config"]["geometry"]["window"] == 6
  assert about["config"]["geometry"]["ratio"] == 0.2
  rows = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
  assert [row["frames"] for row in rows] == [9, 21, 22] * 2
  for ending in (".png", ".gif"):
    assert paths[0].with_suffix(ending).stat().st_size > 100
  assert capsys.readouterr() == ("", "")
  # The same again is the same video, and nothing is lost.
  assert sample.main([*args, "--frames=9", "--seed=1"]) == 0
  again = read_video("outputs/a-red-square-moving-1-2.mp4").frames
  np.testing.assert_array_equal(again, clips[0].frames[:9])


def test_an_image_begins_a_video_which_another_goes_on_from(capsys):
  picture = np.full((40, 90, 3), (200, 40, 40), np.uint8)
  write_image("square.png", picture)
  args = [*FAST, WORDS, "--out=a.mp4", "--seconds=0.5", "--vae=tiny"]
  assert sample.main([*args, "--image=square.png"]) == 0
  assert len(read_video("a.mp4").frames) == 8
  assert "a.mp4: 8 frames, 0.50 s; first chunk after" in capsys.readouterr().out
  assert "a.mp4 is there already" in refused(capsys, *args)
  args[-3:-1] = ["--out=b.mp4", "--frames=12"]
  assert sample.main([*args, "--video=a.mp4", "--fps=8"]) == 0
  assert "resampled from 16 to 8 frames per second" in capsys.readouterr().out
  assert len(read_video("b.mp4").frames) == 12


@pytest.mark.parametrize(
  ("args", "sentence"),
  [
    ([WORDS], "There are no weights in this package yet: give --weights=DIR"),
    ([*FAST], "There is no prompt"),
    ([*FAST, "--prompt= "], "A prompt is empty"),
    ([*FAST, WORDS, "--prompts_file=none.txt"], "none.txt cannot be read"),
    ([*FAST, WORDS, "--size=65x32"], "The nearest is 64 x 32"),
    ([*FAST, WORDS, "--size=big"], "The size is 'big'"),
    ([*FAST, WORDS, "--fps=0"], "The frame rate is '0'"),
    ([*FAST, WORDS, "--fps=a"], "The frame rate is 'a'"),
    ([*FAST, WORDS, "--frames=0"], "frames"),
    ([*FAST, WORDS, "--frames=3", "--seconds=1"], "given by --seconds and --frames; choose one"),
    ([*FAST, WORDS, "--endless", "--seed=1", "--seed=2"], "2 videos without end"),
    ([*FAST, WORDS, "--window=2"], "cannot hold the sink"),
    ([*FAST, WORDS, "--steps=a"], "The steps are ['a']"),
    ([*FAST, WORDS, "--steps=1,2"], "do not descend"),
    ([*FAST, WORDS, "--sparsity=1.5"], "sparsity"),
    ([*FAST, WORDS, "--speed=9"], "Unknown command line flag 'speed'"),
    ([*FAST, WORDS, "loose"], "'loose' is no flag"),
    ([*FAST, WORDS, "--image=a.png", "--video=a.mp4"], "begin with one of them"),
    ([*FAST, WORDS, "--out=a.mp4", "--seed=1", "--seed=2"], "--out is one file; give a folder"),
    ([*FAST, WORDS, "--out=/proc/none/a.mp4"], "/proc/none cannot be made"),
  ],
)
def test_commands_that_make_no_sense(args, sentence, capsys):
  assert sentence in refused(capsys, *args)
  assert not list(Path().glob("**/*.mp4"))


@pytest.mark.parametrize(
  ("args", "sentence"),
  [
    (["--weights=random:huge"], "no model 'huge'"),
    (["--weights=no/such/thing"], "neither a file or folder here"),
    (["--image=none.png"], "none.png is not there"),
    (["--video=none.mp4"], "none.mp4 is not there"),
  ],
)
def test_files_that_are_not_there(args, sentence, capsys):
  assert sentence in refused(capsys, *FAST, WORDS, *args, status=1)


def test_a_stop_before_the_first_chunk_still_gives_a_video():
  stop = sample.Stop()
  stop.asked = True
  sample.FLAGS(["sample", *FAST, WORDS, "--quiet"])
  model = sample.pipeline.load("random:tiny", "tiny", "float32")
  stream = sample.Stream(model, "a", size=(64, 32), dtype="float32", steps=(1000,))
  path = Path("a.mp4")
  figures = sample.write_video(path, stream, None, None, sample.Fraction(16), stop)
  assert figures["frames"] == len(read_video(path).frames) == 9
  assert figures["frames_per_second"] is None


def test_help_names_the_flags(capsys):
  assert sample.main(["--help"]) == 0
  text = capsys.readouterr().out
  assert "--weights" in text and "Ctrl-C" in text and "--sparsity" in text


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_stopped_leaves_a_video_that_plays(how, tmp_path):
  command = [
    sys.executable,
    "-m",
    "hfjax.sample",
    *FAST,
    WORDS,
    "--endless",
    "--out=a.mp4",
    "--vae=tiny",
  ]
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  process = subprocess.Popen(
    [*command, "--log_json=log"], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
  )
  log = tmp_path / "log"
  for _ in range(3000):  # on a busy machine, compilation takes minutes
    if log.exists() and len(log.read_text().splitlines()) >= 3:
      break
    time.sleep(0.1)
  process.send_signal(how)
  _, error = process.communicate(timeout=120)
  frames = read_video(tmp_path / "a.mp4").frames
  written = json.loads(log.read_text().splitlines()[-1])["frames"]
  assert len(frames) >= written >= 33
  if how == signal.SIGKILL:
    assert process.returncode == -how
  else:
    assert process.returncode == 0 and "Stopping after this chunk" in error
    assert json.loads((tmp_path / "a.json").read_text())["timings"]["frames"] == len(frames)
