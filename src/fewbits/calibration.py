"""The tokens that statistics are collected on, and whether they are enough and of the right kind.

Documents are packed without padding, one after the other, and cut into samples of one length. Where no
text is at hand the model writes its own, from BOS at temperature 1.
"""

import hashlib
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import InputError
from fewbits.structure import quiet_transformers
from fewbits.tensor import Note
from fewbits.text import Text, is_hub, iter_documents, read_text, tokenize

Progress = Callable[[str, int, int], None]  # what, how many done, of how many

SELF = "self"  # the source that is the model itself
SEEDS = 2**63  # seeds are below: torch and JSON readers hold them as 64-bit integers
DEFAULT_SAMPLES, DEFAULT_LENGTH = 128, 2048  # Frantar et al. 2022, arXiv 2210.17323, section 4
_READ = 4  # times the tokens asked for are read from the hub, to draw from; not tuned
_CACHED = 2**14  # tokens in the cache while the model writes: 2 GB for Llama-3-8B; not tuned
_RUN = 32  # tokens; the same as before in a row are a repetition; not tuned
_REPEATED = 0.1  # share of repeated runs that is warned of; not tuned
_UNKNOWN = 0.01  # share of unknown tokens that is warned of; not tuned
_AT_ONCE = 8  # windows; not tuned
_COMPARED = 32, 32  # windows, and tokens of each, that perplexities are measured on; not tuned
# Perplexity ratio that is warned of. On three small models, 2026-11-24: 0.5 to 2.4 on text like the one
# they were trained on, 11 to 271 on other text (WikiText, C4, TinyStories, Python).
_FAR = 4.0


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Token ids to collect statistics on, and where they come from.

    Args:
        ids: (samples, length) int64, no padding.
        source: short: the name of a file, hub:..., or "self".
        seed: of the draw.
        notes: what was left out or replaced on the way.

    Raises:
        InputError: ids of another type or shape.

    >>> Calibration(torch.tensor([[1, 2, 3]]), "by hand", 0).to_json()["tokens"]
    3
    """

    ids: Tensor
    source: str
    seed: int
    notes: tuple[Note, ...] = ()

    def __post_init__(self) -> None:
        if self.ids.dtype != torch.int64 or self.ids.ndim != 2 or not self.ids.numel():
            raise InputError(
                f"calibration ids are {tuple(self.ids.shape)} {self.ids.dtype}; "
                "accepted is (samples, length) torch.int64"
            )

    @property
    def sha256(self) -> str:
        """Of the shape and the ids, little-endian."""
        ids = self.ids.numpy().astype("<i8")
        return hashlib.sha256(f"{ids.shape}".encode() + ids.tobytes()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        samples, length = self.ids.shape
        return {
            "source": self.source,
            "samples": samples,
            "length": length,
            "tokens": samples * length,
            "seed": self.seed,
            "sha256": self.sha256,
        }


def read_calibration(
    source: str | Path | Text | Tensor | Calibration,
    tokenizer: Any,
    *,
    model: Any = None,
    context: int | None = None,
    vocabulary: int | None = None,
    samples: int = DEFAULT_SAMPLES,
    length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Draw samples from a text, or let the model write them.

    Args:
        source: what `read_text` takes, a `Text`, "self" (the model's own text), or token ids
            (samples, length) that are taken whole, as is what was read before.
        tokenizer: the model's; None will do for token ids.
        model: a loaded transformers model, which "self" needs.
        context: most tokens of a sample; the model's by default.
        vocabulary: how many tokens the model knows; the model's by default.
        samples: how many.
        length: tokens of each; 2048 by default, at most the context.
        seed: of the draw; another one gives other samples, or the same in another order if there
            are no more.
        progress: called with (what, tokens done, tokens asked for).

    Raises:
        InputError: text that cannot be had or is too short, samples longer than the context, tokens
            that the model does not know, a model that cannot write, or a seed that is none.

    >>> class Letters:
    ...     bos_token_id, eos_token_id = 0, None
    ...     def __call__(self, text, **options):
    ...         return {"input_ids": [ord(letter) - 96 for letter in text]}
    >>> read_calibration(Text("two", ["abc", "de"]), Letters(), samples=1, length=7).ids
    tensor([[0, 1, 2, 3, 0, 4, 5]])
    """
    check_seed(seed)
    config = None if model is None else model.config.get_text_config()
    context = context or getattr(config, "max_position_embeddings", None)
    vocabulary = vocabulary or getattr(config, "vocab_size", None)
    whole = Calibration(source.cpu(), "token ids", seed) if isinstance(source, Tensor) else source
    if isinstance(whole, Calibration):
        samples, length = whole.ids.shape
    length = min(DEFAULT_LENGTH, context or DEFAULT_LENGTH) if length is None else length
    if samples < 1 or length < 2:
        raise InputError(f"calibration needs samples >= 1 of length >= 2, not {samples} of {length}")
    if context is not None and length > context:
        raise InputError(f"samples of {length} tokens; accepted is the model's context, {context}")
    if isinstance(whole, Calibration):
        found = whole
    elif whole == SELF:
        found = _written(model, tokenizer, samples, length, seed, progress)
    else:
        found = _packed(whole, tokenizer, samples, length, seed, progress)
    least, largest = int(found.ids.min()), int(found.ids.max())
    if vocabulary is not None and (least < 0 or largest >= vocabulary):
        wrong = least if least < 0 else largest
        raise InputError(f"{found.source} gives token {wrong}, but the model knows only {vocabulary}")
    return found


