"""A checkpoint as a model of EleutherAI's lm-evaluation-harness (the package lm_eval, an extra), under the name
`switchall`. Importing this module registers it.

Texts become ids as examples.py says, so this model, lm-evaluation-harness's own `hf` model on an exported folder, and
our tasks give the same numbers. Generation is greedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from pretrain.evaluation.examples import Answer, Encoder, Query, as_query
from pretrain.evaluation.likelihood import LENGTH_STEP, Limits, answer, learned_context, without_memory
from pretrain.evaluation.models import OpenedModel, evaluation_config, open_model
from pretrain.saved_model import find_checkpoint
from pretrain.saved_model.loading import config_of

MOST_NEW_TOKENS = 256
"""Of an answer whose task sets no limit, as in lm-evaluation-harness."""


@register_model("switchall")
class HarnessModel(LM):
    """In one process."""

    def __init__(self, opened: OpenedModel, limits: Limits) -> None:
        super().__init__()
        self._opened, self._limits = opened, limits
        self._encoder, self._tokenizer = Encoder(opened.tokenizer), opened.tokenizer
        self.cut = 0
        """Texts so far whose beginning was cut off, because they are longer than the context."""

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: Any = None) -> HarnessModel:
        """For `lm_eval --model switchall --model_args pretrained=RUN`: also batch_size, device, max_length and data, a
        folder of prepared data. Raises UserError."""
        given = {**arg_dict, **{k: v for k, v in (additional_config or {}).items() if v is not None}}
        checkpoint = find_checkpoint(Path(str(given["pretrained"])))
        batch, data = int(given.get("batch_size") or 16), [str(given["data"])] if "data" in given else []
        saved = config_of(checkpoint)
        config, tokenizer = evaluation_config(checkpoint, saved, data=data, overrides=(), batch=batch, ranks=1)
        opened = open_model(checkpoint, config, tokenizer, torch.device(str(given.get("device") or "cpu")))
        context = int(given.get("max_length") or learned_context(config.model))
        return cls(opened, Limits(batch, context))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> HarnessModel:
        """As `create_from_arg_obj`."""
        pairs = dict(part.split("=", 1) for part in arg_string.split(",") if part)
        return cls.create_from_arg_obj(pairs, additional_config)

    @property
    def tokenizer_name(self) -> str:
        return str(self._opened.checkpoint.path)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p, whether greedy decoding gives it) of each (context, continuation). Raises UserError."""
        pairs = [request.args for request in requests]
        queries = [self._encoder.queries(context, [target])[0] for context, target in pairs]
        found = [(one.log_likelihood, one.is_likeliest) for one in self._answers(queries, disable_tqdm)]
        for pair, result in zip(pairs, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, in windows that share no token but the one before; the first token follows the end
        of another document. Raises UserError."""
        queries: list[Query] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            if not text:
                continue
            start, target = self._encoder.whole(text)
            windows = get_rolling_token_windows(target.tolist(), int(start[0]), self._limits.context, 1)
            own = [as_query(*make_disjoint_window(window)) for window in windows]
            queries += own
            owners += [number] * len(own)
        sums = [0.0] * len(requests)
        for number, one in zip(owners, self._answers(queries, disable_tqdm), strict=True):
            sums[number] += one.log_likelihood
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, up to the first stop sequence of `until` or EOS. Raises UserError for a task that
        draws, or whose texts leave no room in the context for what they continue."""
        found: list[str] = []
        batch = self._limits.batch
        with tqdm(total=len(requests), desc="generate_until", leave=False, disable=disable_tqdm or None) as bar:
            for first in range(0, len(requests), batch):
                some = requests[first : first + batch]
                found += self._continue([request.args for request in some])
                bar.update(len(some))
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found

    def _answers(self, queries: Sequence[Query], quiet: bool) -> list[Answer]:
        with tqdm(total=len(queries), desc="texts", leave=False, disable=quiet or None) as bar:

            def goes_on(done: int) -> bool:
                bar.update(done - bar.n)
                return True

            found = answer(self._opened.evaluator, queries, self._limits, self._opened.place, goes_on=goes_on)
        assert found is not None
        self.cut += found.cut
        if any(one.log_likelihood != one.log_likelihood for one in found.answers):
            raise UserError(f"--harness: the outputs of checkpoint {self._opened.checkpoint.path} are not finite")
        return found.answers

    def _continue(self, pairs: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        wanted = [dict(normalize_gen_kwargs(settings, MOST_NEW_TOKENS)) for _, settings in pairs]
        if any(settings["do_sample"] for settings in wanted):
            raise UserError("--harness: a task draws its texts (do_sample); this model decodes greedily")
        most, context = [settings["max_gen_toks"] for settings in wanted], self._limits.context
        if (longest := max(most)) >= context:
            raise UserError(
                f"--harness: a task wants texts of {longest} tokens (max_gen_toks), and the model looks back over "
                f"{context}: no room is left for what they continue; leave the task out, or set --context to more than "
                f"{longest}, which the model may not have learned"
            )
        prompts = [self._encoder.prompt(text) for text, _ in pairs]
        rows = [prompt[-(context - new) :] for prompt, new in zip(prompts, most, strict=True)]
        self.cut += sum(len(row) < len(prompt) for row, prompt in zip(rows, prompts, strict=True))
        made: list[list[int]] = [[] for _ in rows]

        def ended(row: int) -> bool:
            tokens = made[row]
            if len(tokens) >= most[row] or (tokens and tokens[-1] == self._tokenizer.eos_id):
                return True
            text = self._text(rows[row], tokens)
            return any(stop and stop in text for stop in wanted[row]["until"])

        model: Any = self._opened.evaluator.module
        open_rows = [row for row in range(len(rows)) if most[row] > 0]
        with torch.no_grad(), without_memory(model, len(rows), self._opened.place.device):
            while open_rows:
                texts = [[*rows[row], *made[row]] for row in open_rows]
                following = _likeliest(model, texts, self._tokenizer.vocab_size, self._opened.place.device)
                for row, token in zip(open_rows, following, strict=True):
                    made[row].append(token)
                open_rows = [row for row in open_rows if not ended(row)]
        said = [self._text(rows[row], tokens) for row, tokens in enumerate(made)]
        return [_before(text, settings["until"]) for text, settings in zip(said, wanted, strict=True)]

    def _text(self, prompt: list[int], tokens: list[int]) -> str:
        """What the tokens add to the prompt's text; EOS adds nothing."""
        kept = [token for token in tokens if token != self._tokenizer.eos_id]
        return self._tokenizer.decode([*prompt, *kept])[len(self._tokenizer.decode(prompt)) :]


def _likeliest(model: Any, rows: Sequence[Sequence[int]], num_ids: int, device: torch.device) -> list[int]:
    """The likeliest of the first `num_ids` tokens after each row."""
    length = -(-max(map(len, rows)) // LENGTH_STEP) * LENGTH_STEP
    tokens: Tensor = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    logits, _ = model.logits(tokens)
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    found: list[int] = logits[torch.arange(len(rows), device=device), last, :num_ids].argmax(-1).tolist()
    return found


def _before(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop sequences."""
    return text[: min([text.find(stop) for stop in stops if stop and stop in text], default=len(text))]
