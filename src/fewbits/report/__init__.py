"""Results for people."""

from fewbits.report.table import Row, bytes_text, evaluation_table

__all__ = ["Row", "bytes_text", "evaluation_table"]
