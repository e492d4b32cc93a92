"""The tools that write data, as commands."""

import sys

import convert_checkpoint
import embed_prompts
import encode_videos
import jax.numpy as jnp
import make_trajectories
import numpy as np
import pytest

from hfjax.data import command, contexts, trajectories
from hfjax.data.loading import batches, open_source
from hfjax.pipeline import RandomText
from hfjax.video import VideoWriter
from tests.data.helpers import states, write_lmdb
from tests.test_pipeline import CONFIGS
from tests.test_pipeline import write as write_weights

WORDS = ["a red square", "a dog", "rain"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(command.signal, "signal", lambda *args: None)
  (tmp_path / "p.txt").write_text("\n".join(WORDS))


EMBED = ["--weights", "random:tiny", "--prompts", "p.txt", "--out", "e", "--quiet"]


def test_prompts_are_encoded_by_two_processes(capsys):
  assert embed_prompts.main([*EMBED, "--process", "1/2", "--per_shard", "1"]) == 0
  assert "2 files of e are still to come" in capsys.readouterr().out
  # Which command ends it is told, without the process.
  make = ["--weights", "random:tiny", "--prompts", "e", "--out", "t"]
  assert make_trajectories.main([*make, "--count", "2"]) == 2
  told = capsys.readouterr().err
  assert told.startswith("make_trajectories: e is not complete: 1 of 3 shards are there.")
  assert told.strip().endswith("embed_prompts.py " + " ".join([*EMBED, "--per_shard", "1"]))
  assert embed_prompts.main([*EMBED, "--process=0/2", "--per_shard", "1"]) == 0
  assert "Wrote e: 3 examples." in capsys.readouterr().out
  source = open_source("prompts", "e", expect={"context": (None, 48)})
  for i, prompt in enumerate(WORDS):
    want = np.asarray(contexts.text_encoder("random:tiny")([prompt]))[0]
    assert source[i]["prompt"] == prompt
    np.testing.assert_array_equal(source[i]["context"], want[: len(prompt.split())])


def test_progress_counts_what_was_there_as_done(monkeypatch):
  made = []

  class Bar:
    def __init__(self, **options):
      self.n, self.closed = options["initial"], False
      made.append((self, options["total"]))

    def update(self, n):
      self.n += n

    def close(self):
      self.closed = True

  monkeypatch.setattr(command, "tqdm", Bar)
  assert embed_prompts.main([*EMBED[:-1], "--per_shard", "1", "--process", "2/3"]) == 0
  assert embed_prompts.main([*EMBED[:-1], "--per_shard", "1"]) == 0
  assert [(bar.n, total, bar.closed) for bar, total in made] == [(1, 1, True), (3, 3, True)]


@pytest.mark.parametrize(
  ("args", "sentence"),
  [
    (["--process", "2"], "The process is '2'; give its number and how many"),
    (["--process", "2/2"], "count from 0"),
    (["--per_shard", "-1"], "give 1 or more"),
    (["--weights", "random:none"], "Unknown model 'none'"),
    (["--prompts", "none.txt"], "There is no none.txt to read prompts from"),
    (["--count", "0"], "There are no prompts to be written"),
  ],
)
def test_what_cannot_be_is_said_in_a_sentence(args, sentence, capsys):
  assert embed_prompts.main([*EMBED, *args]) == 2
  told = capsys.readouterr().err
  assert told.startswith("embed_prompts: ") and sentence in told and "Traceback" not in told


MAKE = ["--weights", "random:tiny", "--prompts", "p.txt", "--out", "t", "--quiet"]


@pytest.mark.parametrize(
  ("args", "sentence"),
  [
    (["--teacher_steps", "50"], "give the teacher a multiple of 4 steps"),
    (["--teacher_steps", "0"], "at least one"),
    (["--steps", "1000,x"], "are no numbers"),
    (["--steps", "500.5"], "whole number"),
    (["--size", "100x96"], "multiples of 16"),
    (["--size", "big"], "The size is 'big'"),
    (["--shift", "nan"], "shift is nan"),
    (["--guidance_interval", "900", "500"], "give the lower first"),
    (["--frames", "0"], "four sizes from 1"),
    (["--import_lmdb", "."], "holds no LMDB"),
  ],
)
def test_impossible_trajectories_are_refused_before_weights_are_loaded(
  args, sentence, capsys, monkeypatch
):
  monkeypatch.setattr(trajectories, "load_teacher", None)
  assert make_trajectories.main([*MAKE, *args]) == 2
  assert sentence in capsys.readouterr().err


def test_lmdb_is_taken_over(tmp_path, capsys):
  write_lmdb(tmp_path / "in", states(2), ["a", "b"], {"prompts_1_data": b""})
  args = ["--import_lmdb", "in", "--out", "t", "--steps", "1000,500", "--quiet"]
  assert make_trajectories.main(args) == 2
  assert "Row 1 of in has no prompt" in capsys.readouterr().err
  assert make_trajectories.main([*args, "--on_bad", "skip"]) == 0
  told = capsys.readouterr()
  assert "1 example is left out:\n  Row 1 of in has no prompt." in told.err
  assert "Wrote t: 1 examples." in told.out
  assert len(open_source("trajectories", "t")) == 1


def test_what_ends_a_run_from_outside_is_told(monkeypatch, capsys):
  for error, status, words in (
    (KeyboardInterrupt(), 130, "interrupted. Finished files are kept"),
    (OSError(28, "No space left on device", "e/x"), 1, "No space left on device (e/x)"),
    (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), 1, "too little memory; make --batch"),
  ):

    def fail(self, prompts, error=error):
      raise error

    monkeypatch.setattr(RandomText, "__call__", fail)
    assert embed_prompts.main(EMBED) == status
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_trajectories_of_a_network_on_the_way_to_a_batch(capsys):
  small = ["--frames", "3", "--size", "32x48", "--teacher_steps", "4", "--batch", "2"]
  assert make_trajectories.main([*MAKE, *small, "--with_context"]) == 0
  expect = {"trajectory": (5, 3, 6, 4, 16), "context": (None, 48)}
  source = open_source("trajectories", "t", expect=expect)
  batch = next(batches(source, 3, 0, text_len=16))
  assert batch["trajectory"].shape == (3, 5, 3, 6, 4, 16)
  assert batch["context"].shape == (3, 16, 48) and sorted(batch["prompt"]) == sorted(WORDS)
  # They begin with noise and go somewhere.
  assert abs(batch["trajectory"][:, 0].std() - 1) < 0.1
  moved = np.abs(np.diff(batch["trajectory"], axis=1)).mean(axis=(2, 3, 4, 5))
  assert np.all(moved > 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["original", "ours"])
