"""How good is a model: perplexity, and what quantization changed, each with its standard error.

Windows are the unit of sampling: tokens of one window depend on each other, so errors are computed over
windows (`estimate`). Flips are the share of tokens whose correctness changed (Dutta et al. 2024,
arXiv 2407.09141): equal accuracy can hide many.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.calibration import SELF, Calibration, check_seed, read_calibration
from fewbits.checkpoint import CONFIG, LEDGER, carried_files, check_config, read_json, resolve
from fewbits.errors import InputError, first_line
from fewbits.estimate import Estimate, exp_estimate, percentile_estimate, ratio_estimate
from fewbits.gguf_header import read_header
from fewbits.load import find_gguf, load
from fewbits.ranks import ALONE, Ranks
from fewbits.structure import quiet_transformers, skeleton, text_config
from fewbits.text import Text, read_text, windows
from fewbits.untrusted import check_file

Progress = Callable[[str, int, int], None]  # what, how many done, of how many

DEFAULT_LENGTH = 2048
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_MAX_TOKENIZER = 2**28  # bytes of a file; vocabularies of 260,000 tokens take 3 * 10**7
_LOGITS = 2**26  # logits held at a time for one model: 256 MB in float32; not tuned
_TOKENS = 2**12  # run at a time, at least one window; not tuned
_FIRST_BIN = 16  # positions; every further bin doubles the length of text before it. Not tuned.


@dataclass(frozen=True, slots=True)
class PositionKL:
    """Mean KL of the tokens at positions start <= i < stop of their windows."""

    start: int
    stop: int
    kl: Estimate


@dataclass(frozen=True, slots=True)
class PerWindow:
    """Sums over the predicted tokens of each window, shortest window first; for paired differences."""

    tokens: tuple[int, ...]
    loss: tuple[float, ...]
    reference_loss: tuple[float, ...]
    kl: tuple[float, ...]
    agreed: tuple[int, ...]
    flipped: tuple[int, ...]


Measure = Literal["loss", "kl", "agreed", "flipped"]


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
        kl_by_position: how KL goes with the length of the text before a token.
        per_window: what the means were made from.
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
    kl_by_position: tuple[PositionKL, ...] = ()
    per_window: PerWindow | None = field(default=None, repr=False)

    def to_json(self, per_window: bool = False) -> dict[str, Any]:
        """For `--json`; with sums per window to be read back by `from_json`."""
        value = asdict(self)
        if not per_window:
            del value["per_window"]
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        value = dict(value)
        for name in _ESTIMATES:
            value[name] = None if value[name] is None else Estimate(**value[name])
        value["kl_by_position"] = tuple(
            PositionKL(b["start"], b["stop"], Estimate(**b["kl"])) for b in value["kl_by_position"]
        )
        sums = value.get("per_window")
        value["per_window"] = (
            None if sums is None else PerWindow(**{k: tuple(v) for k, v in sums.items()})
        )
        return cls(**value)

    def difference(self, other: Self, measure: Measure) -> Estimate:
        """The mean of a measure per token here minus there, paired by window.

        Args:
            other: of another model, on the same windows.
            measure: "loss" in nats (its exp is the ratio of perplexities), "kl" in nats, "agreed" or
                "flipped" as shares.

        Raises:
            InputError: they were not measured on the same windows.
        """
        ours, theirs = self.per_window, other.per_window
        same = self.text_sha256 == other.text_sha256 and ours is not None and theirs is not None
        if not same or ours is None or theirs is None or ours.tokens != theirs.tokens:
            raise InputError(
                f"{self.windows} windows of {self.text} and {other.windows} of {other.text} cannot be "
                "paired; accepted are evaluations on the same windows"
            )
        if measure != "loss" and (self.kl is None or other.kl is None):
            raise InputError(f"{measure} was not measured; accepted are evaluations against a reference")
        pairs = zip(getattr(ours, measure), getattr(theirs, measure), strict=True)
        sums = torch.tensor([a - b for a, b in pairs], dtype=torch.float64)
        return ratio_estimate(sums, torch.tensor(ours.tokens, dtype=torch.float64))


_ESTIMATES = ("perplexity", "kl", "kl_99", "top1_agreement", "flips", "perplexity_ratio")


def evaluate(
    model: str | Path | Any,
    reference: str | Path | Any | None = None,
    *,
    text: str | Path | Text | Calibration,
    length: int | None = None,
    limit: int | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    r"""Perplexity of a model on a text; against a reference also KL, agreement and flips.

    Args:
        model: folder, hub id, or a model that is loaded already.
        reference: what it should behave like, usually the float model.
        text: see `read_text`; or samples of token ids, each a window.
        length: of the windows in tokens; that of the samples, or 2048, at most the model's context, by
            default.
        limit: evaluate at most so many windows, evenly spread.
        tokenizer: the model's own by default; needed if `model` is no folder.
        ranks: processes that call this together, each with the same models; they share the windows.

    Raises:
        InputError: text or model cannot be had, the two models have different vocabularies, or windows
            are longer than the context of one of them.

    >>> stories = Text("two lines", ["import os\nimport sys\n", "def main():\n    pass\n"])
    >>> result = evaluate("reference/model", "reference/model", text=stories)
    >>> result.windows, result.kl.value, result.top1_agreement.value
    (2, 0.0, 1.0)
    """
    text = read_text(text) if isinstance(text, str | Path) else text
    network = _loaded(model)
    other = None if reference is None else _loaded(reference)
    contexts = [
        context_of(each.config.get_text_config()) for each in (network, other) if each is not None
    ]
    context = min((n for n in contexts if n is not None), default=None)
    if length is None and isinstance(text, Calibration):
        length = text.ids.shape[1]
    elif length is None:
        length = DEFAULT_LENGTH if context is None else min(DEFAULT_LENGTH, context)
    check_windows(length, limit, context)
    if isinstance(text, Calibration):
        pieces = [ids[:length] for ids in text.ids]
    else:
        pieces = windows(text, tokenizer or load_tokenizer(model), length)
    name = text.source if isinstance(text, Calibration) else text.name
    if limit is not None:
        pieces = pieces[:: max(1, math.ceil(len(pieces) / limit))]
    if not pieces:
        raise InputError(f"{name} holds no window of 2 tokens")
    vocabulary = network.config.get_text_config().vocab_size
    largest = max(int(piece.max()) for piece in pieces)
    if largest >= vocabulary:
        raise InputError(f"the tokenizer gives token {largest}, but the model knows only {vocabulary}")
    _check_alike(text.sha256, len(pieces), ranks)
    counts = _measure_all(network, other, list(_batches(pieces, vocabulary)), progress, ranks)
    return _summarize(counts, name, text.sha256, length)


def _check_alike(sha256: str, count: int, ranks: Ranks) -> None:
    """Whether all ranks have the same windows."""
    for rank, found in enumerate(ranks.gather([sha256, count])):
        if found != [sha256, count]:
            raise InputError(
                f"ranks {ranks.rank} and {rank} have other texts; accepted is one that all ranks see"
            )


def context_of(config: Any) -> int | None:
    """Most tokens that a language model can be given; None where its config does not tell."""
    context: int | None = getattr(config, "max_position_embeddings", None)
    return context


def check_windows(length: int | None, limit: int | None, context: int | None) -> None:
    """Whether windows can be so long and so many, for a model of that context.

    Raises:
        InputError: they cannot.
    """
    if length is not None and length < 3:
        raise InputError(f"length is {length}; windows need at least 3 tokens")
    if length is not None and context is not None and length > context:
        raise InputError(
            f"windows of {length} tokens; accepted are at most the model's context, {context}"
        )
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; accepted are numbers of windows from 1")


def load_tokenizer(model: str | Path | Any) -> Any:
    """The tokenizer beside a model, or in its GGUF file. Code that it brings is never run.

    Raises:
        InputError: there is none, it needs code of its own, or a file of it is a link out of the folder.
    """
    from transformers import AutoTokenizer

    where = model if isinstance(model, str | Path) else model.config.name_or_path
    path = resolve(where)
    folder = path if path.is_dir() else path.parent
    _check_tokenizer(folder)
    file, more = find_gguf(path), {}
    # Beside a file that is named lies perhaps another's; ours has the source's own files beside it.
    strange = path.is_file() and not (folder / LEDGER).is_file()
    beside = any((folder / name).is_file() for name in _TOKENIZERS)
    if file is not None and (strange or not beside):
        read_header(file)  # strictly, before transformers does
        more = {"gguf_file": file.name}
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True, **more
            )
        size = len(tokenizer)
    except Exception as error:  # a missing tokenizer shows itself in many ways
        reason = first_line(error)
        raise InputError(f"{where} has no tokenizer that can be read: {reason}") from None
    if size < 2:  # transformers makes an empty one where there are no files
        raise InputError(f"{where} has no tokenizer")
    return tokenizer


def _check_tokenizer(folder: Path) -> None:
    """What transformers reads beside a model, and does not check before it reads."""
    for name in carried_files(folder):
        if check_file(folder / name, folder) > _MAX_TOKENIZER:
            raise InputError(
                f"{folder / name} is larger than {_MAX_TOKENIZER} bytes, which are accepted"
            )
    for name in (CONFIG, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if not (folder / name).is_file():
            continue
        value = read_json(folder / name)
        if name == CONFIG:
            check_config(folder / name, value)
        if name == "tokenizer_config.json" and _needs_code(value):
            raise InputError(
                f"{folder / name} asks for code of the checkpoint (auto_map), which is never run; "
                "accepted is a tokenizer that transformers knows"
            )


def _needs_code(value: dict[str, Any]) -> bool:
    """Whether a tokenizer says that it is code of its own, and not of a class that transformers has."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    named = value.get("tokenizer_class")
    known = isinstance(named, str) and tokenizer_class_from_name(named) is not None
    return "auto_map" in value and not known


