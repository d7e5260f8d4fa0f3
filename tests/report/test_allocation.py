"""The picture of an allocation: what stands in which cell, and that it fits."""

import io
import random
from dataclasses import replace

import pytest
from pages import run
from rich.console import Console

from fewbits.report.allocation import (
    allocation_lines,
    allocation_table,
    picture,
    price_text,
    read_schemes,
)
from fewbits.report.page import run_page
from fewbits.scheme import BITS, QuantScheme

KINDS = ("self_attn.q_proj", "mlp.down_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj")


def schemes_of(blocks: int, groups=(128,), seed: int = 0) -> dict[str, QuantScheme | None]:
    """Random ones; experts of a block have one."""
    rng, found = random.Random(seed), {}
    choices = [QuantScheme(bits, "group", size) for bits in BITS for size in groups] + [None]
    for block in range(blocks):
        for kind in KINDS[:-1]:
            found[f"model.layers.{block}.{kind}.weight"] = rng.choice(choices)
        found[f"model.layers.{block}.{KINDS[-1]}.weight"] = found[
            f"model.layers.{block}.{KINDS[-2]}.weight"
        ]
    return found | {"lm_head.weight": QuantScheme(8, "group", groups[0])}


def printed(schemes) -> list[list[str]]:
    console = Console(width=100, file=io.StringIO())
    console.print(allocation_table(schemes))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)
    return [line.split() for line in lines]


def test_every_matrix_stands_in_its_cell():
    schemes = schemes_of(5)
    head, *rows = printed(schemes)
    assert head == ["block", "0", "1", "2", "3", "4", "-"]
    cells = {row[0]: row[1:] for row in rows}
    assert list(cells) == ["self_attn.q_proj", "mlp.down_proj", "experts.up_proj", "lm_head"]
    for kind, place in (("self_attn.q_proj", KINDS[0]), ("experts.up_proj", KINDS[2])):
        wanted = [schemes[f"model.layers.{block}.{place}.weight"] for block in range(5)]
        assert cells[kind] == ["f" if s is None else str(s.bits) for s in wanted]
    assert cells["lm_head"] == ["8"]


def test_groups_are_shown_where_there_are_several():
    cells = {row[0]: row[1:] for row in printed(schemes_of(3, (32, 128)))}
    assert cells["lm_head"] == ["8g32"]
    (_, words) = allocation_lines(schemes_of(3, (32, 128)), damage=1, bits_per_weight=4, price=0)
    assert "columns in a group" in words
    (_, words) = allocation_lines(schemes_of(3), damage=1, bits_per_weight=4, price=0)
    assert "columns in a group" not in words


def test_trellises_are_marked_and_the_mark_is_explained():
    plain = schemes_of(3)
    marked = plain | {"lm_head.weight": QuantScheme(4, "group", 128, trellis=True)}
    assert {row[0]: row[1:] for row in printed(marked)}["lm_head"] == ["4t"]
    words = [list(allocation_lines(s, damage=1, bits_per_weight=4, price=0))[1] for s in (plain, marked)]
    assert ["t: a trellis" in said for said in words] == [False, True]


@pytest.mark.parametrize("blocks", [28, 61, 126])
@pytest.mark.parametrize("groups", [(128,), (32, 64, 128)], ids=["", "groups"])
def test_many_blocks_become_ranges_that_fit_and_leave_none_out(blocks, groups):
    schemes = schemes_of(blocks, groups)
    head, *_ = printed(schemes)
    numbers = []
    for span in head[1:-1]:
        first, _, last = span.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    assert numbers == list(range(blocks))


def test_blocks_that_are_alike_are_joined_before_others():
    same = {f"h.{b}.fc.weight": QuantScheme(4 if b < 70 else 3, "group", 64) for b in range(100)}
    head, cells = printed(same)
    assert head[1:] == ["0-69", "70-99"]
    assert cells == ["fc", "4", "3"]


@pytest.mark.parametrize("most", [1, 3, 7])
def test_a_range_holds_all_schemes_of_its_blocks(most):
    schemes = schemes_of(20, (32, 128))
    shown = picture(schemes, most)
    assert len(shown.blocks) <= most + 1
    for i, span in enumerate(shown.blocks):
        if span is not None:
            inside = range(span[0], span[1] + 1)
            wanted = {schemes[f"model.layers.{b}.mlp.down_proj.weight"] for b in inside}
            assert shown.cells["mlp.down_proj", i] == wanted


def test_the_line_below_says_what_was_predicted_and_what_came():
    line, _ = allocation_lines(
        schemes_of(2), damage=0.0123, bits_per_weight=3.7, price=2e-9, realized=0.0145
    )
    assert "predicted KL 0.0123 nats, realized 0.0145 nats; 3.700 bits" in line
    assert price_text(2e-9) in line
    line, _ = allocation_lines(schemes_of(2), damage=0.0123, bits_per_weight=3.7, price=0)
    assert "realized" not in line


@pytest.fixture
def page_of(tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    result = run(tmp_path)

    def make(**request) -> str:
        changed = replace(result.ledger, request=result.ledger.request | request)
        return run_page(replace(result, ledger=changed), "fewbits quantize")

    return make


def test_the_page_of_a_run_shows_what_was_allocated(page_of):
    budget = {"bits_per_weight": 3.7, "predicted": 0.0123, "price": 2e-9, "weight_bytes": 1}
    schemes, lists = schemes_of(3), {}
    for name, scheme in schemes.items():
        lists.setdefault("float" if scheme is None else scheme.label, []).append(name)
    assert read_schemes(lists) == schemes
    html = page_of(budget=budget, allocation=lists)
    assert '<section id="allocation"' in html
    assert "3.7 bits per weight" in html
    assert "0.0123 nats per token" in html
    assert "experts.up_proj" in html.replace("<wbr>", "")
    memory = {key: value for key, value in budget.items() if key != "bits_per_weight"}
    assert "4 GB" in page_of(budget=memory | {"memory_bytes": 4 * 10**9}, allocation=lists)
    assert '<section id="allocation"' not in page_of()
