"""Results for people."""

from fewbits.report.table import Row, blocks_table, bytes_text, comparison_tables, evaluation_table

__all__ = ["Row", "blocks_table", "bytes_text", "comparison_tables", "evaluation_table"]
