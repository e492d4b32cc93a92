"""Figures of training: what is written, kept when a run goes on, and seen."""

import io
import json
import math
import os
import resource
import signal
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from hfjax.training import metrics as module
from hfjax.training.metrics import Metrics, MetricsError
from hfjax.training.progress import Progress


def rows(folder):
  """All lines; what is no strict JSON raises."""
  refuse = lambda word: pytest.fail(f"{word} is no JSON")
  text = (folder / "metrics.jsonl").read_text()
  assert text == "" or text.endswith("\n")
  return [json.loads(x, parse_constant=refuse) for x in text.splitlines()]


def events(folder):
  """Events of all files of TensorBoard in order, from the format of records."""
  found = []
  for path in sorted((folder / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      assert len(data) >= length + 16
      found.append(Event.FromString(data[12 : 12 + length]))
      data = data[length + 16 :]
  return found


def full(limit):
  """The file size limit that stands for a full disk; SIGXFSZ must be ignored."""
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


@pytest.fixture
def limits():
  before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield soft
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  signal.signal(signal.SIGXFSZ, before)


def test_lines_and_tensorboard_hold_the_same(tmp_path):
  with Metrics(tmp_path / "w" / "x") as metrics:
    metrics.write(0, {"loss": 0.5, "rate": np.float32(0.25), "n": jnp.int32(3)})
    metrics.write(5, {"loss": math.nan, "up": math.inf, "down": -math.inf})
    found = rows(tmp_path / "w" / "x")  # there at once, should the process be killed
    board = events(tmp_path / "w" / "x")
  assert found[0] == {"step": 0, "time": found[0]["time"], "loss": 0.5, "rate": 0.25, "n": 3.0}
  assert found[1] == {
    "step": 5, "time": found[1]["time"], "loss": "nan", "up": "inf", "down": "-inf",
  }  # fmt: skip
  assert [float(found[1][x]) for x in ("up", "down")] == [math.inf, -math.inf]
  assert board[0].file_version == "brain.Event:2"
  scalars = [(e.step, v.tag, v.simple_value) for e in board for v in e.summary.value]
  assert scalars[:3] == [(0, "loss", 0.5), (0, "rate", 0.25), (0, "n", 3.0)]
  assert scalars[3][:2] == (5, "loss") and math.isnan(scalars[3][2])
  assert abs(board[1].wall_time - found[0]["time"]) < 60


def test_images(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
  with Metrics(tmp_path) as metrics:
    metrics.image(7, "videos/a", pixels)
    for wrong in (pixels[0], pixels[..., :1], pixels / 255.0):
      with pytest.raises(ValueError, match=r"'a' is .*; give uint8 \[rows, columns, 3\]"):
        metrics.image(7, "a", wrong)
  (value,) = events(tmp_path)[1].summary.value
  decoded = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)).convert("RGB"))
  np.testing.assert_array_equal(decoded, pixels)
  assert value.tag == "videos/a" and not (tmp_path / "metrics.jsonl").exists()


def test_a_resumed_run_has_no_step_twice(tmp_path):
  with Metrics(tmp_path) as metrics:
    for step in (1, 2, 2, 3, 4, 5):
      metrics.write(step, {"loss": step})
  path = tmp_path / "metrics.jsonl"
  with path.open("ab") as f:
    f.write(b'[1]\n\0\0\0\n{"time": 3}\n{"step": 1, "ti')  # the power went
  with Metrics(tmp_path) as metrics:
    metrics.resume(3)
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 2, 3]
    for step in (4, 5):
      metrics.write(step, {"loss": 10 * step})
  assert [r["loss"] for r in rows(tmp_path)] == [1, 2, 2, 3, 40, 50]
  # TensorBoard is told to forget steps 4 and 5 of the first run, after these and before the new.
  found = events(tmp_path)
  starts = [i for i, e in enumerate(found) if e.session_log.status == SessionLog.START]
  assert [found[i].step for i in starts] == [4]
  tail = [v.simple_value for e in found[starts[0] :] for v in e.summary.value]
  assert tail == [40, 50]
  assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]
  with Metrics(tmp_path / "new") as metrics:
    metrics.resume(0)  # nothing to forget


