"""The model card (README.md) of an export: what the model is, what it costs, what it was trained on, how good it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig, XLConfig
from model.costs import attention_macs
from model.counted_costs import count_macs
from pretrain.export.data_sets import DataSet
from pretrain.report.model_text import model_family, model_text, parameter_count

NO_LICENSE = "unknown"
MOST_INPUTS = 20
"""Raw files that are named; of more only the first ones are."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says beside the model's configuration."""

    name: str
    """Of the folder of the export."""
    license: str
    """Of the weights: an identifier that the Hugging Face hub knows, or `unknown`."""
    dtype: str
    origin: dict[str, Any]
    """The content of training.json."""
    provenance: dict[str, Any] | None
    """`provenance` and `totals` of the data's manifest, where it was found."""
    data_sets: list[DataSet]
    """Of a run that has read several; then each has a provenance of its own."""
    tokens_are_bytes: bool
    has_eos: bool
    has_text: bool
    """False: the folder has no tokenizer, because nobody knows the one of the data's ids."""
    sees_one_document: bool = False
    """Whether nothing before an EOS is seen behind it."""


def card(model: ModelConfig, facts: CardFacts) -> str:
    """The text, with the header that the Hugging Face hub reads."""
    parts = [
        _header(facts),
        f"# {facts.name}\n\nA {model_family(model)} language model: {model_text(model)}.\n",
        _usage(model, facts),
        "## The model\n\n" + _table(_model_rows(model, facts)),
        "## How it was trained\n\n" + _table(_training_rows(model, facts)),
        "## Data\n\n" + _data(facts),
        "## Results\n\n" + _results(facts),
        _license(facts),
    ]
    return "\n".join(parts)


def _header(facts: CardFacts) -> str:
    return (
        f"---\nlicense: {facts.license}\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags:\n- switchall\n- custom_code\n---\n"
    )


def _usage(model: ModelConfig, facts: CardFacts) -> str:
    tokenizer = (
        ", and the tokenizer sentencepiece."
        if facts.has_text
        else ". It has no tokenizer: training read token ids that another program had made. Put the files of the "
        "tokenizer that made them here, such as `tokenizer.json` and `tokenizer_config.json`."
    )
    notes = [
        "The folder holds the code of the model, so that `trust_remote_code=True` is needed; it imports torch and "
        f"transformers (5.0 or newer){tokenizer}"
    ]
    if facts.dtype != "float32":
        notes.append(f"The weights were rounded to {facts.dtype}; training kept them in float32.")
    if model.memory_length:
        notes.append(
            f"The text is cut into chunks of {model.sequence_length} tokens from its first one; a token sees its own "
            f"chunk up to itself and the {model.memory_length} tokens before it. The cache keeps no more than that."
        )
    else:
        notes.append(
            f"It was trained on windows of {model.sequence_length} tokens; with more it works outside of what it has "
            f"seen."
        )
    if facts.sees_one_document:
        notes.append(
            "It was trained on one document at a time, and its code sees to that: behind the token that ends a "
            "document (`document_end` in `config.json`) nothing before is seen."
        )
    if not facts.has_eos:
        notes.append("No token ends a text: limit what is generated with `max_new_tokens`.")
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'name = "."  # this folder, or what it is called on the hub\n'
        "tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)\n"
        "model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)\n"
        'inputs = tokenizer(["The river"], return_tensors="pt")\n'
        "print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=50))[0])\n"
        "```\n\n" + "\n\n".join(notes) + "\n"
    )


def _model_rows(model: ModelConfig, facts: CardFacts) -> Iterable[tuple[str, str]]:
    count, macs = parameter_count(model), count_macs(model)
    yield "parameters", f"{count.total:,}"
    if count.active != count.total:
        yield "used for a token", f"{count.active:,}"
    per_token = macs.model / model.sequence_length
    yield "multiply-accumulates for a token", f"{per_token:,.0f} (forward, {model.sequence_length} tokens, counted)"
    yield "of one attention layer, for a window", f"{attention_macs(model):,} (by the formula of arXiv 2312.07987)"
    yield "vocabulary", f"{model.vocab_size:,}"
    yield "positions", "relative (Transformer-XL)" if isinstance(model.position, XLConfig) else "rotary"
    yield "weights", facts.dtype


