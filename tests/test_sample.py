"""The command that makes videos, on random weights."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from hfjax import pipeline, sample
from hfjax.sampling import command
from hfjax.sampling.flags import parse
from hfjax.sampling.progress import Progress, Stop
from hfjax.sampling.videos import Job, Places, write_videos
from hfjax.streaming import Stream
from hfjax.video import Preview, VideoError, VideoReader, read_video, write_image
from tests.helpers import live_bytes

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
  # The length is that of what is new: 4 frames of the clip fill one latent, which is 1 frame.
  assert len(read_video("b.mp4").frames) == 1 + 12


@pytest.mark.parametrize(
  ("args", "sentence"),
  [
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
    ([*FAST, WORDS, "--script=a.yaml"], "--script and --prompt (or --prompts_file) do not go"),
    ([*FAST, "--script=none.yaml"], "none.yaml cannot be read"),
    ([*FAST, WORDS, "--config=none.yaml"], "none.yaml cannot be read"),
    ([*FAST, WORDS, "--samples=0"], "samples"),
    ([*FAST, WORDS, "--solver=unipc"], "takes a number of steps, and got a list of 2"),
    ([*FAST, WORDS, "--guidance=-1"], "guidance"),
    ([*FAST, WORDS, "--guidance_interval=500,1000"], "and there is none; give --guidance=5"),
    ([*FAST[:3], WORDS, "--guidance=2", "--guidance_interval=900,1"], "is '900,1'; give two times"),
    ([*FAST[:3], WORDS, "--guidance=2", "--guidance_interval=a"], "is 'a'; give two times"),
    ([*FAST, WORDS, "--preset=wan", "--steps=3", "--endless"], "--endless cannot be had of"),
    ([*FAST, WORDS, "--preset=wan", "--steps=3", "--solver=few-step"], "needs a multistep solver"),
    ([*FAST, WORDS, "--seconds=inf"], "length is inf seconds"),
    ([*FAST, WORDS, "--seconds=nan"], "length is nan seconds"),
    ([*FAST, WORDS, "--seed=-1"], "seed"),
    ([*FAST, WORDS, "--seed=4294967296"], "seed"),
    ([*FAST, WORDS, "--steps="], "There are no --steps"),
    ([*FAST, WORDS, "--out=a.mkv"], "videos are MP4"),
    ([*FAST, WORDS, "--preset=wan", "--steps=3", "--sink=0"], "--window cannot be had of"),
    (["--resume=a", "--latents=b"], "--resume and --latents do not go together"),
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
    (["--log_json=no/such/log"], "--log_json=no/such/log cannot be written"),
  ],
)
def test_files_that_are_not_there(args, sentence, capsys):
  assert sentence in refused(capsys, *FAST, WORDS, *args, "--quiet", status=1)
  assert not list(Path().glob("outputs/*"))  # nor the place that was taken for the video


@pytest.mark.parametrize("flag", ["latents", "resume"])
@pytest.mark.parametrize("name", ["none.safetensors", ""])
def test_saved_things_that_are_not_there(flag, name, capsys):
  error = refused(capsys, "--weights=random:tiny", f"--{flag}={name}", status=1)
  assert f"{name or '.'} is not there" in error


def test_a_stop_before_the_first_chunk_still_gives_a_video():
  stop = Stop()
  stop.asked = True
  parse([*FAST, WORDS, "--quiet"])
  model = pipeline.load("random:tiny", "tiny", "float32")
  stream = Stream(model, "a", size=(64, 32), dtype="float32", steps=(1000,))
  made = write_videos(Job([Path("a.mp4")], "a", (64, 32), Fraction(16), None), stream, stop)
  assert made.figures["frames"] == len(read_video("a.mp4").frames) == 9
  assert made.figures["frames_per_second"] is None and made.stopped and made.surplus is None


def saved_latents(path):
  return load_file(path)["latents"]


def test_a_stopped_video_is_gone_on_with_to_the_bit(capsys, monkeypatch):
  """Latents of two parts, and of a third, are those of one video; nothing is shown twice."""
  script = (
    "- prompt: A red square, moving!\n- {at: 1.1, prompt: b, blend: 2}\n- {chunk: 5, prompt: c}"
  )
  Path("s.yaml").write_text(script)
  fast = [*FAST[:-2], "--window=6", "--steps=1000,500", "--script=s.yaml", "--latents=save"]
  assert sample.main([*fast, "--frames=80", "--out=whole.mp4", "--quiet"]) == 0
  assert not Path("whole.state.safetensors").exists()
  whole = saved_latents("whole.latents.safetensors")
  # The first part is stopped during its second chunk, as Ctrl-C would.
  real = Progress.add

  def add(self, frames):
    real(self, frames)
    if self.chunks == 1:
      signal.raise_signal(signal.SIGINT)

  monkeypatch.setattr(Progress, "add", add)
  assert sample.main([*fast, "--frames=80", "--out=part.mp4"]) == 0
  monkeypatch.setattr(Progress, "add", real)
  told = capsys.readouterr()
  assert "Stopping after this chunk" in told.err
  resume = re.search(r"python -m hfjax.sample (--resume=\S+)", told.err)[1]
  first = len(read_video("part.mp4").frames)
  assert 9 < first < 80
  assert sample.main([resume, "--frames=20", "--out=b.mp4", "--save_state"]) == 0
  left = 80 - first - 20
  assert sample.main(["--resume=b.state.safetensors", f"--frames={left}", "--quiet"]) == 0
  rest = Path("b-2.mp4")  # beside the state
  counts = [len(read_video(p).frames) for p in ("part.mp4", "b.mp4", rest)]
  assert counts == [first, 20, left]
  parts = ["part.latents.safetensors", "b.latents.safetensors", "b-2.latents.safetensors"]
  np.testing.assert_array_equal(np.concatenate([saved_latents(p) for p in parts]), whole)
  # Frames too, but for what H.264 makes of them.
  joined = np.concatenate([read_video(p).frames for p in ("part.mp4", "b.mp4", rest)])
  off = np.abs(joined.astype(int) - read_video("whole.mp4").frames)
  assert off.mean() < 4
  about = json.loads(rest.with_suffix(".json").read_text())
  assert about["resumed_from"] == "b.state.safetensors"
  capsys.readouterr()
  assert "--window would change it" in refused(capsys, resume, "--window=9")
  monkeypatch.setattr(command, "weights_hash", lambda weights: "others")
  assert "saved with other weights" in refused(capsys, resume)


def test_samples_are_videos_side_by_side(capsys):
  args = [*FAST, WORDS, "--frames=9", "--vae=tiny", "--quiet"]
  assert sample.main([*args, "--samples=2", "--seed=4", "--latents=save"]) == 0
  paths = [Path(f"outputs/a-red-square-moving-4-sample{i}.mp4") for i in range(2)]
  clips = [read_video(p).frames for p in paths]
  assert np.any(clips[0] != clips[1])
  assert all(p.with_suffix(".json").exists() for p in paths)
  # The first sample is what a single video of that seed is, whatever is beside it.
  assert sample.main([*args, "--seed=4", "--latents=save", "--out=one.mp4"]) == 0
  both = saved_latents(paths[0].with_suffix(".latents.safetensors"))
  np.testing.assert_allclose(both, saved_latents("one.latents.safetensors"), atol=1e-4)


def test_saved_latents_become_a_video_again(capsys):
  args = [*FAST, WORDS, "--vae=tiny", "--quiet", "--fps=8", "--latents=save", "--out=a.mp4"]
  assert sample.main([*args, "--frames=20"]) == 0  # the last chunk is cut
  assert sample.main(["--weights=random:tiny", "--vae=tiny", "--dtype=float32", "--quiet",
                      "--latents=a.latents.safetensors"]) == 0  # fmt: skip
  assert read_video("outputs/a.mp4").fps == 8  # as they were made
  again, first = read_video("outputs/a.mp4"), read_video("a.mp4")
  np.testing.assert_array_equal(again.frames, first.frames)
  assert json.loads(Path("outputs/a.json").read_text())["latents"] == "a.latents.safetensors"


@pytest.mark.parametrize(
  ("args", "frames"),
  [
    (["--preset=wan", "--steps=3", "--guidance=3", "--guidance_interval=500,900"], 14),
    (["--preset=wan", "--solver=dpm++", "--steps=2", "--guidance=1", "--samples=2"], 1),
    (["--preset=self_forcing", "--solver=unipc", "--steps=2", "--window=6"], 10),
    (["--preset=longlive", "--steps=2", "--sink=1", "--window=6"], 10),
  ],
)
def test_undistilled_and_dense_models(args, frames, capsys):
  args = [*FAST[:3], WORDS, *args, f"--frames={frames}", "--out=.", "--vae=tiny"]
  assert sample.main(args) == 0
  paths = sorted(Path().glob("*.mp4"))
  assert all(len(read_video(p).frames) == frames for p in paths)
  about = json.loads(paths[0].with_suffix(".json").read_text())
  preset = args[4].removeprefix("--preset=")
  asked = "--guidance_interval=500,900" in args
  assert about["config"]["guidance_interval"] == ([500, 900] if asked else [0, 1000])
  assert about["preset"] == preset and about["timings"]["frames"] == frames
  if solver := about["config"]["solver"]:  # without the tables that follow from it
    assert {*solver} == {"kind", "steps", "shift"}
  error = capsys.readouterr().err
  if preset == "wan":
    steps = 3 if frames == 14 else 2
    assert f"{steps}/{steps}" in error  # of the bar of steps
  else:
    assert about["config"]["geometry"]["variant"] == "reference_dense"
    assert about["config"]["guidance"] == (5 if preset == "self_forcing" else 1)


def test_no_file_of_the_user_is_lost(capsys):
  write_image("a.png", np.zeros((32, 64, 3), np.uint8))
  for name in ("a.json", "q.json"):
    Path(name).write_text("{}")
  args = [*FAST, WORDS, "--quiet", "--vae=tiny", "--frames=1", "--overwrite"]
  for more in (["--image=a.png", "--out=a.mp4"], ["--config=a.json", "--out=a.mp4"],
               ["--log_json=q.json", "--out=q.mp4"]):  # fmt: skip
    assert "would be lost" in refused(capsys, *args, *more)
  assert "a.json is there already" in refused(capsys, *args[:-1], "--out=a.mp4")
  assert [Path(n).read_text() for n in ("a.json", "q.json")] == ["{}", "{}"]
  # A name is taken at once, and not one beside which there is something.
  Path("outputs").mkdir()
  Path("outputs/a-red-square-moving-0.state.safetensors").write_text("old")
  parse([])
  with Places() as one, Places() as two:
    assert one.choose(["a-red-square-moving-0"])[0].stem == "a-red-square-moving-0-2"
    assert two.choose(["a-red-square-moving-0"])[0].stem == "a-red-square-moving-0-3"
  assert not list(Path("outputs").glob("*.mp4"))


def test_names_of_wide_letters_fit(capsys):
  args = [*FAST, f"--prompt={'𠀀' * 70}", "--frames=1", "--vae=tiny", "--save_state"]
  assert sample.main([*args, "--latents=save"]) == 0
  assert len(list(Path("outputs").iterdir())) == 4


def test_what_lies_beside_fails_last(capsys, monkeypatch):
  """Neither state nor description is lost for a preview that cannot be written."""

  def fail(self, *args):
    raise VideoError("The picture cannot be written.")

  monkeypatch.setattr(Preview, "write", fail)
  args = [*FAST, WORDS, "--frames=9", "--vae=tiny", "--preview", "--save_state", "--out=a.mp4"]
  assert sample.main(args) == 1
  assert "The picture cannot be written" in capsys.readouterr().err
  assert json.loads(Path("a.json").read_text())["timings"]["frames"] == 9
  assert Path("a.state.safetensors").exists()


def test_latents_of_a_later_part_are_not_decoded_alone(capsys):
  args = [*FAST, WORDS, "--frames=9", "--vae=tiny", "--quiet", "--latents=save", "--save_state"]
  assert sample.main([*args, "--out=a.mp4"]) == 0
  assert sample.main(["--resume=a.state.safetensors", "--frames=12", "--quiet"]) == 0
  weights = ["--weights=random:tiny", "--vae=tiny"]
  error = refused(capsys, *weights, "--latents=a-2.latents.safetensors")
  assert "begins in the middle of a stream" in error
  error = refused(capsys, *weights, "--latents=a.latents.safetensors", "--seed=3")
  assert "--seed changes nothing of latents" in error
  assert "went on with a stream" in refused(capsys, "--config=a-2.json")


def test_of_a_run_of_many_each_description_makes_its_own_video():
  args = [*FAST, "--prompt=a", "--prompt=b", "--frames=1", "--vae=tiny", "--quiet"]
  assert sample.main([*args, "--seed=3", "--seed=4", "--latents=save"]) == 0
  given = json.loads(Path("outputs/b-3.json").read_text())["flags"]
  assert given["prompt"] == ["b"] and given["seed"] == [3]
  with safe_open("outputs/b-3.latents.safetensors", "numpy") as file:
    assert file.metadata()["prompt"] == "b"


def test_stopping_is_told_even_if_quiet(capsys, monkeypatch):
  real = Progress.add

  def add(self, frames):
    real(self, frames)
    signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(Progress, "add", add)
  args = [*FAST, "--prompt=a", "--prompt=b", "--frames=80", "--vae=tiny", "--quiet"]
  assert sample.main(args) == 130  # the second signal, at the next chunk
  assert "sample: stopped; what was written plays" in capsys.readouterr().err
  done = []

  def once(self, frames):
    real(self, frames)
    if not done:
      done.append(signal.raise_signal(signal.SIGTERM))

  monkeypatch.setattr(Progress, "add", once)
  assert sample.main(args) == 0
  error = capsys.readouterr().err
  assert "--resume=outputs/a-0-2.state.safetensors" in error
  assert "1 of 2 videos were not begun" in error


def test_a_signal_before_there_is_anything_stops_at_once(capsys, monkeypatch):
  monkeypatch.setattr(pipeline, "load", lambda *x: signal.raise_signal(signal.SIGTERM))
  assert sample.main([*FAST, WORDS]) == 130
  assert "sample: stopped; nothing was made." in capsys.readouterr().err


def test_a_file_of_settings_makes_the_same_video_again():
  assert sample.main([*FAST, WORDS, "--frames=9", "--seed=5", "--quiet", "--vae=tiny"]) == 0
  first = Path("outputs/a-red-square-moving-5.mp4")
  assert sample.main([f"--config={first.with_suffix('.json')}", "--out=b.mp4", "--quiet"]) == 0
  np.testing.assert_array_equal(read_video("b.mp4").frames, read_video(first).frames)
  about = json.loads(first.with_suffix(".json").read_text())
  assert about["weights_sha256"] is None and about["versions"]["jax"]
  assert about["timings"]["frames_per_second"] is None  # of one chunk there is no speed


def test_a_disk_that_is_full_ends_the_video_and_keeps_what_is_there(tmp_path):
  code = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    "from hfjax import sample; sys.exit(sample.main(sys.argv[1:]))"
  )
  command = [sys.executable, "-c", code, *FAST, WORDS, "--endless", "--out=a.mp4", "--vae=tiny"]
  # Compiled programs would not be written whole either, and other processes would find them.
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"}
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
  assert done.returncode == 1 and "Traceback" not in done.stderr
  sentence = done.stderr.strip().splitlines()[-1]
  kept = int(re.search(r"a.mp4 cannot be written. The (\d+) frames before are kept", sentence)[1])
  assert len(read_video(tmp_path / "a.mp4").frames) == kept > 9


@pytest.mark.slow
def test_memory_is_constant_over_three_hundred_chunks():
  rows = []
  real = Progress.add

  def add(self, frames):
    real(self, frames)
    if self.chunks % 50 == 0:
      resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
      rows.append((resident, *live_bytes()))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Progress, "add", add)
    args = [*FAST, WORDS, "--frames=3597", "--preview", "--latents=save", "--vae=tiny", "--quiet"]
    assert sample.main([*args, "--out=a.mp4"]) == 0
  assert len(rows) == 6
  resident, live, arrays = (np.array(x) for x in zip(*rows, strict=True))
  # At the last chunk none is ahead.
  assert np.all(live[1:-1] == live[1]) and np.all(arrays[1:-1] == arrays[1])
  assert resident[-1] - resident[1] < 2**25  # 200 chunks of frames and latents would be 29 MB
  frames = 0
  with VideoReader("a.mp4", (64, 32), 16) as video:
    for _ in video:
      frames += 1
  assert frames == 3597


def test_a_prompt_that_is_too_long_is_cut_and_that_is_said(capsys):
  words = " ".join(f"word{i}" for i in range(20))
  args = [*FAST, "--vae=tiny", "--frames=1", "--out=."]
  assert sample.main([*args, f"--prompt={words}"]) == 0
  assert "its last 4 tokens are left out" in capsys.readouterr().out
  assert sample.main([*args, f"--prompt={words.rsplit(' ', 4)[0]}"]) == 0
  assert "left out" not in capsys.readouterr().out


def test_a_device_that_is_full_is_a_sentence(capsys, monkeypatch):
  def full(*args):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

  monkeypatch.setattr(pipeline, "load", full)
  assert "take a smaller --size or --window" in refused(capsys, *FAST, WORDS, status=1)
  assert sample.main([*FAST, WORDS, "--debug"]) == 1
  assert "Traceback" in capsys.readouterr().err


def test_help_names_the_flags(capsys):
  assert sample.main(["--help"]) == 0
  text = capsys.readouterr().out
  assert "--weights" in text and "Ctrl-C" in text and "--sparsity" in text


@pytest.mark.parametrize(
  "how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL]
)
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
