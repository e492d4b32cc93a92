r"""Stage `flow`: flow matching of Wan 2.1 1.3B on latents of your own clips, to fine-tune it.

    python tools/encode_videos.py --weights weights/wan-1.3b --clips clips --out data/videos
    python -m hfjax.train --config=configs/flow.py --workdir=runs/flow \
        --config.data.path=data/videos

The model stays bidirectional. --config.flow.forcing=teacher trains a causal model of many steps
instead, and --config.lora.rank=32 adapters, with less memory; --dry_run tells how much. It was not
yet run at full size.
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import default_config


def get_config() -> ConfigDict:
  c = default_config()
  c.stage = "flow"
  c.steps = 5000
  c.optimizer.rate = 1e-5
  c.optimizer.b1 = 0.9
  c.optimizer.warmup = 100
  c.ema.decay = 0.999
  c.checkpoint.every = 500
  c.validation.every = 500
  return c
