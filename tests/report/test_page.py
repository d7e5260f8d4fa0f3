import re
import sys
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise, permutations

import pytest
from pages import KINDS, comparison, run, without

from fewbits.compare import Candidate, compare
from fewbits.errors import InputError, ResourceError
from fewbits.estimate import Estimate
from fewbits.report.page import check_page, comparison_page, run_page, write_page
from fewbits.report.plots import pareto_front
from fewbits.text import Text

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

COMMAND = "fewbits compare tiny work --text heldout.txt"
EMPTY = {"meta", "link", "br", "wbr", "img", "hr", "input", "use", "path"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")


@dataclass
class Table:
    caption: str = ""
    rows: list = field(default_factory=list)  # of (text, value) for each cell, heads included


class Page(HTMLParser):
    """Elements, checked to be closed in order; tables; attributes; text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.tables: list[Table] = []
        self.text: list[str] = []
        self.headings: list[tuple[str, str]] = []
        self.styles = ""
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if tag not in EMPTY:
            self.stack.append(tag)
        if tag == "table":
            self.tables.append(Table())
        elif tag == "tr":
            self.tables[-1].rows.append([])
        elif tag in ("th", "td"):
            self.tables[-1].rows[-1].append(["", given.get("data-value")])
        elif re.fullmatch("h[1-6]", tag):
            self.headings.append((tag, ""))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.stack.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.stack[-1:] in (["style"], ["script"]):
            self.styles += data
            return
        self.text.append(data)
        if self.stack and re.fullmatch("h[1-6]", self.stack[-1]):
            self.headings[-1] = (self.stack[-1], self.headings[-1][1] + data)
        if "caption" in self.stack:
            self.tables[-1].caption += data
        elif "th" in self.stack or "td" in self.stack:
            self.tables[-1].rows[-1][-1][0] += data + " "

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def table(self, start: str) -> Table:
        return next(t for t in self.tables if t.caption.strip().startswith(start))


@pytest.fixture(scope="module")
def given():
    return comparison()


@pytest.fixture(scope="module")
def page(given):
    return Page(comparison_page(given, COMMAND))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"), "awq+gptq")


def agrees(text: str, number: float) -> bool:
    """Whether a text is the number, to its last digit."""
    found = NUMBER.search(text.replace(",", ""))
    if found is None:
        return False
    mantissa, _, power = found.group().partition("e")
    digits = len(mantissa.partition(".")[2])
    return abs(float(found.group()) - number) <= 0.501 * 10.0 ** (int(power or 0) - digits)


def holds(cell, estimate, times: float = 1) -> None:
    """The value in its place and for sorting, and the error behind its sign."""
    text, value = cell
    assert float(value) == estimate.value
    assert agrees(text, times * estimate.value), (text, estimate)
    if estimate.error:
        assert agrees(text.partition("±")[2], times * estimate.error), (text, estimate)


def test_every_figure_of_a_row_stands_in_the_table_with_its_error(given, page):
    table = page.table("All models")
    assert len(table.rows) == 1 + len(given.rows)
    for row, cells in zip(given.rows, table.rows[1:], strict=True):
        name, method, bits, size, memory, prefill, decode, *rest = cells
        assert name[0].split()[0] == row.name
        assert row.method in method[0]
        assert row.scheme in method[0]
        numbers = (bits, row.bits_per_weight), (size, row.weight_bytes), (memory, row.resident_bytes)
        for (_, value), number in numbers:
            assert float(value) == number
        assert agrees(bits[0], row.bits_per_weight)
        assert agrees(size[0], row.weight_bytes / 1e6)
        assert agrees(memory[0], row.resident_bytes / 1e6)
        for cell, speed, ratio in (
            (prefill, row.speed.prefill, row.prefill_ratio),
            (decode, row.speed.decode, row.decode_ratio),
        ):
            assert agrees(cell[0], speed)
            assert agrees(cell[0].partition("\N{MULTIPLICATION SIGN}")[2], ratio.value)
            assert agrees(cell[0].partition("±")[2], ratio.error)
        quality = row.evaluation
        nats = (quality.perplexity, quality.perplexity_ratio, quality.kl, quality.kl_99)
        for cell, estimate in zip(rest, nats, strict=False):
            holds(cell, estimate)
        for cell, estimate in zip(rest[4:6], (quality.top1_agreement, quality.flips), strict=True):
            holds(cell, estimate, 100)
        assert len(rest) == 6 + len(row.tasks)
        for (text, value), ours, theirs in zip(rest[6:], row.tasks, given.rows[0].tasks, strict=True):
            pairs = list(zip(ours.correct, theirs.correct, strict=True))
            accuracy = sum(a for a, _ in pairs) / len(pairs)
            assert float(value) == pytest.approx(accuracy, abs=1e-12)
            assert agrees(text, 100 * accuracy)
            if row is not given.rows[0]:
                changed, flips = text.partition("\N{GREEK CAPITAL LETTER DELTA}")[2].split("flips")
                assert agrees(changed, 100 * sum(a - b for a, b in pairs) / len(pairs))
                assert agrees(flips, 100 * sum(a != b for a, b in pairs) / len(pairs))
                assert changed.count("\N{PLUS-MINUS SIGN}") == flips.count("\N{PLUS-MINUS SIGN}") == 1


def test_rows_that_cannot_be_told_apart_name_each_other(given, page):
    kl = {row[0][0].split()[0]: row[9][0] for row in page.table("All models").rows[1:]}
    rows = given.rows[1:]
    for row in rows:
        for other in rows:
            said = f"{other.name}" in kl[row.name].partition("apart from")[2].replace(",", " ").split()
            assert said == (other.name in given.within_noise_of(row.name)), (row.name, other.name)
    assert "gptq-w4-g128" in kl["awq+gptq-w4-g128"]  # so both happen
    assert "apart" not in kl["int8"]


def test_every_difference_of_two_rows_is_there(given, page):
    rows = page.table("Differences").rows[1:]
    assert len(rows) == len(given.differences())
    for difference, cells in zip(given.differences(), rows, strict=True):
        assert [cells[0][0].strip(), cells[1][0].strip()] == [difference.first, difference.second]
        assert float(cells[3][1]) == difference.estimate.value
        assert cells[4][0].strip() == ("no" if difference.noise else "yes")


def test_the_summary_names_the_smallest_close_model_and_the_nearest(given, page):
    quantized = given.rows[1:]
    close = [row for row in quantized if row.evaluation.perplexity_ratio.value <= 1.01]
    least = min(close, key=lambda row: (row.weight_bytes, row.evaluation.kl.value))
    assert f"within 1 % of the float model's is {least.name}" in page.words
    nearest = min(quantized, key=lambda row: row.evaluation.kl.value)
    assert nearest is not least
    assert f"Nearest to the float model is {nearest.name}" in page.words
    both = Page(comparison_page(replace(given, rows=given.rows[:2]), COMMAND)).words
    assert "also the nearest to the float model" in both
    far = replace(given, rows=(given.rows[0], given.rows[-1]))
    assert "No model has a perplexity within 1 %" in Page(comparison_page(far, COMMAND)).words


def test_the_page_says_that_a_small_model_says_little_about_speed(given, page):
    assert "mostly overhead" in page.words
    large = replace(given, model=given.model | {"parameters": 7_000_000_000})
    assert "mostly overhead" not in Page(comparison_page(large, COMMAND)).words


@pytest.mark.parametrize("seed", range(20))
def test_the_pareto_front_is_what_no_other_point_beats(seed):
    import random

    drawn = random.Random(seed)
    points = [(drawn.randint(1, 6), drawn.randint(1, 6)) for _ in range(drawn.randint(1, 12))]
    beaten = {
        i
        for i, j in permutations(range(len(points)), 2)
        if points[j][0] <= points[i][0] and points[j][1] <= points[i][1] and points[j] != points[i]
    }
    assert pareto_front(points) == [i for i in range(len(points)) if i not in beaten]


def test_the_front_is_named(given, page):
    rows = given.rows[1:]
    front = pareto_front([(row.bits_per_weight, row.evaluation.kl.value) for row in rows])
    caption = page.words.partition("Filled and joined: ")[2].partition(". No other")[0]
    assert re.split(", | and ", caption) == [rows[i].name for i in front]


def test_errors_by_block_and_matrix_are_those_of_the_ledgers(given, page):
    table = page.table("Relative squared output error, gptq-w4-g128")
    blocks = given.rows[3].ledger["blocks"]
    for block, cells in zip(blocks, table.rows[1:], strict=True):
        assert cells[0][0].strip() == str(block["block"])
        for matrix, (text, value) in zip(block["matrices"], cells[1:], strict=True):
            if matrix["error"] is None:
                assert (text.strip(), value) == ("\N{EN DASH}", None)
            else:
                assert float(value) == pytest.approx(matrix["error"])
                assert agrees(text, matrix["error"])
    behind = page.table("Squared error of the states").rows[1:]
    for row, cells in zip(given.rows[1:], behind, strict=True):
        assert [float(value) for _, value in cells[1:]] == list(row.block_errors)


def test_the_map_of_rtn_is_derived_from_a_row_without_transforms(given, page):
    captions = [table.caption.strip() for table in page.tables]
    derived = [caption for caption in captions if "derived" in caption]
    assert derived == ["Relative squared output error, rtn w4-g128, derived from gptq-w4-g128"]
    matrix = given.rows[3].ledger["blocks"][0]["matrices"][0]
    cell = page.table(derived[0]).rows[1][1]
    assert float(cell[1]) == pytest.approx(matrix["error"] / matrix["error_to_rtn"])


def test_outliers_of_inputs_and_weights_are_shown(given, page):
    table = page.table("Largest |x|")
    names = [text.replace(" ", "") for text, _ in table.rows[0][1:]]
    for report in given.outliers["inputs"]:
        text, value = table.rows[1 + report["block"]][1 + names.index(report["name"])]
        assert float(value) == report["largest"]
        assert f"{len(report['columns'])} of 256" in text
    table = page.table("Largest |w|")
    for weight in given.weight_outliers:
        cell = table.rows[1 + weight["block"]][1 + sorted(KINDS).index(weight["module"])]
        assert float(cell[1]) == weight["largest"]


def test_many_experts_become_one_cell_with_their_mean_and_worst():
    names = ("self_attn.q_proj", *(f"mlp.experts.{i}.up_proj" for i in range(128)))
    given = comparison(blocks=80, names=names)
    page = Page(comparison_page(given, COMMAND))
    table = page.table("Relative squared output error, gptq-w4-g128")
    heads = [text.replace(" ", "") for text, _ in table.rows[0]]
    assert heads == ["block", "mlp.experts.*.up_proj(128)", "self_attn.q_proj"]
    errors = [
        m["error"] for m in given.rows[3].ledger["blocks"][0]["matrices"] if "experts" in m["name"]
    ]
    text, value = table.rows[1][1]
    assert float(value) == pytest.approx(sum(errors) / len(errors))
    assert agrees(text.partition("worst")[2], max(errors))
    assert sum(len(row) for table in page.tables for row in table.rows) < 10_000


def test_what_was_not_measured_is_said(given):
    said = {
        "text": ("Quality was not measured", "KL was not measured: there is nothing to draw",
                 "KL was not measured by position", "states behind the blocks were not compared",
                 "No text was given to judge on"),
        "tasks": ("No tasks were asked for",),
        "speed": ("Speed was not measured", "Speed and memory were not measured"),
        "outliers": ("Inputs were not searched for outliers", "Weights were not searched"),
        "ledger": ("none was calibrated", "No row has a ledger"),
    }  # fmt: skip
    full = Page(comparison_page(given, COMMAND)).words
    for part, sentences in said.items():
        words = Page(comparison_page(without(given, part), COMMAND)).words
        for sentence in sentences:
            assert sentence in words, (part, sentence)
            assert sentence not in full, (part, sentence)
    nothing = Page(comparison_page(without(given, *said), COMMAND))
    assert "None" not in nothing.words
    assert "nan" not in nothing.words
    alone = replace(given, rows=given.rows[:1])
    assert "No quantized model was measured" in Page(comparison_page(alone, COMMAND)).words


def test_what_compare_measures_makes_a_page(tmp_path):
    lines = ["import os\n\n\ndef read(path):\n    return open(path).read()\n"] * 4
    found = compare(
        "reference/model", tmp_path, candidates=Candidate.all(["int8", "rtn"]),
        text=Text("lines", lines), length=32, speed=False, inspect=False,
    )  # fmt: skip
    page = Page(comparison_page(found, COMMAND))
    rows = page.table("All models").rows[1:]
    assert [cells[0][0].split()[0] for cells in rows] == ["float", "int8", "rtn-w4-g128"]
    for row, cells in zip(found.rows, rows, strict=True):
        holds(cells[9], row.evaluation.kl)
        assert float(cells[3][1]) == row.weight_bytes
    for row, cells in zip(found.rows[1:], page.table("Squared error").rows[1:], strict=True):
        assert [float(value) for _, value in cells[1:]] == list(row.block_errors)
    assert str(tmp_path) not in " ".join(page.text)


def test_a_model_that_gives_no_numbers_is_in_the_table_but_in_no_plot(given):
    nan = Estimate(float("nan"), float("nan"))
    broken = replace(
        given.rows[1].evaluation,
        perplexity=nan,
        kl=nan,
        kl_99=nan,
        perplexity_ratio=nan,
        kl_by_position=tuple(replace(p, kl=nan) for p in given.rows[1].evaluation.kl_by_position),
    )
    row = replace(given.rows[1], evaluation=broken, block_errors=(float("inf"),) * 3)
    html = comparison_page(replace(given, rows=(given.rows[0], row, *given.rows[2:])), COMMAND)
    cells = Page(html).table("All models").rows[2]
    assert cells[0][0].split()[0] == row.name
    assert (cells[9][0].split()[0], cells[9][1]) == ("nan", None)
    words = Page(html).words
    assert f"Nearest to the float model is {row.name}" not in words
    assert row.name not in words.partition("Filled and joined: ")[2].partition(". No other")[0]


def test_the_same_comparison_gives_the_same_bytes(given, result):
    assert comparison_page(given, COMMAND) == comparison_page(comparison(), COMMAND)
    assert run_page(result, COMMAND) == run_page(result, COMMAND)


def test_a_comparison_that_was_written_and_read_gives_the_same_page(given):
    import json

    from fewbits.comparison import Comparison

    again = Comparison.from_json(json.loads(json.dumps(given.to_json())))
    assert comparison_page(again, COMMAND) == comparison_page(given, COMMAND)


@pytest.mark.parametrize("kind", ["comparison", "run"])
def test_a_page_loads_nothing_and_refers_to_what_it_has(given, result, kind):
    html = comparison_page(given, COMMAND) if kind == "comparison" else run_page(result, COMMAND)
    page = Page(html)
    ids = [given["id"] for _, given in page.tags if "id" in given]
    assert len(ids) == len(set(ids))
    assert "http" not in html
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value == "data:," or value[1:] in ids, (tag, name, value)
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(attributes.get(name, "").split()) <= set(ids)
        for name in set(re.findall(r"url\(#([^)]*)\)", " ".join(map(str, attributes.values())))):
            assert name in ids
    assert "@import" not in page.styles
    assert "url(" not in page.styles
    assert not [tag for tag, _ in page.tags if tag in ("iframe", "object", "embed", "img")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


@pytest.mark.parametrize("kind", ["comparison", "run"])
def test_headings_are_in_order_and_tables_have_captions_and_scopes(given, result, kind):
    page = Page(comparison_page(given, COMMAND) if kind == "comparison" else run_page(result, COMMAND))
    levels = [int(tag[1]) for tag, _ in page.headings]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert all(text.strip() for _, text in page.headings)
    captions = [table.caption.strip() for table in page.tables]
    assert all(captions)
    assert len(captions) == len(set(captions))
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    for table in page.tables:
        assert len({len(row) for row in table.rows}) == 1, table.caption


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></script><b>",
    "$\\frac{1}{0}$",
    "{{ 7 * 7 }}",
    "--><svg onload=alert(1)>",
    "n" * 300,
    "\u540d\u524d\n\u202ex",
    'a&amp;b #010200 url(#x) id="y"',
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_files_are_harmless(given, name):
    harmless = [tag for tag, _ in Page(comparison_page(given, COMMAND)).tags]
    rows = tuple(replace(row, name=f"{name} {i}", method=name) for i, row in enumerate(given.rows[1:]))
    hostile = replace(
        given,
        model=given.model | {"name": name},
        rows=(given.rows[0], *rows),
        text={"name": name, "sha256": name},
        calibration=given.calibration | {"source": name},
        notes=(f"fact: {name}: {name}",),
        machine={"processor": name},
        versions={name: name},
        created=name,
    )
    page = Page(comparison_page(hostile, name))
    tags = [tag for tag, _ in page.tags]
    for tag in {"script", "img", "b", "svg", "style"}:
        assert tags.count(tag) == harmless.count(tag), tag
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert " ".join(name.split()) in page.words


def test_a_run_shows_its_ledger(result):
    page = Page(run_page(result, "fewbits quantize model out"))
    ledger = result.ledger
    tensors = page.table("What became of each source tensor").rows[1:]
    assert [row[0][0].strip() for row in tensors] == list(ledger.tensors)
    for (name, entry), cells in zip(ledger.tensors.items(), tensors, strict=True):
        assert entry.outcome in cells[1][0], name
        assert float(cells[4][1]) == entry.size_bytes
        assert float(cells[5][1]) == sum(written.size_bytes for written in entry.written)
    files = page.table("Files that were written").rows[1:]
    for (name, file), cells in zip(ledger.files.items(), files, strict=True):
        assert [cell[0].strip() for cell in cells] == [name, f"{file['size_bytes']:,}", file["sha256"]]
    blocks = page.table("How each block came out").rows[1:]
    for block, cells in zip(ledger.blocks, blocks, strict=True):
        assert float(cells[1][1]) == block["error"]
        assert float(cells[2][1]) == block["kl"]
    assert "Quality was not measured by this run" in page.words
    assert "fewbits evaluate" in page.words
    assert "fewbits compare" in page.words
    assert "fewbits quantize model out" in page.words
    for note in ledger.notes:
        assert note.what in page.words
    assert ledger.calibration["sha256"] in page.words
    for key in ("quantized", "copied", "folded", "dropped"):
        assert f"{key} {ledger.totals[key]}" in page.words
    assert f"{result.run['elapsed_s']:.1f} s" in page.words


def test_a_run_without_calibration_says_so(tmp_path):
    page = Page(run_page(run(tmp_path, "rtn", "llama", "a <b> model"), "again"))
    assert "Nothing was calibrated" in page.words
    assert "took no calibration data" in page.words
    assert "a <b> model, quantized by rtn w4-g32" in page.words
    assert "'a <b> model'" in page.words  # a word of the shell


def test_a_page_is_written_as_it_is(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before")
    write_page("<p>± 1</p>\n", path)
    assert path.read_bytes() == "<p>± 1</p>\n".encode()


@pytest.mark.parametrize("name", ["report.htm", "report", "missing/report.html", "folder.html"])
def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path, name):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match=r"--html is .*accepted"):
        check_page(tmp_path / name)
    with pytest.raises(InputError):
        write_page("", tmp_path / name)


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, library):
    for module in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"{library}.*fewbits\[report\]"):
        check_page(tmp_path / "report.html")


def test_a_full_disk_is_reported(monkeypatch, tmp_path):
    def fail(*_args, **_more):
        raise OSError(28, "No space left on device")

    path = tmp_path / "report.html"
    write_page("x", path)
    monkeypatch.setattr("fewbits.disk.os.write", fail)
    with pytest.raises(ResourceError, match=r"report\.html could not be written: the disk is full"):
        write_page("y", path)
    assert path.read_text() == "x"  # the page that was there is there still
    assert list(tmp_path.iterdir()) == [path]