def read_calibration_of(
    folder: Path,
    source: str | Path | Text | Tensor | Calibration,
    samples: int,
    length: int | None,
    seed: int,
    progress: Progress | None,
    most: int | None = None,
) -> Calibration:
    """`read_calibration` for a checkpoint's own tokenizer and context; it is loaded where it writes.

    Args:
        most: tokens of a sample where no length is given, if the context holds as many.
    """
    check_seed(seed)  # before a tokenizer or a model is loaded for nothing
    config = text_config(skeleton(read_json(folder / CONFIG)))
    context = context_of(config)
    if length is None and most is not None:
        length = min(most, context or most)
    return read_calibration(
        source,
        None if isinstance(source, Tensor | Calibration) else load_tokenizer(folder),
        model=load(folder) if isinstance(source, str) and source == SELF else None,
        context=context,
        vocabulary=config.vocab_size,
        samples=samples,
        length=length,
        seed=seed,
        progress=progress,
    )


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

    def to_json(self) -> dict[str, Any]:
        """All but the tensor."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "kl"}


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


def _measure_all(
    model: Any,
    reference: Any | None,
    batches: list[list[Tensor]],
    progress: Progress | None,
    ranks: Ranks,
) -> list[_Window]:
    """Of all windows in their order: each rank measures its batches."""
    own: dict[int, list[_Window]] = {}
    done, total = 0, sum(map(len, batches))
    for first in range(0, len(batches), ranks.count):
        i = first + ranks.rank
        if i < len(batches):
            own[i] = _measure(model, reference, batches[i])
        done += sum(map(len, batches[first : first + ranks.count]))  # about as far are the others
        if progress is not None:
            progress("evaluate", done, total)
    told = {i: [replace(window, kl=None).to_json() for window in found] for i, found in own.items()}
    tensors = [window.kl for found in own.values() for window in found if window.kl is not None]
    windows: dict[int, list[_Window]] = {}
    for value, kls in ranks.exchange(told, tensors):
        left = list(kls)
        for i, found in value.items():
            kept = [_Window(**window) for window in found]
            windows[int(i)] = [replace(w, kl=left.pop(0)) if left else w for w in kept]
    return [window for i in range(len(batches)) for window in windows[i]]


def _summarize(counts: list[_Window], text: str, sha256: str, length: int) -> Evaluation:
    tokens = torch.tensor([c.tokens for c in counts], dtype=torch.float64)

    def mean(values: list[float]) -> Estimate:
        return ratio_estimate(torch.tensor(values, dtype=torch.float64), tokens)

    loss = mean([c.loss for c in counts])
    per_token = [c.kl for c in counts if c.kl is not None]
    kls = [float(k.double().sum()) for k in per_token]
    sums = PerWindow(
        tuple(c.tokens for c in counts),
        tuple(c.loss for c in counts),
        tuple(c.reference_loss for c in counts),
        tuple(kls),
        tuple(c.agreed for c in counts),
        tuple(c.flipped for c in counts),
    )
    kl = kl_99 = agreement = flips = ratio = None
    if per_token:
        kl = mean(kls)
        kl_99 = percentile_estimate(per_token, 0.99)
        agreement = mean([float(c.agreed) for c in counts])
        flips = mean([float(c.flipped) for c in counts])
        ratio = exp_estimate(mean([c.loss - c.reference_loss for c in counts]))
    return Evaluation(
        exp_estimate(loss), kl, kl_99, agreement, flips, ratio,
        int(tokens.sum()), len(counts), length, text, sha256, tuple(_positions(per_token)), sums,
    )  # fmt: skip


def _positions(per_token: list[Tensor]) -> Iterator[PositionKL]:
    """Bins of positions, the first of 16 and each further one as long as all before it."""
    longest, start, stop = max((len(k) for k in per_token), default=0), 0, _FIRST_BIN
    while start < longest:
        parts = [part for k in per_token if len(part := k[start:stop].double())]
        sums = torch.stack([part.sum() for part in parts])
        counts = torch.tensor([float(len(part)) for part in parts], dtype=torch.float64)
        yield PositionKL(start, min(stop, longest), ratio_estimate(sums, counts))
        start, stop = stop, 2 * stop
