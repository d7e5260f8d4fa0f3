"""Every figure of an evaluation against its definition, written out again in the plainest way."""

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import fewbits
from fewbits.calibration import Calibration
from fewbits.errors import InputError
from fewbits.evaluate import Evaluation, evaluate
from fewbits.text import Text, read_text

REFERENCE = "reference/model"
SHARED = Path(__file__).parent.parent.parent / "shared/data"

VOCABULARY = 11


class Letters:
    bos_token_id = 0

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) - 96 for letter in text]}


class Config:
    vocab_size = VOCABULARY
    max_position_embeddings = 8

    def get_text_config(self):
        return self


class Bigram(nn.Module):
    """A language model whose next token depends on the last one: every figure can be had by hand."""

    def __init__(self, seed):
        super().__init__()
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self.config, self.device = Config(), torch.device("cpu")

    def forward(self, ids, use_cache):
        return type("Output", (), {"logits": self.table[ids]})


TEXT = Text("letters", ["abcabcdefg", "jihgf", "aab", "ddddddddddddd"])


def by_hand(model, reference):
    """Per-window sums, straight from the definitions, in float64."""
    p, q = (F.log_softmax(m.table.double(), -1) for m in (model, reference))
    rows = []
    for document in TEXT.documents:
        ids = [ord(letter) - 96 for letter in document]
        for i in range(0, len(ids), 7):
            piece = [0, *ids[i : i + 7]]
            pairs = list(itertools.pairwise(piece))
            kl = [float((q[a].exp() * (q[a] - p[a])).sum()) for a, _ in pairs]
            agree = [int(p[a].argmax() == q[a].argmax()) for a, _ in pairs]
            flips = [int((p[a].argmax() == b) != (q[a].argmax() == b)) for a, b in pairs]
            rows.append((len(pairs), -sum(float(p[a][b]) for a, b in pairs), kl, agree, flips))
    return rows


def test_every_figure_equals_its_definition():
    model, reference = Bigram(0), Bigram(1)
    result = evaluate(model, reference, text=TEXT, tokenizer=Letters())
    rows = by_hand(model, reference)
    tokens = sum(n for n, *_ in rows)
    close = {"rel": 1e-5}  # float32 logits: about 11 roundings of 6e-8 each, then sums of 31 terms
    assert (result.tokens, result.windows, result.length) == (tokens, len(rows), 8)
    assert result.perplexity.value == pytest.approx(
        math.exp(sum(loss for _, loss, *_ in rows) / tokens), **close
    )
    assert result.kl.value == pytest.approx(sum(sum(kl) for *_, kl, _, _ in rows) / tokens, **close)
    assert result.top1_agreement.value == pytest.approx(sum(sum(a) for *_, a, _ in rows) / tokens)
    assert result.flips.value == pytest.approx(sum(sum(f) for *_, f in rows) / tokens)
    every = sorted(k for *_, kl, _, _ in rows for k in kl)
    assert result.kl_99.value == pytest.approx(every[math.ceil(0.99 * len(every)) - 1], **close)


def test_batching_and_padding_change_nothing(monkeypatch):
    whole = evaluate(Bigram(0), Bigram(1), text=TEXT, tokenizer=Letters())
    monkeypatch.setattr(sys.modules["fewbits.evaluate"], "_TOKENS", 1)  # the name is the function
    single = evaluate(Bigram(0), Bigram(1), text=TEXT, tokenizer=Letters())
    assert single == whole


def test_a_model_compared_with_itself_differs_in_nothing():
    result = evaluate(Bigram(0), Bigram(0), text=TEXT, tokenizer=Letters())
    assert (result.kl.value, result.kl_99.value, result.flips.value) == (0, 0, 0)
    assert (result.top1_agreement.value, result.perplexity_ratio.value) == (1, 1)
    assert result.perplexity_ratio.error == 0  # paired: the text's own variation cancels