def test_prompts_are_encoded_by_weights_of_which_only_the_text_encoder_is_loaded(
  tmp_path, monkeypatch, form
):
  models = ("dit", "umt5") if form == "original" else ("umt5",)
  folder = write_weights(tmp_path / "w", {k: CONFIGS[k] for k in models})
  if form == "ours":
    # Its text encoder is as wide as Wan's, which is what is assumed of it when it is alone.
    monkeypatch.setattr(contexts, "PRESETS", {"wan-1.3b": CONFIGS["dit"]})
    assert convert_checkpoint.main([str(folder), str(tmp_path / "ours"), "--quiet"]) == 0
    folder = tmp_path / "ours"
  loaded, load = [], contexts.convert.load
  spy = lambda path, model, **kw: loaded.append(model) or load(path, model, **kw)
  monkeypatch.setattr(contexts.convert, "load", spy)
  # One by one, as below: a program for another batch may round elsewhere.
  args = ["--weights", str(folder), "--prompts", "p.txt", "--out", "e", "--batch", "1", "--quiet"]
  assert embed_prompts.main(args) == 0
  assert loaded == ["umt5"]
  source = open_source("prompts", "e", expect={"context": (None, 16)})
  assert source.dtypes["context"] == "bfloat16"
  encode = contexts.text_encoder(folder)
  for i, prompt in enumerate(WORDS):
    rows, whole = source[i]["context"], np.asarray(encode([prompt]))[0]
    whole = np.asarray(jnp.asarray(whole, jnp.bfloat16), np.float32)
    assert len(rows) == len(prompt.split()) + 1  # and the end token
    np.testing.assert_array_equal(rows, whole[: len(rows)])
    assert rows.any() and not whole[len(rows) :].any()


@pytest.mark.slow
def test_clips_of_a_folder_become_latents(tmp_path, capsys):
  (tmp_path / "c").mkdir()
  with VideoWriter(tmp_path / "c" / "a.mp4", 32, 32, 16) as writer:
    writer.write(np.full((9, 32, 32, 3), 99, np.uint8))
  (tmp_path / "c" / "a.txt").write_text("grey")
  (tmp_path / "c" / "b.mp4").write_bytes(b"no")
  args = ["--weights", "random:tiny", "--clips", "c", "--out", "v", "--frames", "5"]
  args += ["--size", "32x16", "--on_bad", "skip"]
  assert encode_videos.main(args) == 0
  assert "b.mp4 has no caption" in capsys.readouterr().err
  source = open_source("videos", "v", expect={"latents": (2, 2, 4, 16)})
  assert source[0]["prompt"] == "grey" and source[0]["latents"].std() > 0


def test_the_tools_need_no_tensorflow():
  assert "tensorflow" not in sys.modules
