from __future__ import annotations

from pbe.evaluation.report.tables import Table, markdown


def test_markdown_by_hand():
    table = Table(["score", "a|b"], [["seam", "1 (0 to 2)"]], "A note.", "not shown")
    lines = ["| score | a\\|b |", "| --- | --- |", "| seam | 1 (0 to 2) |"]
    assert markdown(table) == "\n".join([*lines, "", "A note.", ""])
    assert markdown(Table(table.head, table.rows)) == "\n".join([*lines, ""])
