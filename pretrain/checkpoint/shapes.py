"""The shapes of a model's parameters, and whether a checkpoint has them: known without reading a tensor."""

from __future__ import annotations

from common.errors import UserError
from common.tables import counted
from model.config import ModelConfig
from model.parameters import owner_of, parameter_specs
from pretrain.checkpoint.folder import Checkpoint


def full_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Shape of every parameter of the model by canonical name; a tied output layer's is the embedding's."""
    return {name: list(spec.shape) for name, spec in parameter_specs(config).items() if owner_of(name, config) == name}


def check_shapes(checkpoint: Checkpoint, config: ModelConfig, key: str) -> None:
    """Raises UserError, which names `key`, unless the checkpoint has every parameter of the model in its shape. Others
    it may have besides."""
    saved, wrong = checkpoint.state["parameters"], []
    for name, shape in full_shapes(config).items():
        if saved.get(name) != shape:
            wrong.append(f"{name} is {shape} here and {saved.get(name) or 'missing'} there")
    if wrong:
        more = f" (and {counted(len(wrong) - 1, 'more parameter')})" if len(wrong) > 1 else ""
        raise UserError(
            f"{key}: {checkpoint.path} is of another model: {wrong[0]}{more}; give the model the sizes that it has "
            f"there, or name another checkpoint"
        )
