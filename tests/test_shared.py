"""Two small models that other people trained, and real text; skipped where they are not at hand."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fewbits
from fewbits.checkpoint import open_checkpoint
from fewbits.cli import app
from fewbits.scheme import QuantScheme
from fewbits.text import Text, read_text

SHARED = Path(__file__).parent.parent.parent / "shared/data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models and texts are not here")

BABYLLAMA, STORIES = SHARED / "models/babyllama105", SHARED / "models/stories260K"
GROUPED = [f"w{bits}-g32{suffix}" for bits in (4, 3, 2) for suffix in ("", "-asym")]
WHOLE = ["w8-tensor", "w8-tensor-asym", "w8-channel", "w8-channel-asym"]
CASES = [(BABYLLAMA, label) for label in WHOLE + GROUPED]
CASES += [(STORIES, label) for label in [*WHOLE, "w4-channel", "w4-tensor", "w3-channel-asym"]]


@pytest.mark.parametrize(("model", "label"), CASES, ids=lambda value: getattr(value, "name", value))
def test_quantize_verify_evaluate(model, label, tmp_path):
    out = tmp_path / "out"
    fewbits.quantize(model, out, scheme=QuantScheme.parse(label))
    assert fewbits.verify(out, model).source_tensors == len(open_checkpoint(model).tensors)
    stories = read_text(SHARED / "text/tinystories_valid.txt", limit=4)
    result = fewbits.evaluate(out, model, text=stories, length=128)
    # 8 bits keep 98 of 100 predictions; fewer bits at least do better than chance among 105 or 512.
    assert result.top1_agreement.value > (0.95 if label.startswith("w8") else 0.05)
    assert 0 < result.kl.value < 8


def test_groups_that_172_columns_cannot_hold_are_refused_with_every_offender(tmp_path):
    out = tmp_path / "out"
    arguments = ["quantize", STORIES, out, "--bits", "4", "--group-size", "32"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 2
    for block in range(5):
        assert f"model.layers.{block}.mlp.down_proj.weight (172 columns" in result.stderr
    assert "divisors of 4" in result.stderr
    assert not out.exists()


@pytest.mark.slow
def test_perplexity_ratios_agree_with_the_published_ones(tmp_path):
    """The figures of shared/data/README.md: per story from BOS, cut at 256 tokens."""
    stories = read_text(SHARED / "text/tinystories_valid.txt").documents
    text = Text("stories, cut at 256 tokens", [story[:255] for story in stories])
    published = {"w8-channel": 2.041, "w4-g32": 2.149, "w4-channel": 2.247, "w3-channel": 4.16}
    found = {}
    for label in published:
        fewbits.quantize(BABYLLAMA, tmp_path / label, scheme=QuantScheme.parse(label))
        result = fewbits.evaluate(tmp_path / label, BABYLLAMA, text=text, length=256)
        found[label] = result.perplexity_ratio.value
    print(json.dumps(found))
    for label, perplexity in published.items():
        assert found[label] == pytest.approx(perplexity / 2.040, abs=0.01), found
