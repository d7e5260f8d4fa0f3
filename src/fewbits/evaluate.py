"""How good is a model: perplexity, and what quantization changed, each with its standard error.

Windows are the unit of sampling: tokens of one window depend on each other, so errors are computed over
windows, by the ratio estimator (Cochran, Sampling Techniques, 1977, eq. 6.13). Flips are the share of
tokens whose correctness changed (Dutta et al. 2024, arXiv 2407.09141): equal accuracy can hide many.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.checkpoint import resolve
from fewbits.errors import InputError, first_line
from fewbits.estimate import Estimate, exp_estimate, percentile_estimate, ratio_estimate
from fewbits.load import load
from fewbits.text import Text, read_text, windows

Progress = Callable[[str, int, int], None]  # what, how many done, of how many

DEFAULT_LENGTH = 2048
_LOGITS = 2**26  # logits held at a time for one model: 256 MB in float32; not tuned
_TOKENS = 2**12  # run at a time, at least one window; not tuned


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` measured.

    Args:
        perplexity: exp of the mean negative log-likelihood per predicted token.
        kl: mean KL(reference || model) per token, in nats; None without a reference, as are the rest.
        kl_99: its 99th percentile over tokens.
        top1_agreement: share of tokens on whose most likely successor both agree.
        flips: share of tokens that one of them predicts rightly and the other not.
        perplexity_ratio: model over reference, paired by window.
        tokens, windows, length: how much was measured; tokens are those predicted.
        text, text_sha256: on what.
    """

    perplexity: Estimate
    kl: Estimate | None
    kl_99: Estimate | None
    top1_agreement: Estimate | None
    flips: Estimate | None
    perplexity_ratio: Estimate | None
    tokens: int
    windows: int
    length: int
    text: str
    text_sha256: str

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def evaluate(
    model: str | Path | Any,
    reference: str | Path | Any | None = None,
    *,
    text: str | Path | Text,
    length: int | None = None,
    limit: int | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Evaluation:
    r"""Perplexity of a model on a text; against a reference also KL, agreement and flips.

    Args:
        model: folder, hub id, or a model that is loaded already.
        reference: what it should behave like, usually the float model.
        text: see `read_text`.
        length: of the windows in tokens; 2048 by default, at most the model's context.
        limit: evaluate at most so many windows, evenly spread.
        tokenizer: the model's own by default; needed if `model` is no folder.

    Raises:
        InputError: text or model cannot be had, or the two models have different vocabularies.

    >>> stories = Text("two lines", ["import os\nimport sys\n", "def main():\n    pass\n"])
    >>> result = evaluate("reference/model", "reference/model", text=stories)
    >>> result.windows, result.kl.value, result.top1_agreement.value
    (2, 0.0, 1.0)
    """
    text = text if isinstance(text, Text) else read_text(text)
    tokenizer = tokenizer or load_tokenizer(model)
    network = _loaded(model)
    other = None if reference is None else _loaded(reference)
    context = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    length = min(n for n in (length or DEFAULT_LENGTH, context) if n)
    if length < 3:
        raise InputError(f"length is {length}; windows need at least 3 tokens")
    pieces = windows(text, tokenizer, length)
    if limit is not None:
        pieces = pieces[:: max(1, math.ceil(len(pieces) / limit))]
    if not pieces:
        raise InputError(f"{text.name} holds no window of 2 tokens")
    vocabulary = network.config.get_text_config().vocab_size
    largest = max(int(piece.max()) for piece in pieces)
    if largest >= vocabulary:
        raise InputError(f"the tokenizer gives token {largest}, but the model knows only {vocabulary}")
    counts = []
    done = 0
    for batch in _batches(pieces, vocabulary):
        counts += _measure(network, other, batch)
        done += len(batch)
        if progress is not None:
            progress("evaluate", done, len(pieces))
    return _summarize(counts, text, length)


def load_tokenizer(model: str | Path | Any) -> Any:
    """The tokenizer beside a model.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    where = model if isinstance(model, str | Path) else model.config.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(where))
    except InputError:
        raise
    except Exception as error:  # a missing tokenizer shows itself in many ways
        reason = first_line(error)
        raise InputError(f"{where} has no tokenizer that can be read: {reason}") from None
    if len(tokenizer) < 2:  # transformers makes an empty one where there are no files
        raise InputError(f"{where} has no tokenizer")
    return tokenizer


def _loaded(model: str | Path | Any) -> Any:
    return load(model) if isinstance(model, str | Path) else model


def _batches(pieces: list[Tensor], vocabulary: int) -> Iterator[list[Tensor]]:
    """Windows of similar length together, bounded by the memory for their logits."""
    ordered = sorted(pieces, key=len)
    batch: list[Tensor] = []
    for piece in ordered:
        tokens = (len(batch) + 1) * len(piece)
        if batch and (tokens * vocabulary > _LOGITS or tokens > _TOKENS):
            yield batch
            batch = []
        batch.append(piece)
    yield batch


@dataclass(frozen=True, slots=True)
class _Window:
    """Sums over the predicted tokens of one window; kl per token."""

    tokens: int
    loss: float
    reference_loss: float = 0.0
    kl: Tensor | None = None
    agreed: int = 0
    flipped: int = 0


@torch.no_grad()
def _measure(model: Any, reference: Any | None, batch: list[Tensor]) -> list[_Window]:
    # Padding on the right is invisible to what stands on its left.
    ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(model.device)
    logits = model(ids, use_cache=False).logits
    other = logits if reference is model else None
    if reference is not None and other is None:
        other = reference(ids, use_cache=False).logits
    if other is not None and other.shape != logits.shape:
        raise InputError(
            f"the model predicts {logits.shape[-1]} tokens, the reference {other.shape[-1]}; "
            "accepted are two models with one vocabulary"
        )
    results = []
    for i, piece in enumerate(batch):
        n = len(piece) - 1
        target = ids[i, 1 : n + 1]
        log_p = F.log_softmax(logits[i, :n].float(), -1)
        loss = F.nll_loss(log_p, target, reduction="sum").item()
        if other is None:
            results.append(_Window(n, loss))
            continue
        log_q = F.log_softmax(other[i, :n].float(), -1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        ours, theirs = log_p.argmax(-1), log_q.argmax(-1)
        flipped = (ours == target) != (theirs == target)
        reference_loss = F.nll_loss(log_q, target, reduction="sum").item()
        agreed = int((ours == theirs).sum())
        results.append(_Window(n, loss, reference_loss, kl.cpu(), agreed, int(flipped.sum())))
    return results


def _summarize(counts: list[_Window], text: Text, length: int) -> Evaluation:
    tokens = torch.tensor([c.tokens for c in counts], dtype=torch.float64)

    def mean(values: list[float]) -> Estimate:
        return ratio_estimate(torch.tensor(values, dtype=torch.float64), tokens)

    loss = mean([c.loss for c in counts])
    kl = kl_99 = agreement = flips = ratio = None
    if counts[0].kl is not None:
        per_token = [c.kl for c in counts if c.kl is not None]
        kl = mean([float(k.double().sum()) for k in per_token])
        kl_99 = percentile_estimate(per_token, 0.99)
        agreement = mean([float(c.agreed) for c in counts])
        flips = mean([float(c.flipped) for c in counts])
        ratio = exp_estimate(mean([c.loss - c.reference_loss for c in counts]))
    return Evaluation(
        exp_estimate(loss), kl, kl_99, agreement, flips, ratio,
        int(tokens.sum()), len(counts), length, text.name, text.sha256,
    )  # fmt: skip
