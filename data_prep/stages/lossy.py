"""What a SentencePiece model does not give back: decode(encode(text)) beside the text.

Foreign models mostly normalise (SentencePiece's default rule, nmt_nfkc, turns newlines and tabs into blanks, drops
repeated blanks and rewrites symbols) or have no pieces for bytes, so that characters outside their vocabulary are lost.
"""

from common.errors import DataError
from data_prep.config.resolved import ResolvedConfig
from data_prep.config.tokenizer import TokenizerConfig
from data_prep.raw.documents import ID_FORMATS
from data_prep.stages.tokenizer import TextTokenizer, normalizer_name

# What text is made of, and an example of it. Rare characters come last: a model may know the others and not these.
PROBES = {
    "newlines": "one\ntwo",
    "tabs": "one\ttwo",
    "carriage returns": "one\r\ntwo",
    "blanks at the ends": " one ",
    "repeated blanks": "one  two",
    "capitals": "One TWO",
    "symbols": "½ ™ ① … × ±",
    "accents": "e\u0301 é",
    "no-break and zero-width blanks": "one\u00a0two\u200bthree",
    "rare characters": "ﬁ 中 🙂 \u2581",
}
EXAMPLE = "One ½\n\ttwo™ 中"


def losses(tokenizer: TextTokenizer) -> list[str]:
    """Names of PROBES that do not come back as they were; none for a model that keeps every text."""
    return [name for name, text in PROBES.items() if _there_and_back(tokenizer, text) != text]


def _there_and_back(tokenizer: TextTokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text))


def describe_losses(model: bytes, name: str) -> str:
    """One clause on what a serialised model changes, with an example before and after; empty if it changes nothing.
    `name` is what the message calls the model. Raises DataError if it is none."""
    tokenizer = TextTokenizer(model, name=name)
    changed = losses(tokenizer)
    if not changed:
        return ""
    before = next((text for text in (EXAMPLE, *PROBES.values()) if _there_and_back(tokenizer, text) != text), EXAMPLE)
    after = _there_and_back(tokenizer, before)
    bytes_note = "" if tokenizer.has_byte_pieces else ", no pieces for bytes"
    return (
        f"{name} changes text ({', '.join(changed)}; its normaliser is {normalizer_name(model)}{bytes_note}): "
        f"{_visible(before)} comes back as {_visible(after)}"
    )


def _visible(text: str) -> str:
    """In quotes, with what a terminal or a message that is wrapped would swallow as escape sequences."""
    return repr(text).replace("  ", " \\x20")


def check_given_model(resolved: ResolvedConfig) -> str:
    """The warning for a given model that changes text, if `tokenizer.allow_lossy` accepts that or its ids are there
    already; empty for any other model. Raises DataError for a file that is no model, another `vocab_size`, and a loss
    that is not accepted."""
    if resolved.external_model is None:
        return ""
    settings, content = resolved.config.tokenizer, resolved.external_model.read_bytes()
    check_vocab_size(TextTokenizer(content, name=str(resolved.external_model)), settings, str(resolved.external_model))
    found = describe_losses(content, f"tokenizer.model {resolved.external_model}")
    if found and not settings.allow_lossy and resolved.config.format not in ID_FORMATS:
        raise DataError(
            f"{found}; set tokenizer.allow_lossy=true to lose that, or tokenizer.model=null to train a model that "
            "keeps every text"
        )
    return found


def check_vocab_size(tokenizer: TextTokenizer, settings: TokenizerConfig, name: str) -> None:
    """Raises DataError if `vocab_size` is given and is not that of the model."""
    if "vocab_size" in settings.model_fields_set and settings.vocab_size != tokenizer.vocab_size:
        raise DataError(f"{name} has {tokenizer.vocab_size} pieces; set tokenizer.vocab_size to that or leave it out")
