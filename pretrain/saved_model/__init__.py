"""Trained models for other programs: `load_model(run_or_checkpoint)` gives model, tokenizer and configuration."""

from pretrain.saved_model.loading import SavedModel, find_checkpoint, load_model
from pretrain.saved_model.tokenizer import Tokenizer

__all__ = ["SavedModel", "Tokenizer", "find_checkpoint", "load_model"]