def test_models_of_different_vocabularies_are_refused():
    other = Bigram(0)
    other.table = torch.randn(VOCABULARY, 5)
    with pytest.raises(InputError, match="predicts 11 tokens, the reference 5"):
        evaluate(Bigram(0), other, text=TEXT, tokenizer=Letters())


def test_limit_spreads_the_windows_evenly():
    text = Text("many", ["abcdefg"] * 10)
    assert evaluate(Bigram(0), text=text, tokenizer=Letters(), limit=5).windows == 5


# -- real models, against a plain loop ---------------------------------------------------------------

LENGTH = 96


@pytest.fixture(scope="module")
def source():
    """Source text that is shorter, as long and longer than a window."""
    code = Path(fewbits.__file__).parent.joinpath("estimate.py").read_text()
    return Text("code", [code, "import os\n", code[2000:3200]])


@pytest.fixture(scope="module")
def original():
    """By transformers alone, in float32."""
    return AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantized(request):
    """A quantized model whose weights are in float: any linear of PyTorch runs it."""
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    scheme = {"int8": fewbits.QuantScheme(8, "channel"), "int4": fewbits.QuantScheme(4, "group", 128)}
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            rounded = fewbits.quantize_tensor(module.weight.detach(), scheme[request.param])
            module.weight.data = rounded.dequantize()
    return model


