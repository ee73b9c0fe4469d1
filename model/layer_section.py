"""What the section of every kind of attention and feed-forward layer answers, so that the rest of the project need not
know the kinds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from common.json_config import Section


class Routers(NamedTuple):
    """What the routers of a layer choose from."""

    num_experts: int
    active: int
    """Experts that a token chooses (k); where that varies, the fewest."""
    scores: Literal["sigmoid", "softmax"]
    """What a router makes of its logits."""


Ability = Literal["tensor", "expert", "xl", "memory", "documents", "choices", "graphs", "maps", "routing", "export"]
"""Tensor parallelism, expert parallelism, Transformer-XL positions, memory, documents that do not see each other,
choices of experts that are recorded and replayed (`settled` in model/choices.py), CUDA graphs, attention maps, experts
that a text chooses, exports."""
Lacks = Mapping[Ability, str]
"""What a layer cannot do -> why, in words that follow a colon."""


class LayerSection(Section):
    """The section of a kind of attention or feed-forward layer. It answers what the rest of the project asks of a layer
    besides its keys. No answer has a default: a new kind that lacks one is refused when it is imported, so that nothing
    takes it for another kind."""

    label: ClassVar[str]
    """The layer's name for people."""
    lacks: ClassVar[Lacks]
    """Where one of these is asked for, it is refused, with the reason."""

    divided: ClassVar[tuple[str, ...]]
    """The keys whose sizes tensor-parallel ranks divide. Empty where the layer lacks that."""

    @property
    @abstractmethod
    def sizes(self) -> str:
        """In a few words, for the line that a run prints of its model."""

    @property
    @abstractmethod
    def routers(self) -> Routers | None:
        """None: the layer has no experts."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        asked = [name for name in ("label", "lacks", "sizes", "routers", "divided") if name not in vars(cls)]
        if asked:
            raise TypeError(f"{cls.__name__} does not say {', '.join(asked)}; model/layer_section.py explains")
        unknown = [*(cls.lacks.keys() - set(get_args(Ability))), *(set(cls.divided) - cls.model_fields.keys())]
        if unknown:  # a lack that nobody asks for would be allowed
            raise TypeError(f"{cls.__name__} names {', '.join(sorted(unknown))}, of which nothing is known")
        if not cls.divided and "tensor" not in cls.lacks:
            raise TypeError(f"{cls.__name__} lacks no tensor parallelism, and divided names nothing that it divides")
