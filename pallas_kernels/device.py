"""What calls are compiled for."""

import jax


def _device() -> jax.Device:
  default = jax.config.jax_default_device  # type: ignore[attr-defined]
  return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def platform() -> str:
  """Platform of the default device: "cpu", "gpu" or "tpu"."""
  return _device().platform


def compute_capability() -> tuple[int, int]:
  """Compute capability of the default device; (0, 0) of one that has none."""
  major, _, minor = str(getattr(_device(), "compute_capability", "")).partition(".")
  return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (0, 0)


def multiprocessors() -> int:
  """Streaming multiprocessors of the default device; those of an H200 where there is no GPU."""
  return _device().core_count if platform() == "gpu" else 132
