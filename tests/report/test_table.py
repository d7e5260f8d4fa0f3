import io

from rich.console import Console

from fewbits.estimate import Estimate
from fewbits.evaluate import Evaluation
from fewbits.report import Row, evaluation_table
from fewbits.speed import Size, Speed


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
