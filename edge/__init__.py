"""The device agent, and the kernel that every other package may import."""

import os

# Some libraries phone home unless told otherwise before they load: onnxruntime since 1.29 (its PR 27379),
# huggingface-hub by default. This package is imported before either, so the choice is made here, once.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