def _training_rows(model: ModelConfig, facts: CardFacts) -> Iterable[tuple[str, str]]:
    origin, config = facts.origin, facts.origin["config"]
    if origin["initial_weights"] is not None:
        yield "began with", f"the weights of {origin['initial_weights']}, whose training is not counted here"
    yield "steps", f"{origin['step']:,}"
    yield "tokens read", f"{origin['tokens']:,}"
    yield "batch", f"{config['batch']['global_sequences']:,} sequences of {model.sequence_length:,} tokens"
    yield "learning rate", f"{config['optimizer']['learning_rate']:g}"
    yield "precision", str(config["train"]["precision"])
    if model.dropout:
        yield "dropout", f"{model.dropout:g}"
    yield "software", ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version)
    if origin["source"]:
        yield "weights", origin["source"]


def _data(facts: CardFacts) -> str:
    digest = facts.origin["data_digest"]
    known = f"The data set has the digest `{digest}`." if digest else "The data set is not recorded."
    if facts.data_sets:
        known = f"The {len(facts.data_sets)} data sets that the run has read. `training.json` has the settings.\n"
        return "\n".join([known, *(f"### {one.name}\n\n" + _data_set(one, facts) for one in facts.data_sets)])
    if facts.provenance is None:
        return f"{known}\n"
    return f"{known} `training.json` has the settings.\n\n" + _provenance(facts.provenance, facts)


def _data_set(one: DataSet, facts: CardFacts) -> str:
    known = f"The run has read {one.tokens:,} tokens of it. " + (f"Its digest is `{one.digest}`." * bool(one.digest))
    if one.provenance is None:
        return f"{known} What it was made from is not known here.\n"
    return f"{known}\n\n" + _provenance(one.provenance, facts)


def _provenance(provenance: dict[str, Any], facts: CardFacts) -> str:
    totals, inputs = provenance["totals"], provenance["inputs"]
    rows = [
        (split, f"{sums['documents']:,} documents, {sums['tokens']:,} tokens" + _text_bytes(sums, facts))
        for split, sums in totals.items()
    ]
    files = [f"- `{entry['name']}` ({entry['format']}), sha256 `{entry['sha256']}`" for entry in inputs[:MOST_INPUTS]]
    if len(inputs) > MOST_INPUTS:
        files.append(f"- and {len(inputs) - MOST_INPUTS:,} more files")
    return f"{_table(rows)}\nMade from\n\n" + "\n".join(files) + "\n"


def _text_bytes(sums: dict[str, Any], facts: CardFacts) -> str:
    return f", {sums['text_bytes']:,} bytes of text" if facts.has_text else ""


def _results(facts: CardFacts) -> str:
    rows, split = [], facts.origin["config"]["evaluate"]["split"]
    for key, what in (("loss", "loss of the last training step"), ("validation_loss", f"{split} loss")):
        if (loss := facts.origin[key]) is not None:
            extra = f"; {loss / math.log(2):.4f} bits per byte" if facts.tokens_are_bytes else ""
            rows.append((what, f"{loss:.4f} nats per token, perplexity {math.exp(min(loss, 700)):.2f}{extra}"))
    for found in facts.origin["evaluations"]:
        measures = ", ".join(
            f"{key.replace('_', ' ')} {value:.4f}" for key, value in found.items() if isinstance(value, float)
        )
        name = f"{found['split']} split" if "split" in found else found["task"]
        rows.append((name, f"{measures} ({_extent(found)})"))
    return _table(rows) if rows else "None was recorded with these weights.\n"


def _extent(found: dict[str, Any]) -> str:
    """What an evaluation is of."""
    if "tokens" in found:
        return f"{found['tokens']:,} tokens"
    first = f", the first {found['limit']:,} of each file" if "limit" in found else ""
    return f"{found['examples']:,} examples{first}"


def _license(facts: CardFacts) -> str:
    said = f"`{facts.license}`" if facts.license != NO_LICENSE else "not stated by who exported them"
    return (
        "## Licence\n\nThe code in this folder (`*_switchall.py`) is under Apache-2.0 (`LICENSE`). The weights: "
        f"{said}.\n"
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]) + "\n"