def check_seed(seed: int) -> None:
    """Whether a seed is one.

    Raises:
        InputError: it is negative, or too large for torch.
    """
    if not 0 <= seed < SEEDS:
        raise InputError(f"seed is {seed}; accepted are numbers from 0 to {SEEDS - 1}")


def _packed(
    source: str | Path | Text,
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    progress: Progress | None,
) -> Calibration:
    """Samples drawn from the windows of all documents, one after the other."""
    needed, most = samples * length, math.inf
    if not isinstance(source, Text) and is_hub(source):
        name, documents, most = str(source), iter_documents(source), _READ * needed
    else:
        text = source if isinstance(source, Text) else read_text(source)
        name, documents = text.name, iter(text.documents)
    before, after, notes = _marks(tokenizer)
    stream = array("q")
    for number, document in enumerate(documents, 1):
        ids = tokenize(document, tokenizer)
        if ids:  # a chat template may have written the marks itself
            stream.extend(before if ids[:1] != before else [])
            stream.extend(ids)
            stream.extend(after if ids[-1:] != after else [])
        if progress is not None:
            progress("calibration", min(len(stream), needed), needed)
        if len(stream) >= most:
            what = f"drawn from the first {number} documents of {name}, {len(stream)} tokens"
            notes.append(Note("fact", "calibration", what))
            break
    count = len(stream) // length
    if count < samples:
        fewer = f"at most {count}, " if count else ""
        raise InputError(
            f"{name} holds {count} samples of {length} tokens; --samples {samples} was asked for; "
            f"accepted are {fewer}shorter samples, or more text"
        )
    windows = torch.frombuffer(stream, dtype=torch.int64, count=count * length).view(count, length)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return Calibration(windows[drawn], name, seed, tuple(notes))


def _marks(tokenizer: Any) -> tuple[list[int], list[int], list[Note]]:
    """What stands before and after a document."""
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id], [], []
    if tokenizer.eos_token_id is not None:
        what = "the tokenizer has no BOS: EOS follows each text, and begins the model's own"
        return [], [tokenizer.eos_token_id], [Note("fallback", "calibration", what)]
    what = "the tokenizer has no BOS and no EOS: nothing separates documents"
    return [], [], [Note("fallback", "calibration", what)]


