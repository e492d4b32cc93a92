r"""Stage `flow` of the shapes world: the bidirectional teacher and its text encoder begin, on the
beginnings of clips, a second long.

    python -m hfjax.train --config=configs/tiny_teacher_short.py --workdir=runs/tiny_teacher_short \
        --config.data.path=data/clips --config.text.tokenizer=weights/tokenizer

They show as much of words and shapes as long clips, and take a fifth of the work. The data are
latents of clips (tools/encode_videos.py --shapes), which stay on the device.
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import tiny_config


def get_config() -> ConfigDict:
  c = tiny_config()
  c.stage = "flow"
  c.text.weights = "random:shapes"
  c.flow.train_text_encoder = True
  c.flow.frames = 5
  c.steps = 10_000
  c.batch = 256
  c.data.path = "data/clips"
  c.data.resident = True
  c.compute.remat = False
  c.compute.unroll = 6  # all of them
  c.optimizer.kind = "muon"
  c.optimizer.rate = 4e-3
  c.optimizer.adam_share = 0.3
  c.optimizer.decay = 0.03
  c.optimizer.warmup = 200
  c.ema.decay = 0.999
  c.ema.start = 1000
  c.checkpoint.every = 2000
  c.validation.every = 0
  return c
