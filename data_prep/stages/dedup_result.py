"""What the dedup stage says of each document of a part."""

from pathlib import Path

import numpy as np
import safetensors.numpy

from data_prep.work.parts import Part

EXACT, NEAR = 1, 2  # verdicts; 0 keeps


def duplicate_verdicts(folder: Path, part: Part) -> np.ndarray:
    """uint8 [documents]: 0, EXACT or NEAR."""
    path = folder / f"{part.name}.safetensors"
    if not path.exists():  # no file for a part without duplicates
        return np.zeros(part.documents, np.uint8)
    verdicts: np.ndarray = safetensors.numpy.load_file(path)["verdict"]
    return verdicts
