"""Text from a trained model: `generate(saved, prompts, settings)`."""

from pretrain.generation.sampling import Sampling
from pretrain.generation.texts import Generated, Settings, generate

__all__ = ["Generated", "Sampling", "Settings", "generate"]
