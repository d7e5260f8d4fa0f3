"""Calibration: what is drawn, what a model writes by itself, and what is said about either."""

import json
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedTokenizerFast

from fewbits import calibration, load
from fewbits.calibration import SELF, Calibration, check_calibration, read_calibration
from fewbits.errors import InputError
from fewbits.evaluate import load_tokenizer
from fewbits.text import Text
from models import tiny_model

SHARED = Path(__file__).parent.parent.parent / "shared/data"
VOCABULARY, BOS, EOS = 96, 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"


pytestmark = pytest.mark.usefixtures("one_thread")


class Letters:
    """A tokenizer of one token per letter, from 3 on."""

    bos_token_id, eos_token_id, unk_token_id = BOS, EOS, None
    chat_template = None

    def __init__(self, **ids):
        vars(self).update(ids)

    def __call__(self, text, **options):
        assert options["add_special_tokens"] is False
        return {"input_ids": [ord(letter) - 94 for letter in text]}


def words(chat_template=None):
    """A real tokenizer of one token per word; unknown is 0."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "user": 3, "once": 4, "upon": 5, "a": 6, "time": 7}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def bigram(table):
    """A transformers model whose next token depends on the last one alone, by its row of the table."""
    size = len(table)
    model = tiny_model("llama", vocab_size=size, hidden_size=size, num_hidden_layers=1).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)  # the block adds nothing
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(table.T / size**0.5)  # the last norm makes sqrt(size) of 1
    # What a checkpoint may bring along; temperature 1 and nothing cut off must win.
    model.generation_config = GenerationConfig(
        temperature=0.3, top_k=5, top_p=0.5, repetition_penalty=2.0, eos_token_id=[EOS, 3], max_length=9
    )
    return model


def lines(calibration_, **options):
    options = {"widths": {"w": 1}, "experts": None, "tokenizer": None} | options
    return [str(note) for note in check_calibration(calibration_, **options)]


def ids_of(samples, length, high=VOCABULARY):
    return torch.randint(3, high, (samples, length))


# -- from documents --------------------------------------------------------------------------------

TEXT = Text("letters", [LETTERS[i % 26 :] + LETTERS[: i % 7] for i in range(60)])


def test_the_same_seed_gives_the_same_ids_and_hash_and_another_gives_others():
    first, again, other = (
        read_calibration(TEXT, Letters(), samples=20, length=16, seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(first.ids, again.ids)
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256
    assert {tuple(row.tolist()) for row in first.ids} != {tuple(row.tolist()) for row in other.ids}


def test_the_hash_depends_on_every_id_and_on_the_shape():
    ids = ids_of(4, 6)
    changed = ids.clone()
    changed[3, 5] += 1
    found = {Calibration(x, "x", 0).sha256 for x in (ids, changed, ids.view(6, 4), ids.clone())}
    assert len(found) == 3


def test_all_samples_together_are_the_documents_each_after_a_bos():
    stream = [i for d in TEXT.documents for i in [BOS, *(ord(letter) - 94 for letter in d)]]
    count = len(stream) // 16
    found = read_calibration(TEXT, Letters(), samples=count, length=16)
    assert found.ids.shape == (count, 16)
    assert found.ids.dtype == torch.int64
    expected = [stream[i * 16 : (i + 1) * 16] for i in range(count)]
    assert sorted(found.ids.tolist()) == sorted(expected)
    assert found.ids.tolist() != expected  # drawn, not taken in order
    assert not found.notes


def test_without_bos_eos_follows_each_document_and_that_is_noted():
    text = Text("two", ["abc", "", "de"])
    found = read_calibration(text, Letters(bos_token_id=None), samples=1, length=7)
    assert found.ids.tolist() == [[3, 4, 5, EOS, 6, 7, EOS]]
    assert [note.kind for note in found.notes] == ["fallback"]
    found = read_calibration(text, Letters(bos_token_id=None, eos_token_id=None), samples=1, length=5)
    assert found.ids.tolist() == [[3, 4, 5, 6, 7]]
    assert "nothing separates" in found.notes[0].what


def test_a_text_that_is_too_short_says_how_many_samples_it_holds(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("a" * 99)  # and BOS: 100 tokens
    with pytest.raises(InputError) as error:
        read_calibration(path, Letters(), samples=128, length=16)
    assert str(error.value) == (
        "stories.txt holds 6 samples of 16 tokens; --samples 128 was asked for; "
        "accepted are at most 6, shorter samples, or more text"
    )
    with pytest.raises(InputError, match=r"holds 0 samples .* accepted are shorter samples, or more"):
        read_calibration(path, Letters(), samples=1, length=101)
    assert read_calibration(path, Letters(), samples=6, length=16).to_json() | {"sha256": ""} == {
        "source": "stories.txt", "samples": 6, "length": 16, "tokens": 96, "seed": 0, "sha256": "",
    }  # fmt: skip


def test_chats_go_through_the_chat_template_which_may_write_bos_itself(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [[{"role": "user", "content": "once upon"}], [{"role": "user", "content": "a time"}]]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    for chat_template in (template, "<s> " + template):
        found = read_calibration(path, words(chat_template), samples=1, length=10)
        assert found.ids.tolist() == [[1, 3, 4, 5, 2, 1, 3, 6, 7, 2]]
    with pytest.raises(InputError, match="no chat template"):
        read_calibration(path, words(), samples=1, length=10)
    with pytest.raises(InputError, match="refuses some messages: no chats today"):
        read_calibration(path, words("{{ raise_exception('no chats today') }}"), samples=1, length=4)


def test_a_hub_dataset_is_read_only_as_far_as_needed_and_that_is_noted(monkeypatch):
    taken = []

    def load_dataset(name, *config, split, streaming):
        assert (name, config, split, streaming) == ("owner/name", ("config",), "train", True)
        for i in range(1000):
            taken.append(i)
            yield {"story": LETTERS}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = "hub:owner/name/config:train:story"
    found = read_calibration(source, Letters(), samples=5, length=54)
    assert len(taken) == 4 * 5 * 54 // 27  # documents of 27 tokens with BOS, four times what is needed
    assert found.source == source
    assert found.notes[0].what == f"drawn from the first 40 documents of {source}, 1080 tokens"
    assert found.notes[0] in check_calibration(found, widths={"w": 1}, experts=None, tokenizer=None)


def test_length_is_the_context_by_default_and_never_more():
    model = bigram(torch.zeros(VOCABULARY, VOCABULARY))
    assert read_calibration(TEXT, Letters(), model=model, samples=2).ids.shape == (2, 64)
    assert read_calibration(TEXT, Letters(), context=32, samples=2).ids.shape == (2, 32)
    long = Text("long", ["a" * 5000])
    assert read_calibration(long, Letters(), context=10**6, samples=2).ids.shape == (2, 2048)
    with pytest.raises(InputError, match=r"samples of 65 tokens; accepted is the model's context, 64"):
        read_calibration(TEXT, Letters(), model=model, samples=2, length=65)
    with pytest.raises(InputError, match="not 0 of 16"):
        read_calibration(TEXT, Letters(), samples=0, length=16)


def test_tokens_that_the_model_does_not_know_are_refused():
    assert read_calibration(TEXT, Letters(), vocabulary=29, samples=2, length=32).ids.max() == 28
    with pytest.raises(InputError, match="letters gives token 28, but the model knows only 28"):
        read_calibration(TEXT, Letters(), vocabulary=28, samples=2, length=32)
    with pytest.raises(InputError, match="gives token -1"):
        read_calibration(torch.tensor([[3, -1]]), None, vocabulary=28)


def test_token_ids_are_taken_as_they_are():
    ids = ids_of(3, 8)
    assert torch.equal(read_calibration(ids, None).ids, ids)
    with pytest.raises(InputError, match="samples of 8 tokens"):
        read_calibration(ids, None, context=7)
    for wrong in (ids[0], ids.int(), ids[:0]):
        with pytest.raises(InputError, match=r"accepted is \(samples, length\) torch.int64"):
            read_calibration(wrong, None)


# -- from the model --------------------------------------------------------------------------------


def test_own_text_follows_the_model_s_distribution_whatever_its_generation_settings(monkeypatch):
    monkeypatch.setattr(calibration, "_CACHED", 64 * 100)  # 192 samples: in two batches
    table = 2 * torch.randn(VOCABULARY, VOCABULARY)
    table[:, [EOS, 3]] += 1  # texts that end
    model = bigram(table)
    settings, state = model.generation_config, torch.get_rng_state()
    found = read_calibration(SELF, Letters(), model=model, samples=192, length=64)
    assert model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), state)
    assert found.ids.shape == (192, 64)
    assert found.ids[:, 0].eq(BOS).all()

    before, after = found.ids[:, :-1].flatten(), found.ids[:, 1:].flatten()
    ended = (before == EOS) | (before == 3)
    assert ended.sum() > 100
    assert after[ended].eq(BOS).all()
    before, after = before[~ended], after[~ended]
    p = torch.softmax(table.double(), -1)[before]
    # Tokens are drawn one by one, so counts have the sum of their variances. Five standard deviations
    # for each of 96 counts: a right sampler fails once in 20,000 seeds.
    counts = torch.bincount(after, minlength=VOCABULARY)
    assert ((counts - p.sum(0)).abs() < 5 * (p * (1 - p)).sum(0).sqrt()).all()
    # The likelihood of what was drawn, given what stood before it, is as it must be on average.
    surprise = -p.log()
    mean = (p * surprise).sum(-1)
    variance = (p * surprise.square()).sum(-1) - mean.square()
    drawn = surprise.gather(1, after[:, None])[:, 0]
    assert (drawn - mean).sum().abs() < 5 * variance.sum().sqrt()


def test_a_token_that_both_begins_and_ends_texts_is_not_doubled():
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[:, EOS] = math.log(95)  # every second token
    found = read_calibration(SELF, Letters(bos_token_id=EOS), model=bigram(table), samples=40, length=50)
    ids = found.ids[(found.ids != 3).all(-1)]  # 3 ends a text too, and is followed by EOS for sure
    share = (ids[:, 1:] == EOS).double().mean()
    assert abs(share - 0.5) < 5 * 0.5 / ids[:, 1:].numel() ** 0.5


def test_own_text_depends_on_the_seed_alone():
    model = bigram(torch.randn(VOCABULARY, VOCABULARY))
    steps = []
    drawn = []
    for seed in (0, 0, 1):
        options = {"samples": 4, "length": 16, "seed": seed, "progress": lambda *a: steps.append(a)}
        drawn.append(read_calibration(SELF, Letters(), model=model, **options))
        torch.rand(3)
    assert drawn[0].sha256 == drawn[1].sha256 != drawn[2].sha256
    assert len({tuple(row.tolist()) for row in drawn[0].ids}) == 4
    assert steps[0] == ("calibration", 64, 64)
    assert "the text is the model's own" in lines(drawn[0], tokenizer=Letters())[-1]


def test_own_text_needs_a_model_and_a_token_to_begin_with():
    model = bigram(torch.zeros(VOCABULARY, VOCABULARY))
    with pytest.raises(InputError, match="'self' needs the loaded model"):
        read_calibration(SELF, Letters())
    found = read_calibration(SELF, Letters(bos_token_id=None), model=model, samples=2, length=4)
    assert found.ids[:, 0].tolist() == [EOS, EOS]
    assert found.notes[0].kind == "fallback"
    with pytest.raises(InputError, match="no BOS and no EOS"):
        read_calibration(SELF, Letters(bos_token_id=None, eos_token_id=None), model=model)


def test_a_broken_model_is_one_clear_line():
    model = bigram(torch.full((VOCABULARY, VOCABULARY), math.nan))
    with pytest.raises(InputError, match="logits are not numbers"):
        read_calibration(SELF, Letters(), model=model, samples=2, length=4)


# -- checks ----------------------------------------------------------------------------------------


def test_fewer_tokens_than_inputs_are_warned_of_with_the_samples_that_would_do():
    found = Calibration(ids_of(10, 30), "x", 0)
    assert "300 tokens for the 300 inputs of down, the widest" in lines(found, widths={"down": 300})[0]
    assert not any("warning" in line for line in lines(found, widths={"up": 100, "down": 300}))
    first = lines(found, widths={"up": 100, "down": 301, "gate": 300})[0]
    assert "warning: 300 tokens for the 301 inputs of down" in first
    assert "takes 11 samples of 30" in first


def test_tokens_per_expert_are_those_of_an_even_router():
    found = Calibration(ids_of(10, 30), "x", 0)
    options = {"widths": {"w": 75}}
    line = lines(found, experts=(8, 2), **options)[2]
    assert (
        line
        == "fact: calibration: 75 tokens for the 75 inputs of each of 8 experts, were all chosen alike"
    )
    line = lines(found, experts=(16, 2), **options)[2]
    assert "warning: 38 tokens for the 75 inputs of each of 16 experts" in line
    assert "takes 20 samples of 30" in line  # 75 * 16 / 2 / 30
    assert "warning" not in lines(found, experts=(16, 2), expert_width=37, **options)[2]


def test_repeated_samples_and_runs_are_counted_at_every_position():
    ids = torch.arange(4 * 40).view(4, 40)
    assert (
        "fact: calibration: 0 of 4 samples and 0.0% of runs of 32" in lines(Calibration(ids, "x", 0))[1]
    )
    shifted = ids.clone()
    shifted[3, 4:] = ids[0, :36]  # 5 of the 9 runs of the last sample are known, four tokens later
    line = lines(Calibration(shifted, "x", 0))[1]
    assert f"warning: 0 of 4 samples and {5 / 36:.1%} of runs of 32 tokens repeat" in line
    twice = ids.clone()
    twice[2] = ids[1]
    assert "warning: 1 of 4 samples and 25.0% of runs" in lines(Calibration(twice, "x", 0))[1]


def test_unknown_tokens_are_counted():
    text = Text("words", ["once upon a time", "once upon a dime dozen", "a"])
    found = read_calibration(text, words(), samples=1, length=13)
    line = lines(found, tokenizer=words())[2]
    assert "warning: 2 of 13 tokens (15.38%) are unknown" in line
    clean = read_calibration(Text("words", ["once upon a time"]), words(), samples=1, length=5)
    assert "fact: calibration: 0 of 5 tokens" in lines(clean, tokenizer=words())[2]
    # GPT-2's unknown token is the one between its documents.
    assert "no token of its own" in lines(clean, tokenizer=Letters(unk_token_id=BOS))[2]


def test_what_cannot_be_checked_is_said():
    found = Calibration(ids_of(4, 40), "x", 0)
    assert lines(found)[-1].startswith("skip: calibration: unknown tokens")
    assert "the model is not loaded" in lines(found, tokenizer=Letters())[-1]
    model = bigram(torch.zeros(VOCABULARY, VOCABULARY))
    nothing = Letters(bos_token_id=None, eos_token_id=None)
    assert "no BOS and no EOS" in lines(found, tokenizer=nothing, model=model)[-1]


def distance(ids, model, tokenizer):
    """The last note, and the four numbers in it."""
    note = lines(Calibration(ids, "text", 0), tokenizer=tokenizer, model=model)[-1]
    numbers = re.search(r"perplexity (\S+), .* own text (\S+); ratio (\S+) ± (\S+)$", note)
    return note, *map(float, numbers.groups())


def test_perplexities_and_their_distance_equal_the_definition():
    table = 2 * torch.randn(VOCABULARY, VOCABULARY)
    model = bigram(table)
    own = read_calibration(SELF, Letters(), model=model, samples=32, length=32, seed=0).ids
    text = ids_of(40, 64)
    surprise = -torch.log_softmax(table.double(), -1)
    losses = [surprise[ids[:, :-1], ids[:, 1:]].mean(-1) for ids in (text[:32, :32], own)]
    note, perplexity, own_perplexity, ratio, error = distance(text, model, Letters())
    expected = [float(loss.mean().exp()) for loss in losses]
    assert (perplexity, own_perplexity) == pytest.approx(expected, rel=1e-3)
    assert ratio == pytest.approx(expected[0] / expected[1], rel=6e-3)  # three digits are printed
    variance = sum(float(loss.var()) / len(loss) for loss in losses)
    assert error == pytest.approx(ratio * math.sqrt(variance), rel=0.06)  # and two
    assert "warning: perplexity" in note


def test_a_text_on_which_the_model_gives_no_numbers_is_warned_of():
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[:, 50] = -1000  # its own text never gets there
    model = bigram(table)
    text = ids_of(4, 16, high=50)
    assert "warning" not in distance(text, model, Letters())[0]
    model.model.embed_tokens.weight.data[50] = torch.nan
    text[0, 3] = 50
    note, perplexity, own_perplexity, *_ = distance(text, model, Letters())
    assert "warning" in note
    assert math.isnan(perplexity)
    assert own_perplexity == pytest.approx(95, rel=1e-3)


def test_the_reference_model_knows_its_own_text_from_shuffled_tokens(monkeypatch):
    monkeypatch.setattr(calibration, "_COMPARED", (16, 48))
    model, tokenizer = load("reference/model"), load_tokenizer("reference/model")
    own = read_calibration(SELF, tokenizer, model=model, samples=16, length=48, seed=1).ids
    note, _, _, ratio, error = distance(own, model, tokenizer)
    assert "warning" not in note
    assert abs(math.log(ratio)) < 4 * error / ratio
    shuffled = own.flatten()[torch.randperm(own.numel())].view_as(own)
    note, _, _, ratio, error = distance(shuffled, model, tokenizer)
    assert "warning" in note
    assert ratio > 10


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models and texts are not here")
def test_real_stories_fill_the_context_and_are_like_the_model_s_own():
    folder, path = SHARED / "models/babyllama105", SHARED / "text/tinystories_valid.txt"
    model, tokenizer = load(folder), load_tokenizer(folder)
    found = read_calibration(path, tokenizer, model=model, samples=64)
    assert found.ids.shape == (64, 256)
    notes = lines(found, widths={"down": 352}, tokenizer=tokenizer, model=model)
    assert len(notes) == 4
    assert not any("warning" in note for note in notes)
    python = "\n".join(f"def f{i}(x, y={{{i}: [{i}]}}):\n    return x[{i}:] @ y" for i in range(50))
    other = read_calibration(Text("python", [python]), tokenizer, model=model, samples=4)
    assert "warning: perplexity" in lines(other, tokenizer=tokenizer, model=model)[-1]
