"""The command and streams with the model of the shapes world, its weights random."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from hfjax import pipeline, sample
from hfjax.convert import CheckpointError
from hfjax.data import shapes
from hfjax.diffusion.solvers import MultistepSolver
from hfjax.models.sampling_presets import SAMPLING_PRESETS
from hfjax.sampling import requests
from hfjax.sampling.flags import parse
from hfjax.streaming import Stream
from hfjax.streaming.stream import configure
from hfjax.video import read_video, write_image
from tests import shapes_model
from tests.helpers import compilations

SHAPES = SAMPLING_PRESETS["shapes"]
PROMPT = SHAPES.prompt
NAME = "a-large-red-circle-moves-left-while-a-small-cyan-star-spins-0"
NOTICE = "This model knows nothing but moving shapes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return shapes_model.write(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
  return pipeline.load(folder)


@pytest.fixture(autouse=True)
def here(folder, tmp_path, monkeypatch):
  """The model as if it had come with hfjax, and its videos smaller, so that tests are fast."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(pipeline, "EMBEDDED", folder)
  monkeypatch.setitem(SAMPLING_PRESETS, "shapes", dataclasses.replace(SHAPES, size=(64, 32)))


def refused(capsys, *args, status=2):
  """Sentence of a command that must fail."""
  assert sample.main([*args]) == status
  error = capsys.readouterr().err
  assert error.startswith("sample: ") and len(error.strip().splitlines()) == 1, error
  return error


def read_about(path):
  return json.loads(Path(path).with_suffix(".json").read_text())


def geometry(model, size=None, **settings):
  return configure(model, size, None, "auto", **settings).geometry


def test_a_stream_has_the_presets_size_and_blocks(model, monkeypatch):
  monkeypatch.setitem(SAMPLING_PRESETS, "shapes", SHAPES)
  g = geometry(model)
  assert (g.height, g.width, g.block, g.ratio, g.window, g.sink) == (16, 16, 16, 0.25, 9, 3)
  g = geometry(model, (64, 32), block=8, ratio=0.5)
  assert (g.height, g.width, g.block, g.ratio) == (4, 8, 8, 0.5)
  g = geometry(model._replace(preset="hybrid"))
  assert (g.height, g.width, g.block, g.ratio) == (60, 104, 64, 0.2)
  assert configure(model, None, None, "auto").dtype == "float32"  # on a processor
  assert configure(model, None, "bfloat16", "auto").dtype == "bfloat16"
  with pytest.raises(ValueError, match="The nearest is 96 x 112"):
    geometry(model, (100, 110))


@pytest.mark.parametrize(
  ("preset", "window", "sink", "shift"),
  [("shapes", 9, 3, 3.0), ("shapes_dense", 21, 1, 3.0), ("self_forcing", 21, 0, 5.0)],
)
def test_a_stream_is_sampled_as_the_preset_says(model, preset, window, sink, shift):
  if preset != "shapes":
    dense = dataclasses.replace(model.config, linear=False)
    model = model._replace(config=dense, variant=SAMPLING_PRESETS[preset].variant)
  config = configure(model._replace(preset=preset), (64, 32), None, "auto")
  assert (config.geometry.window, config.geometry.sink) == (window, sink)
  assert (config.shift, config.steps) == (shift, (1000, 750, 500, 250))
  own = configure(
    model._replace(preset=preset), (64, 32), None, "auto", window=12, sink=6, shift=2.0,
    steps=(1000, 500),
  )  # fmt: skip
  assert (own.geometry.window, own.geometry.sink) == (12, 6)
  assert (own.shift, own.steps) == (2.0, (1000, 500))


def test_a_stream_of_an_undistilled_model_keeps_the_usual_settings(model):
  config = configure(model._replace(preset="wan"), (64, 32), None, "auto")
  assert (config.geometry.window, config.geometry.sink, config.shift) == (9, 3, 5.0)
  assert config.steps


def test_a_stream_of_a_causal_teacher_is_solved_unless_steps_are_given(model):
  dense = dataclasses.replace(model.config, linear=False)
  model = model._replace(preset="shapes_causal", config=dense, variant="reference_dense")
  make = lambda **settings: configure(model, (64, 32), None, "auto", **settings)
  solved = make()
  assert (solved.geometry.window, solved.geometry.sink) == (21, 1)
  assert solved.solver == MultistepSolver("unipc", 24, 3.0) and solved.guidance == 3.0
  assert solved.guidance_interval == (500.0, 1000.0)
  few = make(steps=(1000, 500), guidance=1.0)
  assert (few.solver, few.guidance, few.steps) == (None, 1.0, (1000, 500))
  assert make(solver=MultistepSolver("unipc", 9, 3.0)).solver.steps == 9
  assert make(shift=5.0).solver == MultistepSolver("unipc", 24, 5.0)


def test_other_presets_leave_size_and_blocks_to_the_usual_ones():
  for name, preset in SAMPLING_PRESETS.items():
    own = (preset.size, preset.prompt, preset.world)
    assert (own == (None,) * 3) == (not name.startswith("shapes"))
    assert ((preset.block, preset.ratio) == (None, None)) == (name != "shapes")
    assert preset.shift == (3.0 if name.startswith("shapes") else 5.0)
    assert (preset.negative is None) == (name not in ("shapes_teacher", "shapes_causal"))


