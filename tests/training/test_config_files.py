"""The files in configs/: each can be followed, and what the README says of them holds."""

import re
import shlex
from pathlib import Path

import pytest

from hfjax.training import config, plan
from hfjax.training.defaults import STAGES

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").glob("*.py"))
SMALL = {"flow": "flow", "ode_init": "ode", "stage1": "stage1", "stage2": "stage2"}
# Weights that take nothing but their architecture.
RANDOM = [
  "--config.student.weights=random:wan-1.3b", "--config.critic.weights=random:wan-1.3b",
  "--config.teacher.weights=random:wan-14b", "--config.vae.weights=random:wan-1.3b",
]  # fmt: skip


def parse(path, *more):
  return config.parse([f"--config={path}", "--workdir=w", "--config.compute.fsdp=1", *more]).config


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_each_says_how_it_is_run(path):
  words = path.read_text().split('"""')[1]
  assert f"--config=configs/{path.name} " in words and "python -m hfjax.train" in words
  for command in commands(words):
    assert config.parse(command).config.stage in STAGES


@pytest.mark.parametrize("name", SMALL)
def test_each_has_a_small_twin_of_its_stage(name, monkeypatch):
  monkeypatch.chdir(ROOT)
  devices = ["--config.batch=8", "--config.accumulate=4"]
  real = plan.make_plan(parse(f"configs/{name}.py", *RANDOM, *devices))
  small = plan.make_plan(parse(f"configs/smoke_{SMALL[name]}.py"))
  assert real.stage == small.stage
  assert real.parts == small.parts and real.causal == small.causal
  assert real.latent_shape == (21, 60, 104, 16)


def test_the_published_values_are_those_of_the_real_ones(monkeypatch):
  """Spec section 8.1."""
  monkeypatch.chdir(ROOT)
  for name, steps, rate, reflow in (("stage1", 1000, 4e-7, 0), ("stage2", 300, 2e-7, 0.05)):
    found = plan.make_plan(parse(f"configs/{name}.py", *RANDOM, "--config.batch=2"))
    c, o = found.config, found.objective
    assert (c.steps, c.distill.generator_every, c.ema.decay, c.ema.start) == (steps, 5, 0.99, 200)
    assert found.optimizer.rate == 1.5e-6 and found.critic_optimizer.rate == rate
    for optimizer in (found.optimizer, found.critic_optimizer):
      assert (optimizer.b1, optimizer.b2, optimizer.decay, optimizer.clip) == (0, 0.999, 0.01, 10)
    assert (o.last, o.most, o.guidance, o.reflow_weight) == (7, 18, 3.0, reflow)
    assert (o.reflow_steps, o.reflow_stop, o.reflow_guidance) == (25, None, 3.5)
    assert [round(t, 2) for t in o.stream.timesteps] == [1000.0, 937.5, 833.33, 625.0]
    assert found.teacher.dim == 5120 and found.critic.dim == found.student.dim == 1536
  g = found.stream.geometry
  assert (g.window, g.sink, g.chunk, g.ratio, g.variant) == (9, 3, 3, 0.2, "paper")
  assert found.student.linear and not found.critic.linear


def test_the_commands_of_the_readme_can_be_followed(monkeypatch):
  monkeypatch.chdir(ROOT)
  text = (ROOT / "README.md").read_text().replace("$P ", "python ").replace("$T", "runs/smoke_flow")
  stages = {" ".join(x): config.parse(x).config.stage for x in commands(text)}
  small = [stage for command, stage in stages.items() if "configs/smoke_" in command]
  # The autoencoder's has no small twin: the others need none.
  assert small == [stage for stage in STAGES if stage != "vae"]


def commands(text):
  """Arguments of every call of training that is indented, as in a shell."""
  text = re.sub(r"\\\n\s*", " ", text)
  lines = re.findall(r"^    python -m hfjax\.train (.*)$", text, re.MULTILINE)
  return [shlex.split(line) for line in lines]