@torch.no_grad()
def _written(
    model: Any, tokenizer: Any, samples: int, length: int, seed: int, progress: Progress | None
) -> Calibration:
    """Samples that the model writes at temperature 1; where a text ends the next one begins."""
    from transformers import GenerationConfig, LogitsProcessorList

    if model is None:
        raise InputError(f"calibration {SELF!r} needs the loaded model; accepted without it are texts")
    before, after, notes = _marks(tokenizer)
    if not before + after:
        raise InputError("the model cannot write its own text: its tokenizer has no BOS and no EOS")
    start, own = (before + after)[0], model.generation_config
    # Takes its place, or it would fill all that is left open here: top_p, what ends a text, and more.
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length - 1)  # type: ignore[no-untyped-call]
    listed = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = {*listed, tokenizer.eos_token_id} - {None, start}
    last = torch.tensor(sorted(ends), dtype=torch.int64, device=model.device)

    def restart(ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise InputError("the model cannot write its own text: its logits are not numbers")
        ended = torch.isin(ids[:, -1], last)
        scores[ended] = -torch.inf
        scores[ended, start] = 0
        return scores

    devices = [model.device] if model.device.type == "cuda" else []
    size = max(1, _CACHED // length)
    batches: list[Tensor] = []
    try:
        model.generation_config = settings
        with quiet_transformers(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for done in range(0, samples, size):
                ids = torch.full((min(size, samples - done), 1), start, device=model.device)
                rules = LogitsProcessorList([restart])
                text = model.generate(
                    ids, attention_mask=ids.new_ones(ids.shape), logits_processor=rules
                )
                batches.append(text.cpu())
                if progress is not None:
                    progress("calibration", (done + len(ids)) * length, samples * length)
    finally:
        model.generation_config = own
    return Calibration(torch.cat(batches), SELF, seed, tuple(notes))


# -- is it enough, and of the right kind ------------------------------------------------------------


def check_calibration(
    calibration: Calibration,
    *,
    widths: dict[str, int],
    experts: tuple[int, int] | None,
    tokenizer: Any,
    model: Any = None,
    expert_width: int | None = None,
) -> list[Note]:
    """What can be said about calibration before the work; what needs attention begins with "warning".

    Args:
        calibration: what was read.
        widths: in features of each matrix, by name.
        experts: how many a block has, and to how many of them each token is sent.
        tokenizer: the model's, or None.
        model: loaded and in float: it writes 32 x 32 tokens and is run on as many of the text.
        expert_width: in features of the experts' widest matrix; the widest of all by default.

    Returns:
        The calibration's own notes, and one for each check.
    """
    ids, widest = calibration.ids, max(widths, key=lambda name: widths[name])
    notes = [*calibration.notes, _rank(ids, widths[widest], f"{widest}, the widest"), _repetition(ids)]
    if experts is not None:
        count, chosen = experts
        each = f"each of {count} experts, were all chosen alike"
        notes.append(_rank(ids, expert_width or widths[widest], each, chosen, count))
    if tokenizer is None:
        return [*notes, Note("skip", "calibration", "unknown tokens not counted: no tokenizer given")]
    notes.append(_unknown(ids, tokenizer))
    if calibration.source == SELF:
        return [*notes, _fact("the text is the model's own")]
    unable = "the model is not loaded" if model is None else "no BOS and no EOS to begin with"
    if model is None or tokenizer.bos_token_id is None is tokenizer.eos_token_id:
        what = f"distance from the model's own text not measured: {unable}"
        return [*notes, Note("skip", "calibration", what)]
    try:
        return [*notes, _distance(calibration, tokenizer, model)]
    except InputError as error:  # the blocks run in another precision: no reason to stop
        what = f"distance from the model's own text not measured: {error}"
        return [*notes, Note("skip", "calibration", what)]


def _fact(what: str, warning: bool = False) -> Note:
    return Note("fact", "calibration", f"warning: {what}" if warning else what)


def _rank(ids: Tensor, width: int, whose: str, chosen: int = 1, count: int = 1) -> Note:
    """A Hessian is a sum of one outer product per token: its rank is at most the number of tokens."""
    tokens = ids.numel() * chosen / count
    enough = math.ceil(width * count / (chosen * ids.shape[1]))
    short = (
        f"; a Hessian of full rank takes {enough} samples of {ids.shape[1]}" if tokens < width else ""
    )
    return _fact(f"{tokens:.0f} tokens for the {width} inputs of {whose}{short}", bool(short))


def _repetition(ids: Tensor) -> Note:
    """Samples like an earlier one, and runs of tokens, at every position, like an earlier one."""
    samples, length = ids.shape
    run, size = min(_RUN, length), ids.element_size()
    rows = [row.tobytes() for row in ids.numpy()]
    runs = [hash(row[size * i : size * (i + run)]) for row in rows for i in range(length - run + 1)]
    same, repeated = samples - len(set(rows)), 1 - len(set(runs)) / len(runs)
    what = (
        f"{same} of {samples} samples and {repeated:.1%} of runs of {run} tokens repeat an earlier one"
    )
    return _fact(what, same > 0 or repeated > _REPEATED)


def _unknown(ids: Tensor, tokenizer: Any) -> Note:
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return _fact("the tokenizer has no token of its own for what it does not know")
    count, tokens = int((ids == unknown).sum()), ids.numel()
    share = count / tokens
    return _fact(f"{count} of {tokens} tokens ({share:.2%}) are unknown", warning=share > _UNKNOWN)


def _distance(calibration: Calibration, tokenizer: Any, model: Any) -> Note:
    """Perplexity on the text against that on the model's own, both at the same positions."""
    samples, length = _COMPARED[0], min(_COMPARED[1], calibration.ids.shape[1])
    own = _written(model, tokenizer, samples, length, calibration.seed, None).ids
    losses = [_losses(model, ids) for ids in (calibration.ids[:samples, :length], own)]
    error = math.sqrt(sum(float(loss.var() / len(loss)) for loss in losses if len(loss) > 1))
    means = [loss.mean() for loss in losses]
    perplexity, owns, ratio = (float(mean.exp()) for mean in (*means, means[0] - means[1]))
    near = abs(float(means[0] - means[1])) - 2 * error <= math.log(_FAR)  # false for NaN
    return _fact(
        f"perplexity {perplexity:.4g}, on the model's own text {owns:.4g}; "
        f"ratio {ratio:.3g} ± {ratio * error:.2g}",
        not near,
    )


@torch.no_grad()
def _losses(model: Any, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of each window of ids (n, length), in nats per token."""
    losses = []
    for windows in torch.split(ids.to(model.device), _AT_ONCE):
        logits = model(windows, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
        losses.append(loss.double().mean(1).cpu())
    return torch.cat(losses)
