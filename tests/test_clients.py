"""What clients would load, and the rules' own consistency; nothing of a client is run here."""

import dataclasses
import tomllib
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fewbits import packing
from fewbits.clients import Facts, check_clients, clients, parse_client
from fewbits.errors import InputError
from fewbits.formats import FORMATS, Placement
from fewbits.methods.rtn import RTN
from fewbits.plan import Plan, make_plan
from fewbits.recipe import Recipe, parse_override
from fewbits.scheme import QuantScheme
from fewbits.structure import find_head, skeleton, text_config
from models import ALL, MORE, TINY, tiny_checkpoint

CT = "compressed-tensors"
RULES = tomllib.loads(files("fewbits").joinpath("clients.toml").read_text(encoding="utf-8"))
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
HEADS = SimpleNamespace(num_attention_heads=8, num_key_value_heads=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a model type and changes of its config, made once."""
    made: dict[object, Path] = {}

    def get(model_type: str = "llama", **changes: int) -> Path:
        key = (model_type, *changes.items())
        if key not in made:
            made[key] = tiny_checkpoint(tmp_path_factory.mktemp(model_type), model_type, **changes)
        return made[key]

    return get


def planned(folder: Path, scheme: str, *overrides: str, head: bool = False) -> Plan:
    parsed = tuple(map(parse_override, overrides))
    return make_plan(folder, Recipe(RTN(), QuantScheme.parse(scheme), parsed, head))


def facts_of(plan: Plan, layout: str | None = None) -> Facts:
    model = skeleton(plan.checkpoint.config)
    name = layout or plan.format.name
    return Facts(plan.placements, plan.floats, name, text_config(model), find_head(model))


def one(
    name: str, scheme: str, shape: tuple[int, int], layout: str = CT, head: bool = False, **more: object
) -> Facts:
    """A model of one quantized weight."""
    place = Placement(name, QuantScheme.parse(scheme), shape=shape, **more)  # type: ignore[arg-type]
    return Facts({f"{name}.weight": place}, [], layout, HEADS, name if head else None)


def refusal(facts: Facts, client: str = "vllm", devices: int = 1) -> str | None:
    try:
        check_clients(facts, [client], devices)
    except InputError as error:
        return str(error)
    return None


def remarks(facts: Facts, client: str = "vllm", devices: int = 1) -> list[str]:
    return [note.what for note in check_clients(facts, [client], devices)]


# -- one scheme for what a client makes one matrix ---------------------------------------------------

FUSED = [tuple(names) for rule in RULES["fused"] for names in rule["lists"]]
OVERRIDES = [
    (),
    ("*.k_proj=w8-channel",),
    ("*.k_proj=float",),
    ("*.self_attn.*=w8-channel",),
    ("*.1.mlp.up_proj=float",),
    ("*.1.mlp.*=float",),
    ("*.down_proj=float", "*.o_proj=w8-channel"),
    ("*.down_proj=float", "*.gate_proj=w4-g16"),
]


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_fused_modules_are_refused_where_the_written_config_gives_them_several_schemes(
    checkpoint, overrides
):
    plan = planned(checkpoint(), "w4-g32", *overrides)
    config = plan.format.config(plan.placements, plan.floats)
    parents = {name.rpartition(".")[0] for name in plan.matrices}  # ...q_proj
    modules = {name.removesuffix(".weight") for name in plan.matrices}
    broken = set()
    for parent in {name.rpartition(".")[0] for name in parents}:
        for members in FUSED:
            there = [f"{parent}.{leaf}" for leaf in members if f"{parent}.{leaf}" in modules]
            found = {plan.format.scheme_of(config, f"{name}.weight", name) for name in there}
            broken |= set(there) if len(found) > 1 else set()
    message = refusal(facts_of(plan))
    assert (message is None) == (not broken)
    for name in modules:
        leaf = name.rpartition(".")[2]
        blocks = sum(other.endswith(f".{leaf}") for other in broken)
        listed = name if blocks == 1 else name.replace(".0.", ".*.").replace(".1.", ".*.")
        assert (f"{listed} " in (message or "") or f"{listed}," in (message or "")) == (name in broken)


def test_who_did_not_ask_for_a_client_is_told_and_not_refused(checkpoint):
    broken = facts_of(planned(checkpoint(), "w4-g32", "*.v_proj=float"))
    notes = check_clients(broken)
    assert [note.kind for note in notes] == ["fact"]
    assert notes[0].where.startswith(f"vLLM {RULES['client']['vllm']['newest']}")
    assert "would not load model.layers.*.self_attn.q_proj (2)" in notes[0].what
    assert "q_proj w4-g32, k_proj w4-g32, v_proj float" in notes[0].what
    assert check_clients(facts_of(planned(checkpoint(), "w4-g32"))) == []
    assert refusal(broken) is not None
    assert refusal(broken, "transformers") is None


def test_experts_of_two_schemes_are_refused(checkpoint):
    plan = planned(checkpoint("mixtral", hidden_size=128), "w4-g32")
    assert refusal(facts_of(plan)) is None
    mixed = dict(plan.placements)
    for name, place in plan.placements.items():
        if name.endswith("w2.weight"):
            mixed[name] = dataclasses.replace(place, scheme=QuantScheme(8, "group", 32))
    message = refusal(dataclasses.replace(facts_of(plan), placements=mixed))
    assert message is not None
    assert "model.layers.*.mlp.experts (2) (experts in w4-g32 and w8-g32)" in message


# -- kernels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "scheme", "client", "loads"),
    [
        (CT, "w4-g128", "vllm", True),
        (CT, "w8-channel", "vllm", True),
        (CT, "w8-tensor", "vllm", True),  # written by channel
        (CT, "w4-g128-asym", "vllm", True),
        (CT, "w3-g128", "vllm==0.24", False),
        (CT, "w3-g128", "vllm==0.25", True),
        (CT, "w3-g128-asym", "vllm==0.30.0", False),
        (CT, "w3-g128-asym", "vllm==0.31.0", True),
        (CT, "w8-g32-asym", "vllm==0.24", False),
        (CT, "w8-g32-asym", "vllm==0.25", True),
        (CT, "w4-g8", "vllm", False),
        (CT, "w8-channel-a8-token", "vllm", True),
        (CT, "w4-g8", "transformers", True),
        ("gptq", "w4-g128", "vllm", True),
        ("gptq", "w8-channel", "vllm", True),
        ("gptq", "w3-g128", "vllm", False),
        ("gptq", "w4-g16", "vllm", False),
        ("gptq", "w4-g256", "vllm", False),
        ("gptq-v2", "w4-g128", "vllm", True),
        ("gptq-v2", "w4-g128-asym", "vllm", False),
        ("gptq-v2", "w4-g128-asym", "gptqmodel", True),
        ("gptq", "w3-g256", "gptqmodel", True),
        ("gptq", "w4-g96", "gptqmodel", False),
        ("gptq", "w4-g96", "transformers", False),
        ("awq", "w4-g128-asym", "vllm", True),
        ("awq", "w4-g64-asym", "vllm==0.23", True),
        ("awq", "w4-g16-asym", "vllm", False),
        ("awq", "w4-g16-asym", "gptqmodel", True),
        ("awq", "w4-g256-asym", "gptqmodel", False),
        ("gguf", "w4-g32", "llama.cpp", True),
    ],
)
def test_codes_and_groups_that_no_kernel_of_a_client_takes_are_refused(layout, scheme, client, loads):
    facts = one(DOWN, scheme, (768, 768), layout)
    message = refusal(facts, client)
    assert (message is None) == loads
    if message is not None:
        assert f"would not load {DOWN} ({scheme})" in message
        assert "accepted is " in message


def test_shapes_are_those_that_a_client_holds():
    # 64 rows and 128 columns are what Marlin of 0.23 asks for; 8 bits have no other kernel for sure.
    def told(rows: int, columns: int, client: str) -> list[str]:
        return remarks(one(DOWN, "w8-channel", (rows, columns)), client)

    assert told(64, 128, "vllm==0.23") == []
    for rows, columns in ((32, 128), (64, 64)):
        (only,) = told(rows, columns, "vllm==0.23")
        assert "Humming" in only
        assert told(rows, columns, "vllm==0.24") == []
    # Fused, three matrices of 16, 16 and 32 rows are one of 64.
    place = {
        f"model.layers.0.self_attn.{leaf}.weight": Placement(leaf, QuantScheme(8), shape=(rows, 128))
        for leaf, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16))
    }
    assert remarks(Facts(place, [], CT, HEADS), "vllm==0.23") == []
    del place["model.layers.0.self_attn.v_proj.weight"]
    assert len(remarks(Facts(place, [], CT, HEADS), "vllm==0.23")) == 1
    # The shape alone: llama.cpp wants whole blocks, AWQ whole words.
    assert "in a multiple of 32" in str(refusal(one(DOWN, "w4-g16", (64, 48), "gguf"), "llama.cpp"))
    assert "out a multiple of 8" in str(refusal(one(DOWN, "w4-g32-asym", (60, 64), "awq")))
    assert refusal(one(DOWN, "w4-g32-asym", (56, 64), "awq")) is None


def test_experts_have_kernels_of_their_own(checkpoint):
    # w1 and w3 read the hidden states, w2 makes them: 64 of them, where the fast kernel wants 128.
    by_row = facts_of(planned(checkpoint("mixtral"), "w8-channel"))
    message = refusal(by_row)
    assert message is not None
    for leaf in ("w1", "w2", "w3"):
        assert f"experts.*.{leaf} (8)" in message
    assert "self_attn" not in message
    assert "hidden size a multiple of 128" in message
    assert refusal(facts_of(planned(checkpoint("mixtral", hidden_size=128), "w8-channel"))) is None
    grouped = facts_of(planned(checkpoint("mixtral"), "w4-g32"))
    assert all("slower kernels for experts" in note for note in remarks(grouped))
    assert remarks(grouped) != []
    # Since 0.25 the other side is padded: 96 is no multiple of 64.
    inner = facts_of(planned(checkpoint("mixtral", hidden_size=128), "w8-channel"))
    assert "inner a multiple of 64" in str(refusal(inner, "vllm==0.24"))
    zeros = {"shape": (256, 128), "expert": True}
    expert = "model.layers.0.mlp.experts.0.gate_proj"
    for scheme, client, loads in (
        ("w4-g64-asym", "vllm==0.24", True),
        ("w8-g64-asym", "vllm==0.24", False),
        ("w8-g64-asym", "vllm==0.31", True),
    ):
        facts = one(expert, scheme, **zeros)  # type: ignore[arg-type]
        assert (refusal(facts, client) is None) == loads


@pytest.mark.parametrize(
    ("layout", "scheme", "tokens", "loads"),
    [
        ("gptq", "w4-g32", 128, True),
        ("gptq", "w4-g32", 96, False),
        ("awq", "w4-g32-asym", 96, False),
        (CT, "w4-g32", 99, True),
        (CT, "w4-g32-asym", 96, True),
        (CT, "w4-g32-asym", 100, False),
    ],
)
def test_a_quantized_head_asks_for_a_vocabulary_that_its_client_can_pad(layout, scheme, tokens, loads):
    head = one("lm_head", scheme, (tokens, 64), layout, head=True)
    assert (refusal(head) is None) == loads
    assert refusal(dataclasses.replace(head, head=None)) is None  # any other weight of this shape


def test_a_head_is_padded_before_kernels_see_it():
    head = one("lm_head", "w8-channel", (100, 128), head=True)
    assert remarks(head, "vllm==0.23") == []  # Marlin wants multiples of 64 rows, and gets 128
    assert len(remarks(dataclasses.replace(head, head=None), "vllm==0.23")) == 1


# -- tensor parallel -----------------------------------------------------------------------------------


def shares_are_whole(
    shape: tuple[int, int], scheme: QuantScheme, side: int, devices: int, *, zeros: bool, words: bool
) -> bool:
    """Pack a weight, cut every tensor into equal parts along one side, and read each part alone.

    zeros: zero points are stored, packed along out. words: codes are packed along in.
    """
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)

    def draw(width: int) -> torch.Tensor:
        return torch.randint(0, 2**scheme.bits, (rows, width), generator=generator).byte()

    groups = scheme.groups(columns)
    codes, points, scale = draw(columns), draw(groups), torch.rand(rows, groups, generator=generator)
    packed = packing.pack(codes, scheme.bits) if words else codes
    packed_points = packing.pack(points.t().contiguous(), scheme.bits).t()
    stored = [packed, scale, packed_points] if zeros else [packed, scale]
    divided = stored if side == 0 or scheme.group_size else [packed]  # one scale for a row is copied
    if shape[side] % devices or any(t.shape[side] % devices for t in divided):
        return False
    mine = [size // devices if axis == side else size for axis, size in enumerate(shape)]
    for device in range(devices):
        part = slice(device * mine[side], (device + 1) * mine[side])
        of = torch.arange(columns) // (columns // groups)  # whose scale each column has
        here = (part, slice(None)) if side == 0 else (slice(None), part)
        got = [t.chunk(devices, side)[device] if any(t is d for d in divided) else t for t in stored]
        if words and got[0].shape[1] != packing.packed_columns(mine[1], scheme.bits):
            return False
        found = packing.unpack(got[0].contiguous(), scheme.bits, mine[1]) if words else got[0]
        if not torch.equal(found, codes[here]) or mine[1] % got[1].shape[1]:
            return False
        wide = mine[1] // got[1].shape[1]
        if not torch.equal(got[1].repeat_interleave(wide, 1), scale[:, of][here]):
            return False
        if zeros:
            if got[2].shape[0] != packing.packed_columns(mine[0], scheme.bits):
                return False
            found = packing.unpack(got[2].t().contiguous(), scheme.bits, mine[0]).t()
            if not torch.equal(found.repeat_interleave(wide, 1), points[:, of][here]):
                return False
    return True


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("layout", [CT, "gptq", "awq"])
def test_shares_are_refused_exactly_where_a_real_split_cuts_a_group_or_a_word(layout, side):
    # Only what some kernel of the newest vLLM takes, so that nothing but boundaries can be wrong.
    labels = {
        CT: [
            f"w{b}-{g}{z}" for b in (2, 3, 8) for g in ("channel", "g16", "g48") for z in ("", "-asym")
        ],
        "gptq": [f"w{b}-{g}" for b in (4, 8) for g in ("channel", "g32", "g64")],
        "awq": [f"w4-{g}-asym" for g in ("channel", "g32", "g64")],
    }[layout]
    seen = {True: 0, False: 0}
    for label in labels:
        scheme = QuantScheme.parse(label)
        stored = {"zeros": layout != CT or not scheme.symmetric, "words": layout != "awq"}
        for size in (48, 64, 96, 100, 192):
            for devices in (2, 3, 5, 8):
                # The kernels of AWQ want 8 rows on each device.
                shape = (size, 96) if side == 0 else (64, size)
                if (scheme.group_size is not None and shape[1] % scheme.group_size) or (
                    layout == "awq" and side == 0 and size % (8 * devices) and size % devices == 0
                ):
                    continue
                whole = shares_are_whole(shape, scheme, side, devices, **stored)
                message = refusal(one((UP, DOWN)[side], label, shape, layout), "vllm", devices)
                assert (message is None) == whole, (label, shape, devices, message)
                seen[whole] += 1
    assert min(seen.values()) > 10


def test_only_what_a_split_breaks_is_named(checkpoint):
    # o_proj reads 128 columns and down_proj 96: halves of 64 and 48.
    message = refusal(facts_of(planned(checkpoint(), "w4-g32")), devices=2)
    assert message is not None
    assert "model.layers.*.mlp.down_proj (2) (in 96 on 2 devices, 48 each, in groups of 32)" in message
    assert "a divisor of 48" in message
    assert "o_proj" not in message
    assert refusal(facts_of(planned(checkpoint(), "w4-g16")), devices=2) is None
    assert refusal(facts_of(planned(checkpoint(), "w4-channel")), devices=2) is None


@pytest.mark.parametrize(
    ("layout", "scheme", "columns", "devices", "loads"),
    [
        ("awq", "w4-g128-asym", 29568, 2, False),  # vllm issue 21695
        ("awq", "w4-g128-asym", 29696, 4, True),  # QwenLM/Qwen3-VL issue 231: padded for it
        ("gptq", "w4-g128", 11008, 2, True),  # vllm issue 2419, of 2024-01-12
        ("gptq", "w4-g128", 11008, 4, False),
    ],
)
def test_what_users_reported_of_down_projections_is_foretold(layout, scheme, columns, devices, loads):
    facts = one(DOWN, scheme, (4096, columns), layout)
    assert (refusal(facts, "vllm", devices) is None) == loads


def test_heads_are_divided_and_pairs_copied(checkpoint):
    facts = facts_of(planned(checkpoint(), "w8-channel"))  # 4 heads, 2 of keys and values
    assert refusal(facts, devices=4) is None
    message = refusal(facts, devices=3)
    assert message is not None
    assert "4 heads on 3 devices" in message
    many = dataclasses.replace(
        facts, config=SimpleNamespace(num_attention_heads=12, num_key_value_heads=4)
    )
    assert "4 key-value heads on 6 devices" in str(refusal(many, devices=6))
    # Each of 4 devices has one of 2 pairs, here of 8 rows: a whole word of zero points, not half of one.
    pair = one("model.layers.0.self_attn.k_proj", "w4-channel-asym", (16, 64))
    assert refusal(pair, devices=4) is None
    assert refusal(one(UP, "w4-channel-asym", (16, 64)), devices=4) is not None


def test_devices_alone_ask_for_the_clients_that_divide(checkpoint):
    facts = facts_of(planned(checkpoint(), "w4-g32"))
    with pytest.raises(InputError, match="down_proj"):
        check_clients(facts, tensor_parallel=2)
    with pytest.raises(InputError, match="does not read gguf"):
        check_clients(dataclasses.replace(facts, format="gguf"), tensor_parallel=2)
    (skip,) = check_clients(facts, ["transformers"], 2)
    assert (skip.kind, "several devices" in skip.what) == ("skip", True)
    with pytest.raises(InputError, match="accepted are numbers from 1"):
        check_clients(facts, tensor_parallel=0)


def test_a_module_that_no_rule_knows_is_said_to_be_unchecked():
    (skip,) = check_clients(one("model.layers.0.strange", "w4-g32", (64, 64)), tensor_parallel=2)
    assert (skip.kind, "model.layers.0.strange: not checked" in skip.what) == ("skip", True)


@pytest.mark.parametrize("model_type", sorted(ALL))
def test_modules_are_divided_as_transformers_divides_them(model_type):
    """Its own plan for tensor parallelism, where the architecture has one; heads may be cut there."""
    (split,) = RULES["split"]
    model = skeleton({"model_type": model_type, **(TINY | MORE)[model_type]})
    for pattern, style in (getattr(model, "tp_plan", None) or {}).items():
        leaf = pattern.rpartition(".")[2]
        if style == "colwise":
            assert leaf in split["rows"]
        elif style.startswith("rowwise"):
            assert leaf in split["columns"]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "opt", "gpt_neox", "bloom", "mixtral"])
def test_all_that_a_known_architecture_has_is_checked(checkpoint, model_type):
    facts = facts_of(planned(checkpoint(model_type), "w8-channel"), CT)
    try:
        notes = check_clients(facts, tensor_parallel=2)
    except InputError as error:
        assert "not known" not in str(error)  # noqa: PT017
        return
    assert [note for note in notes if note.kind == "skip"] == []


# -- what is asked for, and the rules themselves -------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tgi", "accepted are vllm, transformers, gptqmodel, llama.cpp"),
        ("vllm==0.11", "known for 0.23.0 to 0.33.0"),
        ("vllm==99.0", "known for 0.23.0 to 0.33.0"),
        ("vllm==0", "known for 0.23.0 to 0.33.0"),
        ("vllm==new", "known for 0.23.0 to 0.33.0"),
        ("vllm==", "known for 0.23.0 to 0.33.0"),
        ("llama.cpp==1.0", "accepted is llama.cpp"),
    ],
)
def test_a_client_without_rules_is_refused(text, said):
    with pytest.raises(InputError) as refused:
        parse_client(text)
    assert repr(text) in str(refused.value)
    assert said in str(refused.value)


def test_a_format_that_a_client_does_not_read_is_refused(checkpoint):
    facts = facts_of(planned(checkpoint("gpt2"), "w4-g32"))  # transposed: written for fewbits alone
    assert check_clients(facts) == []
    assert "does not read fewbits; accepted is --format" in str(refusal(facts))


def test_every_rule_has_a_source_and_speaks_of_known_clients_formats_and_versions():
    known = {*FORMATS, "gguf"} - {"fewbits"}
    for table, rules in RULES.items():
        for rule in rules.values() if table == "client" else rules:
            assert rule["source"]
            assert set(rule.get("formats", rule.get("reads", ()))) <= known
            for name in rule.get("clients", ()):
                client = clients()[name]
                assert set(rule.get("formats", client.reads)) <= set(client.reads)
                for edge in ("since", "until"):
                    if edge in rule:
                        parse_client(f"{name}=={rule[edge]}")


def test_a_client_has_the_same_kernels_in_no_gap_of_versions():
    """Where a kernel's rows end with one version, the next row begins with the one that follows."""
    rows: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for rule in RULES["kernel"]:
        for client in rule["clients"]:
            key = (client, rule["name"], *rule["formats"])
            rows.setdefault(key, []).append(rule)
    for found in rows.values():
        for earlier, later in pairwise(found):
            end, start = earlier["until"].split("."), later["since"].split(".")
            assert (end[0], int(end[1]) + 1) == (start[0], int(start[1]))
