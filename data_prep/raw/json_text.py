"""The text of a JSON record."""

import json
from typing import Any

import orjson

from data_prep.raw.file_kinds import BYTE_ORDER_MARK
from data_prep.raw.records import NoText

NAMED_KEYS = 20
KEY_CHARACTERS = 40


def json_record(line: bytes) -> dict[str, Any]:
    """The object of a line; byte order marks before it are passed over. Raises NoText."""
    begin = 0
    while line.startswith(BYTE_ORDER_MARK, begin):
        begin += len(BYTE_ORDER_MARK)
    try:
        record = _parsed(line[begin:])
    except UnicodeDecodeError as error:
        raise NoText("not UTF-8", f"byte {begin + error.start} of the line: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise NoText("not JSON", str(error)) from None
    if not isinstance(record, dict):
        raise NoText("not JSON", f"expected an object, found {type(record).__name__}")
    return record


def _parsed(line: bytes) -> object:
    """A JSON value. Raises ValueError, UnicodeDecodeError if it is not UTF-8, or RecursionError."""
    try:
        return orjson.loads(line)  # twice as fast; refuses more: NaN, 1e999, half of a surrogate pair
    except ValueError:
        # json.loads would take bytes too, but lets surrogates in UTF-8 pass and guesses UTF-16.
        return json.loads(line.decode("utf-8"))


KINDS: dict[type, str] = {dict: "an object", list: "a list", bool: "true or false"}


def text_in(record: dict[str, Any], key: str) -> bytes:
    """The text of a record at a dotted key, in UTF-8: the key itself or, if there is none, `a` and in it `b` for a.b.
    Raises NoText, with the keys that there are."""
    text = record.get(key)
    if text is None and "." in key:
        text = record
        for part in key.split("."):
            text = text.get(part) if isinstance(text, dict) else None
    if not isinstance(text, str):
        what = f"the key `{key}` is missing"
        if text is not None:
            what = f"`{key}` is {KINDS.get(type(text), 'a number')}, not a string"
        elif key in record:
            what = f"`{key}` is null, not a string"
        raise NoText("no text", f"{what}; keys found: {named(dotted_keys(record))}")
    if not text or text.isspace():
        raise NoText("empty", "the text is empty or blank")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        message = "the text holds half of a UTF-16 surrogate pair, which is no character"
        raise NoText("not UTF-8", message) from None


def dotted_keys(record: dict[str, Any], before: str = "") -> list[str]:
    """The keys of a record and of the objects in it, as `text_key` takes them."""
    keys = []
    for key, value in record.items():
        if isinstance(value, dict) and value and before.count(".") < 3:
            keys += dotted_keys(value, f"{before}{key}.")
        else:
            keys.append(f"{before}{key}")
    return keys


def named(names: list[str]) -> str:
    """Names for a message, of which there may be many."""
    shown = [name.encode("utf-8", "replace").decode()[:KEY_CHARACTERS] for name in names[:NAMED_KEYS]]
    more = f" and {len(names) - NAMED_KEYS} more" if len(names) > NAMED_KEYS else ""
    return ", ".join(shown) + more if shown else "none"
