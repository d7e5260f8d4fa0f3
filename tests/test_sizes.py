"""How large weight files will be, against those that are written."""

import itertools
from pathlib import Path

import pytest

from fewbits import RTN, QuantScheme, Recipe, quantize
from fewbits.checkpoint import MAX_SHARD_BYTES
from fewbits.errors import InputError
from fewbits.formats import FORMATS
from fewbits.plan import make_plan
from fewbits.recipe import parse_override
from fewbits.sizes import bytes_together, weight_file_bytes
from models import tiny_checkpoint

G32 = QuantScheme(4, "group", 32)
MIXED = ("*.down_proj=w8-g32", "*.0.*v_proj=w4-g64", "*.o_proj=float")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a model type, made once."""
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tiny_checkpoint(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return get


def written(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf"))


CASES = [  # format, scheme, model type, overrides, head, bytes of a shard
    *((f, "w4-g32", "llama", (), False, MAX_SHARD_BYTES) for f in FORMATS),
    ("awq", "w4-g32", "llama", MIXED[2:], False, 20_000),
    ("compressed-tensors", "w4-g32", "llama", MIXED, False, 20_000),
    *((f, "w4-g32-asym", "llama", MIXED, False, 7_000) for f in ("gptq-v2", "fewbits")),
    *((f, "w4-g32", "qwen3", MIXED[::2], True, 50_000) for f in ("gptq", "gguf", "fewbits")),
    ("gguf", "w4-g32", "mixtral", ("*.o_proj=w8-g32",), False, MAX_SHARD_BYTES),
    ("compressed-tensors", "w3-g32", "mixtral", ("*.o_proj=w8-g32",), False, 30_000),
    ("fewbits", "w3-g32-asym", "gpt_oss", ("*.o_proj=float",), False, 30_000),
    ("fewbits", "w2-channel", "gpt2", (), True, 10_000),
    ("compressed-tensors", "w8-channel-a8-token", "phi3", (), False, MAX_SHARD_BYTES),
]


@pytest.mark.parametrize(("layout", "label", "model_type", "overrides", "head", "most"), CASES)
def test_the_bytes_of_all_weight_files_are_known_before(
    tmp_path, checkpoint, layout, label, model_type, overrides, head, most
):
    folder, scheme = checkpoint(model_type), QuantScheme.parse(label)
    parsed = tuple(map(parse_override, overrides))
    plan = make_plan(folder, Recipe(RTN(), scheme, parsed, head), layout)
    out = tmp_path / "out"
    result = quantize(
        folder, out, scheme=scheme, overrides=parsed, head=head, format=layout, max_shard_bytes=most
    )
    assert weight_file_bytes(plan, most) == result.weight_bytes == written(out)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("layout", sorted(FORMATS))
def test_sums_of_parts_differ_from_whole_files_by_digits_and_padding(checkpoint, layout, model_type):
    head = layout != "awq"
    plan = make_plan(checkpoint(model_type), Recipe(RTN(), G32, head=head), layout)
    names = list(plan.placements)
    for schemes in itertools.permutations([G32, QuantScheme(4, "channel"), None], 2):
        try:
            whole = [
                weight_file_bytes(
                    make_plan(
                        checkpoint(model_type),
                        Recipe(RTN(), G32, head=head, allocation=dict.fromkeys(names, s)),
                        layout,
                    )
                )
                for s in schemes
                if s is not None
            ]
        except InputError:
            continue
        if len(whole) < 2:
            continue
        parts = [bytes_together(plan, names, s, plan.source_bytes) for s in schemes]
        # Up to two numbers of six digits for each of four tensors, in safetensors; padding in GGUF.
        assert abs((parts[0] - parts[1]) - (whole[0] - whole[1])) <= len(names) * 2 * 6 * 4 + 64


def test_a_tied_head_that_stays_in_float_is_not_written_twice(tmp_path, checkpoint):
    folder = checkpoint("qwen3")
    overrides = (parse_override("lm_head=float"),)
    plan = make_plan(folder, Recipe(RTN(), G32, overrides, head=True))
    assert plan.config["tie_word_embeddings"]
    assert "lm_head.weight" not in plan.matrices
    quantize(folder, tmp_path / "with", scheme=G32, overrides=overrides, head=True)
    quantize(folder, tmp_path / "without", scheme=G32)
    assert written(tmp_path / "with") == written(tmp_path / "without") == weight_file_bytes(plan)
