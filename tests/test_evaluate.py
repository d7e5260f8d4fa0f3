import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewbits.errors import InputError
from fewbits.estimate import Estimate, percentile_estimate, ratio_estimate
from fewbits.evaluate import evaluate
from fewbits.text import Text

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


def test_the_standard_error_is_that_of_repeated_sampling():
    """Draw many data sets of windows and compare the spread of the means with the stated error."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        counts = torch.randint(20, 60, (400,), generator=generator).double()
        sums = counts * (2 + 0.5 * torch.randn(400, generator=generator, dtype=torch.float64))
        return ratio_estimate(sums, counts)

    estimates = [draw() for _ in range(400)]
    spread = torch.tensor([e.value for e in estimates]).std()
    stated = torch.tensor([e.error for e in estimates]).mean()
    # The spread of 400 draws is itself known to 1 / sqrt(800) = 3.5 %; five of those.
    assert abs(spread / stated - 1) < 0.18


def test_a_single_window_has_no_error():
    assert ratio_estimate(torch.tensor([3.0]), torch.tensor([2.0])) == Estimate(1.5, None)
    assert percentile_estimate([torch.tensor([1.0, 2.0])], 0.99) == Estimate(2.0, None)


def test_models_of_different_vocabularies_are_refused():
    other = Bigram(0)
    other.table = torch.randn(VOCABULARY, 5)
    with pytest.raises(InputError, match="predicts 11 tokens, the reference 5"):
        evaluate(Bigram(0), other, text=TEXT, tokenizer=Letters())


def test_limit_spreads_the_windows_evenly():
    text = Text("many", ["abcdefg"] * 10)
    assert evaluate(Bigram(0), text=text, tokenizer=Letters(), limit=5).windows == 5


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        (Estimate(12.3456, 0.0234), "12.346 ± 0.023"),
        (Estimate(0.00123, 0.000045), "0.001230 ± 0.000045"),
        (Estimate(99.0, 12.0), "99 ± 12"),
        (Estimate(5.0, None), "5"),
    ],
)
def test_errors_are_shown_with_two_digits(estimate, shown):
    assert str(estimate) == shown