def own_windows(documents, folder, length):
    """Token ids cut by hand: BOS in front, if there is one, and a text never goes on from another."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found = []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        while ids:
            piece, ids = bos + ids[: length - len(bos)], ids[length - len(bos) :]
            found += [piece] if len(piece) > 1 else []
    return found


@torch.no_grad()
def plain_perplexity(model, pieces):
    """Token by token: minus the log of the softmax at the token that came."""
    loss, count = 0.0, 0
    for piece in pieces:
        logits = model(torch.tensor([piece])).logits[0].double()
        for i in range(1, len(piece)):
            row = logits[i - 1] - logits[i - 1].max()
            loss -= float(row[piece[i]] - row.exp().sum().log())
            count += 1
    return math.exp(loss / count), count


@torch.no_grad()
def oracle(model, reference, pieces):
    """Per window and token, by the definitions, in float64."""
    for piece in pieces:
        ids, next_ = torch.tensor([piece]), torch.tensor(piece[1:])
        z, y = (network(ids).logits[0, :-1].double() for network in (model, reference))
        p, q = (x.exp() / x.exp().sum(-1, keepdim=True) for x in (z, y))
        kl = (q * (q / p).log()).sum(-1)
        rights = [x.argmax(-1) == next_ for x in (z, y)]
        losses = [-x.gather(-1, next_[:, None])[:, 0].log() for x in (p, q)]
        yield kl, z.argmax(-1) == y.argmax(-1), rights[0] != rights[1], *losses


def test_perplexity_is_that_of_a_plain_loop(source, original):
    found = evaluate(
        original, text=source, length=LENGTH, tokenizer=AutoTokenizer.from_pretrained(REFERENCE)
    )
    perplexity, tokens = plain_perplexity(original, own_windows(source.documents, REFERENCE, LENGTH))
    assert found.tokens == tokens
    assert found.perplexity.value == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models and texts are not here")
def test_perplexity_of_another_model_on_stories_is_that_of_a_plain_loop():
    folder = SHARED / "models/babyllama105"
    stories = read_text(SHARED / "text/tinystories_valid.txt", limit=8)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = evaluate(model, text=stories, length=64, tokenizer=AutoTokenizer.from_pretrained(folder))
    perplexity, tokens = plain_perplexity(model, own_windows(stories.documents, folder, 64))
    assert found.tokens == tokens
    assert found.perplexity.value == pytest.approx(perplexity, rel=1e-4)


def test_all_that_quantization_changed_is_what_the_definitions_say(source, original, quantized):
    found = evaluate(
        quantized,
        original,
        text=source,
        length=LENGTH,
        tokenizer=AutoTokenizer.from_pretrained(REFERENCE),
    )
    pieces = sorted(own_windows(source.documents, REFERENCE, LENGTH), key=len)
    rows = list(oracle(quantized, original, pieces))
    kl, agreed, flipped, ours, theirs = (torch.cat(parts) for parts in zip(*rows, strict=True))
    # Two log-probabilities in float32, each near 10: rounded by 10 x 2^-24 each, for a token.
    close = {"rel": 1e-4, "abs": 2 * 10 * 2**-24}
    assert (found.windows, found.tokens) == (len(pieces), len(kl))
    assert found.kl.value == pytest.approx(float(kl.mean()), **close)
    rank = math.ceil(0.99 * len(kl)) - 1
    assert found.kl_99.value == pytest.approx(float(kl.sort().values[rank]), **close)
    assert found.top1_agreement.value == pytest.approx(float(agreed.double().mean()))
    assert found.flips.value == pytest.approx(float(flipped.double().mean()))
    assert found.perplexity_ratio.value == pytest.approx(float((ours - theirs).mean().exp()), rel=1e-4)
    per_window = found.per_window
    assert per_window.tokens == tuple(len(piece) - 1 for piece in pieces)
    for name, number in (("kl", 0), ("loss", 3), ("reference_loss", 4)):
        sums = [float(row[number].sum()) for row in rows]
        assert getattr(per_window, name) == pytest.approx(sums, rel=1e-4, abs=LENGTH * close["abs"])
    assert per_window.agreed == tuple(int(row[1].sum()) for row in rows)
    assert per_window.flipped == tuple(int(row[2].sum()) for row in rows)
    bins = [(0, 16), (16, 32), (32, 64), (64, LENGTH - 1)]
    assert [(b.start, b.stop) for b in found.kl_by_position] == bins
    for b in found.kl_by_position:
        inside = torch.cat([row[0][b.start : b.stop] for row in rows])
        assert b.kl.value == pytest.approx(float(inside.mean()), **close)


# -- differences -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """Two models that are near each other, against one that is not near."""
    reference, first, second = Bigram(0), Bigram(1), Bigram(1)
    noise = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(2))
    second.table = first.table + 0.1 * noise
    generator = torch.Generator().manual_seed(3)
    letters = torch.randint(97, 97 + VOCABULARY - 1, (60, 30), generator=generator)
    text = Text("letters", ["".join(map(chr, row)) for row in letters.tolist()])
    return [evaluate(m, reference, text=text, tokenizer=Letters()) for m in (first, second)]


@pytest.mark.parametrize("measure", ["loss", "kl", "agreed", "flipped"])
def test_a_difference_is_that_of_the_means_and_the_other_way_round_its_negative(pair, measure):
    first, second = pair
    means = {
        "loss": lambda e: math.log(e.perplexity.value),
        "kl": lambda e: e.kl.value,
        "agreed": lambda e: e.top1_agreement.value,
        "flipped": lambda e: e.flips.value,
    }
    found, back = first.difference(second, measure), second.difference(first, measure)
    assert found.value == pytest.approx(means[measure](first) - means[measure](second), abs=1e-12)
    assert (back.value, back.error) == (-found.value, found.error)


@pytest.mark.parametrize("measure", ["loss", "kl"])
def test_a_paired_difference_is_known_better_than_two_means(pair, measure):
    first, second = pair
    logs = [e.perplexity.error / e.perplexity.value for e in pair]
    alone = math.hypot(*({"loss": logs, "kl": [e.kl.error for e in pair]}[measure]))
    assert first.difference(second, measure).error < alone / 2


def test_the_ratio_of_perplexities_is_the_difference_of_losses_from_the_reference(pair):
    first, _ = pair
    float_ = evaluate_like(first, first.per_window.reference_loss)
    difference = first.difference(float_, "loss")
    assert math.exp(difference.value) == pytest.approx(first.perplexity_ratio.value)
    assert difference.error == pytest.approx(first.perplexity_ratio.error / first.perplexity_ratio.value)


def evaluate_like(evaluation, loss):
    """The same windows, another loss."""
    return replace(evaluation, per_window=replace(evaluation.per_window, loss=tuple(loss)))


def test_paired_differences_cover_the_truth(pair):
    """2,000 pairs of models on 67 windows, 0.3 nats apart; see `test_estimate.py` for the band."""
    generator = torch.Generator().manual_seed(0)
    hits, trials, n = 0, 2000, 67
    for _ in range(trials):
        tokens = torch.randint(10, 500, (n,), generator=generator)
        level, first, second = torch.randn(3, n, generator=generator, dtype=torch.float64)
        # A text's difficulty is common to both, and varies more than they do.
        losses = [(3 + level + d + 0.2 * x) * tokens for d, x in ((0.3, first), (0.0, second))]
        sides = [
            replace(
                evaluate_like(pair[0], each.tolist()),
                per_window=replace(
                    pair[0].per_window, tokens=tuple(tokens.tolist()), loss=tuple(each.tolist())
                ),
            )
            for each in losses
        ]
        found = sides[0].difference(sides[1], "loss")
        hits += abs(found.value - 0.3) <= 1.96 * found.error
    assert abs(hits / trials - 0.95) <= 0.03


def test_what_was_measured_on_other_windows_or_without_a_reference_is_not_paired(pair):
    first, _ = pair
    other = evaluate(Bigram(1), Bigram(0), text=TEXT, tokenizer=Letters())
    with pytest.raises(InputError, match="cannot be paired"):
        first.difference(other, "kl")
    whole = evaluate(Bigram(1), Bigram(0), text=TEXT, tokenizer=Letters(), length=5)
    with pytest.raises(InputError, match="cannot be paired"):
        other.difference(whole, "kl")
    few = evaluate(Bigram(1), Bigram(0), text=TEXT, tokenizer=Letters(), limit=2)
    with pytest.raises(InputError, match="cannot be paired"):
        other.difference(few, "loss")
    with pytest.raises(InputError, match="cannot be paired"):
        other.difference(replace(other, per_window=None), "loss")
    alone = evaluate(Bigram(1), text=TEXT, tokenizer=Letters())
    assert other.difference(alone, "loss").value == 0
    for measure in ("kl", "agreed", "flipped"):
        with pytest.raises(InputError, match="against a reference"):
            other.difference(alone, measure)


def test_an_evaluation_is_what_its_json_says(pair):
    alone = evaluate(Bigram(1), text=TEXT, tokenizer=Letters())
    single = evaluate(Bigram(1), Bigram(0), text=Text("one", ["abc"]), tokenizer=Letters())
    for found in (*pair, alone, single):
        value = json.loads(json.dumps(found.to_json(per_window=True)))
        assert Evaluation.from_json(value) == found
        short = json.loads(json.dumps(found.to_json()))
        assert "per_window" not in short
        assert Evaluation.from_json(short) == replace(found, per_window=None)


def test_windows_longer_than_the_context_are_refused_and_never_cut():
    shorter = Bigram(1)
    shorter.config = type("Short", (Config,), {"max_position_embeddings": 6})()
    evaluate(Bigram(0), text=TEXT, tokenizer=Letters(), length=8)
    assert evaluate(Bigram(0), shorter, text=TEXT, tokenizer=Letters()).length == 6
    samples = Calibration(torch.ones(2, 9, dtype=torch.int64), "by hand", 0)
    for reference, text, length in (
        (None, TEXT, 9), (shorter, TEXT, 7), (None, samples, None), (None, samples, 9)
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"windows of \d tokens; accepted are at most .* context"):
            evaluate(Bigram(0), reference, text=text, tokenizer=Letters(), length=length)
    assert evaluate(Bigram(0), text=samples, length=8).length == 8  # asked for
    assert evaluate(Bigram(0), text=Calibration(samples.ids[:, :5], "", 0)).length == 5


def test_a_limit_that_leaves_nothing_is_refused():
    for limit in (0, -3):
        with pytest.raises(InputError, match="limit is"):
            evaluate(Bigram(0), text=TEXT, tokenizer=Letters(), limit=limit)
