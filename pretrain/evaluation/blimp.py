"""BLiMP (arXiv 1912.00582): pairs of sentences of which only one is grammatical.

67 files of JSON lines with sentence_good and sentence_bad, 1,000 pairs each, one file for each phenomenon. The model is
right where the whole good sentence is likelier than the bad one; the result is the mean over files.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from pretrain.evaluation.examples import Example, Examples, Task, right_if_likelier
from pretrain.evaluation.files import files_of, json_lines

PUBLISHED = "BLiMP's 67 .jsonl files"


def read(path: Path) -> Examples:
    """Raises UserError."""
    examples: list[Example] = []
    for file in files_of(path, ("*.jsonl", "*.jsonl.gz"), ("data", "blimp", "blimp/data"), PUBLISHED):
        name, count = file.name.partition(".")[0], len(examples)
        for number, row in json_lines(file, ("sentence_good", "sentence_bad")):
            pair = (row["sentence_good"], row["sentence_bad"])
            examples.append(Example(f"{file} line {number}", name, "", pair))
        if len(examples) == count:
            raise UserError(f"{file}: holds no line; download {PUBLISHED} again")
    return Examples(examples)


BLIMP = Task("blimp", read, right_if_likelier, groups=67)
