import io

from pages import comparison, without
from rich.console import Console

from fewbits.estimate import Estimate
from fewbits.evaluate import Evaluation
from fewbits.report import Row, comparison_tables, evaluation_table
from fewbits.report.table import comparison_facts
from fewbits.speed import Size, Speed
from fewbits.tasks import compare_scores


def evaluation(kl):
    one = Estimate(0.987, 0.0012)
    return Evaluation(
        Estimate(12.345, 0.12), kl, kl, one, Estimate(0.01, 0.002), None, 10, 2, 8, "text", "hash"
    )


def shown(rows):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(evaluation_table(rows))
    return console.export_text()


def test_every_figure_stands_in_its_row_with_its_error():
    speed = Speed(1234.4, 56.6, 8, 2, 10, {"int4pack": 3}, 2)
    text = shown(
        [
            Row(
                "int4",
                Size(1_500_000, 2_000_000, "rtn w4-g128"),
                evaluation(Estimate(0.02, 0.001)),
                speed,
            )
        ]
    )
    for cell in (
        "rtn w4-g128",
        "6.00",
        "1.5 MB",
        "12.35 ± 0.12",
        "0.0200 ± 0.0010",
        "98.70 ± 0.12 %",
        "1234",
        "57",
    ):
        assert cell in text, cell


def test_what_was_not_measured_is_left_out_or_blank():
    text = shown([Row("float", Size(4_000_000, 2_000_000, "bfloat16"), evaluation(None), None)])
    assert "tok/s" not in text
    assert "None" not in text


def lines_of(found):
    console = Console(width=400, record=True, file=io.StringIO())
    for table in comparison_tables(found):
        console.print(table)
    return console.export_text().splitlines()


def test_a_comparison_shows_every_figure_of_every_row():
    found = comparison()
    lines = lines_of(found)
    for number, row in enumerate(found.rows):
        own = [line for line in lines if line.split()[:2] == [str(number), row.name]]
        assert len(own) == 3, row.name  # what it takes, how good it is, how it does on tasks
        cost, quality, tasks = own
        assert f"{row.bits_per_weight:.2f}" in cost
        assert str(row.decode_ratio) in cost
        assert str(row.evaluation.kl) in quality
        for name in found.within_noise_of(row.name):
            assert str([other.name for other in found.rows].index(name)) in quality
        for ours, theirs in zip(row.tasks, found.rows[0].tasks, strict=True):
            paired = compare_scores(ours, theirs)
            assert f"{100 * ours.accuracy.value:.3g}"[:2] in tasks
            if number:
                assert f"{100 * paired.flips.value:.3g}"[:2] in tasks


def test_tables_of_what_was_not_measured_are_left_out():
    found = without(comparison(), "tasks", "text", "speed")
    assert len(comparison_tables(found)) == 1
    assert not any("KL" in line or "tok/s" in line for line in lines_of(found))


def test_facts_say_on_what_and_that_a_small_model_is_slowed_by_overhead():
    found = comparison()
    facts = " ".join(comparison_facts(found))
    for word in (found.rows[0].evaluation.text, found.calibration["sha256"][:16], "overhead"):
        assert word in facts
