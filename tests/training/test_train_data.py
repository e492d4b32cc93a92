"""What the trainer makes of its data: contexts, bad examples, trajectories of other times."""

import numpy as np
import pytest

from hfjax import train
from hfjax.data import shapes, trajectories
from hfjax.training import config, loop, plan, weights
from hfjax.training.checkpoints import Checkpoints
from hfjax.training.feed import Feed
from tests.training.runs import (
  FLOW,
  SMALL,
  flow,
  metrics,
  planned,
  said,
  small_programs,
  videos,
)

TEXT = SMALL.text_len, SMALL.text_dim


@pytest.fixture(scope="module", autouse=True)
def programs():
  with small_programs():
    yield


def stages_config(stage, *more):
  return [x.replace("smoke_flow", f"smoke_{stage}") for x in FLOW] + [*more]


def test_contexts_of_the_data_are_used_instead_of_the_encoder(tmp_path, monkeypatch):
  data = videos(tmp_path / "data", context=SMALL.text_dim)
  p = planned(data, "--config.text.negative=none")
  asked, encode = [], weights.Encoder(p).encode

  class Spy:
    model, loaded = encode.model, "weights"

    def __call__(self, prompts):
      asked.append(prompts)
      self.loaded = "weights"
      return encode(prompts)

  spy = Spy()
  monkeypatch.setattr(weights.contexts, "text_encoder", lambda *args: spy)
  with (
    loop.Stop(print) as stop,
    Checkpoints(tmp_path / "run/checkpoints") as checkpoints,
    loop.Metrics(tmp_path / "run", tensorboard=False) as figures,
  ):
    run = loop.Run(p, tmp_path / "run", checkpoints, figures, stop, print)
    seen = [run.feed() for _ in range(2)]
  assert asked == [["none"]] and "loaded" not in vars(spy)
  contexts = np.concatenate([np.asarray(batch["texts"].context[0]) for batch in seen])
  values = np.concatenate([np.asarray(batch["latents"][0]) for batch in seen])[:, 0, 0, 0, 0] * 8
  assert sorted(values) == [0, 1, 2, 3]
  for row, value in zip(contexts, values, strict=True):
    want = np.zeros(TEXT)
    want[: int(value) + 1] = value + 1
    np.testing.assert_array_equal(row, want)


def test_contexts_of_another_encoder_are_refused(tmp_path, capsys):
  assert flow(tmp_path / "run", videos(tmp_path / "data", context=7)) == 1
  assert "The contexts of the data are 7 wide, and the student takes 12" in said(capsys)[-1]


def test_bad_examples_are_told_of_once_and_left_out(tmp_path, capsys):
  data = videos(tmp_path / "data", prompts=(" ", "b", "c", "d"))
  assert flow(tmp_path / "skips", data) == 0
  told = [line for line in said(capsys) if "left out" in line]
  assert len(told) == 1 and told[0].endswith("has an empty prompt. It is left out.")
  assert metrics(tmp_path / "skips")[-1]["data/rejected"] == 1
  assert flow(tmp_path / "fails", data, "--config.data.on_bad=fail") == 1
  assert "has an empty prompt. Mend that, or set on_bad to skip" in said(capsys)[-1]


@pytest.mark.parametrize("shift", [5.0, 3.0])
def test_trajectories_at_other_times_are_refused(tmp_path, capsys, shift):
  shape, folder = (3, 4, 6, 4), tmp_path / "data"
  recipe = trajectories.Recipe(shape, (1000, 500), 8, shift)
  trace = lambda noise, context: np.zeros((len(noise), 3, *shape), np.float32)
  encode = lambda prompts: np.ones((len(prompts), *TEXT), np.float32)
  trajectories.write(folder, ["a", "b"], encode, trace, recipe)
  more = ["--config.ode.frames=3", f"--config.data.path={folder}"]
  argv = stages_config("ode", f"--workdir={tmp_path / 'run'}", *more)
  argv = [x for x in argv if ".flow." not in x]
  if shift == 5:
    p = plan.make_plan(config.parse(argv).config)
    feed = Feed(p, weights.Encoder(p), tmp_path, print)
    assert feed()["trajectory"].shape == (1, 2, 3, *shape)
    return
  assert train.main(argv) == 1
  (line,) = said(capsys)
  assert "are at the timesteps [1000.0, 750.0, 0.0], and the student's are [1000.0, 833.3" in line


def test_captions_of_the_world_of_shapes_are_prompts(tmp_path):
  more = ["data.path=shapes", "data.made=5", "seed=3", "distill.last=1", "distill.most=1"]
  argv = [x for x in stages_config("stage1", "--workdir=unused") if ".flow." not in x]
  argv += [f"--config.{name}.weights=random:small" for name in ("critic", "teacher")]
  p = plan.make_plan(config.parse([*argv, *(f"--config.{x}" for x in more)]).config)
  feed = Feed(p, weights.Encoder(p), tmp_path, print)
  want = shapes.prompts("train", 5, 3)
  assert [feed.source[i]["prompt"] for i in range(len(feed.source))] == want
  assert feed()["texts"].context.shape == (1, 2, *TEXT)


@pytest.mark.parametrize(
  ("stage", "name", "more", "kind", "tool"),
  [
    ("flow", "flow", [], "videos", "encode_videos"),
    ("ode", "ode", [], "trajectories", "make_trajectories"),
    ("stage1", "dmd", ["distill.regression_weight=0.5", "distill.last=1", "distill.most=1",
                       "critic.weights=random:small", "teacher.weights=random:small"],
     "trajectories", "make_trajectories"),
  ],
)  # fmt: skip
def test_pixels_are_no_latents(tmp_path, capsys, stage, name, more, kind, tool):
  argv = stages_config(stage, f"--workdir={tmp_path / 'run'}", "--config.data.path=shapes")
  argv = [x for x in argv if stage == "flow" or ".flow." not in x]
  assert train.main([*argv, *(f"--config.{x}" for x in more)]) == 1
  words = f"The stage {name} is to have {kind}, and the shapes world gives pixels and captions"
  assert said(capsys)[-1] == (
    f"train: {words} alone; make them with tools/{tool}.py, and give their folder."
  )
