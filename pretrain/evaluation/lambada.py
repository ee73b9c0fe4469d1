"""LAMBADA (arXiv 1606.06031): the last word of a passage, which one guesses only from all of it.

The file is lambada_test.jsonl of the GPT-2 authors, 5,153 lines of {"text": ...}: plain punctuation, one blank between
words. The target is what follows the last blank, with that blank, also a word with a quotation mark before it; nothing
else is done to the text. lm-evaluation-harness splits in the same way (its task lambada_openai).
"""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from pretrain.evaluation.examples import Example, Examples, Task, right_if_decoded
from pretrain.evaluation.files import files_of, json_lines

PUBLISHED = "LAMBADA's lambada_test.jsonl"


def read(path: Path) -> Examples:
    """Raises UserError."""
    (file, *_) = files_of(path, ("lambada_test*.jsonl", "lambada_test*.jsonl.gz"), (), PUBLISHED)
    examples = []
    for number, row in json_lines(file, ("text",)):
        context, _, word = row["text"].rpartition(" ")
        if not context.strip() or not word:
            raise UserError(f"{file} line {number}: the text ends in no word after a blank; is this {PUBLISHED}?")
        examples.append(Example(f"{file} line {number}", "", context, (f" {word}",)))
    if not examples:
        raise UserError(f"{file}: holds no line; download {PUBLISHED} again")
    return Examples(examples)


LAMBADA = Task("lambada", read, right_if_decoded, has_perplexity=True)
