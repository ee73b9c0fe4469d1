"""A checkpoint as a model of EleutherAI's lm-evaluation-harness (the package lm_eval, an extra), under the name
`switchall`. Importing this module registers it.

Texts become ids as examples.py says, so this model, lm-evaluation-harness's own `hf` model on an exported folder, and
our tasks give the same numbers. Texts are greedy unless a task draws them; then prompt and settings decide them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from common.errors import UserError
from common.hashing import number_of
from pretrain.evaluation.examples import Answer, Encoder, Query, as_query
from pretrain.evaluation.greedy import GREEDY, Wanted, write
from pretrain.evaluation.harness_args import ModelArgs, pairs, sampling_of
from pretrain.evaluation.likelihood import Limits, answer, learned_context
from pretrain.evaluation.models import OpenedModel, evaluation_config, open_model
from pretrain.generation.ids import NotFinite
from pretrain.saved_model import find_checkpoint
from pretrain.saved_model.loading import config_of, document_end_of

MOST_NEW_TOKENS = 256
"""Of an answer whose task sets no limit, as in lm-evaluation-harness."""


@register_model("switchall")
class HarnessModel(LM):
    """In one process."""

    def __init__(self, opened: OpenedModel, limits: Limits) -> None:
        super().__init__()
        self._opened, self._limits = opened, limits
        self._encoder = Encoder(opened.tokenizer)
        self.cut = 0
        """Texts so far whose beginning was cut off, because they are longer than the context."""

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: Any = None) -> HarnessModel:
        """For `lm_eval --model switchall --model_args pretrained=RUN`; `ModelArgs` has the others. Raises UserError."""
        parts = (arg_dict, additional_config or {})
        args = ModelArgs.of({key: value for part in parts for key, value in part.items() if value is not None})
        checkpoint, device = find_checkpoint(args.run), args.usable_device()
        saved = config_of(checkpoint)
        config, tokenizer = evaluation_config(
            checkpoint, saved, data=args.data, overrides=(), batch=args.batch, ranks=1
        )
        opened = open_model(checkpoint, config, tokenizer, device, ema=args.ema)
        context = args.context or learned_context(config.model)
        return cls(opened, Limits(args.batch, context, document_end_of(config, tokenizer)))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> HarnessModel:
        """As `create_from_arg_obj`."""
        return cls.create_from_arg_obj(pairs(arg_string), additional_config)

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
        """Continuations up to the first stop sequence of `until` or EOS: greedy, or drawn for a task with `do_sample`,
        each repeat of a question by random numbers of its own. Raises UserError for a task that draws as this model
        cannot, or whose texts leave no room in the context for what they continue."""
        wanted, asked = list[Wanted](), Counter[str]()
        for prompt, given in (request.args for request in requests):
            same = f"{prompt} {given}"
            wanted.append(self._wanted(prompt, given, repeat=asked[same]))
            asked[same] += 1
        model: Any = self._opened.evaluator.module
        with tqdm(total=len(requests), desc="generate_until", leave=False, disable=disable_tqdm or None) as bar:
            try:
                found = write(model, self._opened.tokenizer, wanted, self._limits, after_batch=bar.update)
            except NotFinite:
                raise self._not_finite() from None
        self.cut += found.cut
        for request, text in zip(requests, found.texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found.texts

    def _wanted(self, prompt: str, given: dict[str, Any], *, repeat: int) -> Wanted:
        settings, context = dict(normalize_gen_kwargs(given, MOST_NEW_TOKENS)), self._limits.context
        sampling = sampling_of(settings)
        if (most := settings["max_gen_toks"]) >= context:
            raise UserError(
                f"--harness: a task wants texts of {most} tokens (max_gen_toks), and the model looks back over "
                f"{context}: no room is left for what they continue; leave the task out, or set --context to more than "
                f"{most}, which the model may not have learned"
            )
        sample = 0 if sampling == GREEDY else number_of(prompt) + repeat
        return Wanted(prompt, most, settings["until"], sampling, sample)

    def _answers(self, queries: Sequence[Query], quiet: bool) -> list[Answer]:
        with tqdm(total=len(queries), desc="texts", leave=False, disable=quiet or None) as bar:

            def goes_on(done: int) -> bool:
                bar.update(done - bar.n)
                return True

            found = answer(self._opened.evaluator, queries, self._limits, self._opened.place, goes_on=goes_on)
        assert found is not None
        self.cut += found.cut
        if any(one.log_likelihood != one.log_likelihood for one in found.answers):
            raise self._not_finite()
        return found.answers

    def _not_finite(self) -> UserError:
        return UserError(f"--harness: the outputs of checkpoint {self._opened.checkpoint.path} are not finite")