def test_the_preset_is_told_before_the_weights_are_loaded(folder, tmp_path):
  assert pipeline.recorded_preset(folder) == pipeline.recorded_preset("random:shapes") == "shapes"
  assert pipeline.recorded_preset("random:tiny") == "hybrid"
  assert pipeline.recorded_preset(tmp_path) is None
  with pytest.raises(CheckpointError, match="neither a file or folder here"):
    pipeline.recorded_preset("no/such/thing")


def test_nothing_given_makes_a_video_of_the_models_own(folder, capsys):
  parse([])
  assert requests.length(requests.rate(), 0) == 80  # 5 seconds
  assert sample.main(["--preview", "--frames=9"]) == 0
  out = capsys.readouterr().out
  video = Path(f"outputs/{NAME}.mp4")
  frames = read_video(video).frames
  assert frames.shape == (9, 32, 64, 3) and read_video(video).fps == 16
  about = read_about(video)
  assert about["prompt"] == PROMPT and about["preset"] == "shapes"
  assert about["config"]["geometry"]["block"] == 16 and about["config"]["dtype"] == "float32"
  # The words are of its world, and the files are told of.
  assert NOTICE not in out and "left out" not in out
  for path in (video, video.with_suffix(".png"), video.with_suffix(".gif")):
    assert str(path) in out and path.stat().st_size > 1000
  # The description makes the same video again, also with the weights by their name.
  args = [f"--config={video.with_suffix('.json')}", f"--weights={folder}", "--quiet"]
  assert sample.main([*args, "--out=again.mp4"]) == 0
  np.testing.assert_array_equal(read_video("again.mp4").frames, frames)


def test_without_the_folder_there_is_a_sentence(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(pipeline, "EMBEDDED", tmp_path / "none")
  for args in ([], [f"--prompt={PROMPT}"], ["--latents=a.latents.safetensors"]):
    assert "The model that comes with hfjax is not there" in refused(capsys, *args, status=1)
  with pytest.raises(CheckpointError, match="install hfjax anew, or name weights"):
    pipeline.load()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("args", "sentence"),
  [
    (["--size=100x110"], "The nearest is 96 x 112"),
    (["--window=5"], "cannot hold the sink"),
    (["--prompt= "], "A prompt is empty"),
    (["--weights=random:tiny"], "There is no prompt"),
  ],
)
def test_commands_that_make_no_sense(args, sentence, capsys):
  assert sentence in refused(capsys, *args)
  assert not list(Path().glob("**/*.mp4"))


def test_words_of_another_world_get_one_notice(capsys):
  args = ["--frames=1", "--out=.", "--seed=1"]
  assert sample.main([*args, "--prompt=a cat on a lawn", "--prompt=a dog"]) == 0
  out = capsys.readouterr().out
  assert out.count(NOTICE) == 1 and "may not follow 'a cat on a lawn'" in out and PROMPT in out
  assert len(list(Path().glob("*.mp4"))) == 2
  long = " and ".join(["a small red ball"] * 20)
  assert sample.main([*args, f"--prompt={long}"]) == 0
  assert "The prompt is too long: its last" in capsys.readouterr().out


def test_images_clips_and_scripts_begin_and_lead_videos(capsys):
  """Each by weights, of a size and in a dtype that nothing names, also when it is gone on with."""
  begin = shapes.render(shapes.draw_scene(np.random.default_rng(0)), 0, 5)
  write_image("scene.png", begin[0])
  Path("story.yaml").write_text(
    f"- prompt: {PROMPT}\n- {{chunk: 2, prompt: a small blue ring bounces, blend: 2}}\n"
  )
  args = ["--image=scene.png", "--script=story.yaml", "--quiet", "--latents=save", "--save_state"]
  assert sample.main([*args, "--frames=25", "--out=a.mp4"]) == 0
  first = read_video("a.mp4").frames
  assert first.shape == (25, 32, 64, 3)
  assert sample.main(["--resume=a.state.safetensors", "--frames=12", "--quiet"]) == 0
  assert read_video("a-2.mp4").frames.shape == (12, 32, 64, 3)
  assert read_about("a-2")["config"]["geometry"]["block"] == 16
  assert sample.main(["--video=a.mp4", f"--prompt={PROMPT}", "--frames=12", "--out=b.mp4"]) == 0
  # A clip goes on for as long as is asked for.
  assert len(read_video("b.mp4").frames) == 25 + 12
  assert NOTICE not in capsys.readouterr().out
  # Latents of the first are decoded to the same pixels, by the same autoencoder.
  assert sample.main(["--latents=a.latents.safetensors", "--out=c.mp4", "--quiet"]) == 0
  np.testing.assert_array_equal(read_video("c.mp4").frames, first)


def test_a_stream_compiles_nothing_twice_and_follows_another_prompt(model):
  jax.clear_caches()  # of what other tests compiled
  stream, other = (Stream(model, PROMPT, seed=3) for _ in range(2))
  with compilations() as compiled:
    next(stream)
    chunk = next(stream)
  # Weights that are bound to a device would have the transformer's program compiled anew.
  assert sum("_advance" in program for program in compiled) == 1, compiled
  assert chunk.shape == (1, 12, 32, 64, 3)
  next(other)
  np.testing.assert_array_equal(next(other), chunk)
  stream.set_prompt("a large white cross spins over a gradient", blend=1)
  assert stream.prompts == ["a large white cross spins over a gradient"]
  assert np.any(np.asarray(next(stream)) != np.asarray(next(other)))
  with pytest.raises(ValueError, match="say in words"):
    stream.set_prompt("")