def test_a_full_disk_is_told_of_once_and_lines_are_written_later(tmp_path, limits, monkeypatch):
  monkeypatch.setattr(module, "_RETRY_S", 0.0)
  said, path = [], tmp_path / "metrics.jsonl"
  with Metrics(tmp_path, say=said.append) as metrics:
    metrics.write(1, {"loss": 1.0})
    size = path.stat().st_size
    full(size + 20)
    for step in (2, 3, 4):
      metrics.write(step, {"loss": 1.0})
      assert path.stat().st_size == size  # no half line
    full(limits)
    metrics.write(5, {"loss": 1.0})
  assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3, 4, 5]
  assert sorted(said) == [
    f"{path} cannot be written (File too large); training goes on.",
    f"{tmp_path / 'tensorboard'} (TensorBoard) cannot be written (File too large); training goes "
    "on.",
  ]
  first, _ = sorted((tmp_path / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns)
  first.unlink()  # TensorBoard goes on in another file
  assert [e.step for e in events(tmp_path) if e.summary.value] == [5]


def test_steps_are_forgotten_also_if_that_fails_at_first(tmp_path, limits):
  path, said = tmp_path / "metrics.jsonl", []
  with Metrics(tmp_path, False) as metrics:
    for step in range(1, 7):
      metrics.write(step, {"loss": step})
  size = path.stat().st_size
  with Metrics(tmp_path, False, say=said.append) as metrics:
    full(100)
    metrics.resume(4)
    metrics.write(5, {"loss": 50})
    metrics.write(6, {"loss": 60})
    metrics.resume(5)  # of what waits, too
    assert path.stat().st_size == size and os.listdir(tmp_path) == ["metrics.jsonl"]
    full(limits)
    metrics.write(7, {"loss": 70})
  assert [r["loss"] for r in rows(tmp_path)] == [1, 2, 3, 4, 5, 50, 70] and len(said) == 1


def test_half_a_line_goes_without_being_asked(tmp_path):
  (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "ti')
  with Metrics(tmp_path, False) as metrics:
    metrics.write(2, {"loss": 1.0})
  assert [r["step"] for r in rows(tmp_path)] == [1, 2]


def test_a_folder_that_cannot_be_made_does_not_stop_training(tmp_path):
  (tmp_path / "file").touch()
  said = []
  with Metrics(tmp_path / "file" / "w", say=said.append) as metrics:
    metrics.resume(3)
    metrics.write(4, {"loss": 1.0})
    metrics.image(4, "a", np.zeros((2, 2, 3), np.uint8))
  assert len(said) == 2 and all("Not a directory" in words for words in said)


def test_names_that_lines_have_already(tmp_path):
  with Metrics(tmp_path) as metrics, pytest.raises(ValueError, match="'time', as each line says"):
    metrics.write(1, {"time": 3.0})


def test_processes_that_do_not_write(tmp_path):
  with Metrics(tmp_path / "w", wandb="x", active=False) as metrics:
    metrics.write(1, {"loss": 1.0})
    metrics.image(1, "a", np.zeros((2, 2, 3), np.uint8))
    metrics.resume(1)
  assert not (tmp_path / "w").exists()


def test_weights_and_biases(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(MetricsError, match="wandb is not installed"):
    Metrics(tmp_path, wandb="project")
  calls = []

  class Run:
    def log(self, values, step):
      calls.append((step, values))
      if step == 2:
        raise RuntimeError("the network\nis gone")

    def finish(self):
      calls.append("finished")

  def init(**kw):
    if kw["project"] == "bad":
      raise RuntimeError("no key")
    calls.append(kw)
    return Run()

  fake = types.SimpleNamespace(init=init, Image=lambda x: ("image", x.shape))
  monkeypatch.setitem(sys.modules, "wandb", fake)
  said = []
  for _ in range(2):
    with Metrics(tmp_path, False, "project", {"seed": 1}, said.append) as metrics:
      metrics.write(1, {"loss": 0.5})
      metrics.write(2, {"loss": 0.5})
      metrics.image(3, "a", np.zeros((4, 2, 3), np.uint8))
  assert calls[0] == calls[5]  # the same run
  assert calls[0]["project"] == "project" and calls[0]["config"] == {"seed": 1}
  assert calls[1:5] == [
    (1, {"loss": 0.5}), (2, {"loss": 0.5}), (3, {"a": ("image", (4, 2, 3))}), "finished",
  ]  # fmt: skip
  assert said == ["Weights & Biases cannot be written (the network is gone); training goes on."] * 2
  with pytest.raises(MetricsError, match=r"does not start \(no key\)"):
    Metrics(tmp_path, wandb="bad")


class Terminal(io.StringIO):
  def isatty(self):
    return True


def progress(seconds, stream, **kw):
  """Progress whose clock is set by the test: seconds is a list of one number."""
  return Progress(stream=stream, clock=lambda: seconds[0], **kw)


def test_speed_is_that_of_steps_without_compiling_or_pauses():
  now, out = [0.0], io.StringIO()
  with progress(now, out, total=100, samples=8, warmup=3) as line:
    for step, seconds in ((1, 60.0), (2, 30.0), (3, 20.0)):
      now[0] += seconds
      line.update(step, {"loss": 1.0})
      assert line.steps_per_s is None and line.figures() == {}
    for step in (4, 5, 6):
      now[0] += 0.5
      line.update(step, {"loss": 1.0})
      assert line.steps_per_s == pytest.approx(2)
    with line.paused():
      now[0] += 1000
    now[0] += 0.5
    line.update(7, {"loss": 0.123456, "critic": math.nan})
    assert line.figures() == pytest.approx(
      {"step_seconds": 0.5, "steps_per_second": 2, "samples_per_second": 16}
    )
  last = out.getvalue().splitlines()[-1]
  assert last == "step 7/100, loss 0.1235, critic nan, 2 steps/s, 16 samples/s, 00:46 left"


def test_speed_is_that_of_the_last_steps():
  now = [0.0]
  line = progress(now, io.StringIO(), total=1000)
  for step in range(1, 201):
    now[0] += 10.0
    line.update(step, {})
  for step in range(201, 401):
    now[0] += 0.1
    line.update(step, {})
  assert line.steps_per_s == pytest.approx(10)


def test_where_there_is_no_terminal_a_line_comes_now_and_then():
  now, out = [0.0], io.StringIO()
  with progress(now, out, total=500, initial=100, every_s=30.0) as line:
    for step in range(101, 200):
      now[0] += 1.0
      line.update(step, {"loss": 1.0})
    line.say("A sentence.")
  lines = out.getvalue().splitlines()
  assert "\r" not in out.getvalue()
  steps = [x.split(",")[0] for x in lines]
  assert steps == [
    "step 101/500", "step 131/500", "step 161/500", "step 191/500", "A sentence.", "step 199/500",
  ]  # fmt: skip


def test_on_a_terminal_one_line_moves():
  now, out = [0.0], Terminal()
  with progress(now, out, total=10, initial=4) as line:
    for step in range(5, 11):
      now[0] += 1.0
      line.update(step, {"loss": 1.0})
      line.say(f"At {step}.")
  text = out.getvalue()
  assert "\r" in text and " 50%|" in text and "100%|" in text
  assert "10/10, loss 1, 1 steps/s, 1 samples/s, 00:00 left" in text.split("\r")[-1]
  assert all(f"At {step}.\n" in text for step in range(5, 11))


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_quiet_and_gone_terminals(kind):
  out = kind()
  with Progress(3, quiet=True, stream=out) as line:
    line.update(1, {"loss": 1.0})
    assert out.getvalue() == ""
    line.say("Heard.")
  assert out.getvalue() == "Heard.\n"
  out = kind()
  with Progress(3, stream=out, every_s=0.0) as line:
    out.close()  # the connection broke
    for step in (1, 2, 3):
      line.update(step, {"loss": 1.0})
      line.say("Unheard.")
  assert line.step == 3


def test_progress_with_no_steps_left():
  out = io.StringIO()
  with Progress(5, 5, stream=out):
    pass
  assert out.getvalue() == ""
