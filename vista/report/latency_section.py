"""Latency of the scorer by history length."""

from __future__ import annotations

from vista.report.chart import Series, line_chart
from vista.report.html_page import PageSection, paragraph, table
from vista.report.latency import WIDE_SPREAD, Latency


def latency_section(latency: Latency) -> PageSection:
    """A chart and a table, with the load of the machine."""
    milliseconds = [[1e3 * value for value in values] for values in (latency.median_s, latency.p90_s)]
    low, high = min(milliseconds[0]), max(milliseconds[0])
    finding = (
        f"Scoring {latency.num_candidates:,} candidates takes {low:.1f} to {high:.1f} ms (median) for histories of "
        f"{min(latency.lengths):,} to {max(latency.lengths):,} events."
    )
    chart = line_chart(
        [
            Series("median", latency.lengths, milliseconds[0], color=0),
            Series("90th percentile", latency.lengths, milliseconds[1], color=6, dashed=True),
        ],
        x_label="events in the history",
        y_label=f"ms per request of {latency.num_candidates:,} candidates",
        log_x=max(latency.lengths) > 10 * min(latency.lengths) > 0,
        from_zero=True,
    )
    rows = [
        (f"{length:,}", f"{median:.2f}", f"{p90:.2f}", f"{p90 / median:.2f}")
        for length, median, p90 in zip(latency.lengths, *milliseconds, strict=True)
    ]
    before, after = latency.load
    conditions = (
        f"One user per request, {latency.num_threads} threads on {latency.num_cores} cores; load average of the "
        f"machine {before:.2f} before and {after:.2f} after. Medians over {latency.num_rounds} rounds."
    )
    if latency.is_wide:
        conditions += (
            f" The spread stayed wide: in at least half of the rounds, the 90th percentile exceeded {WIDE_SPREAD:g} "
            "times the median. Rely on the medians alone, and measure again on an idle machine."
        )
    return PageSection(
        "Latency", finding, [chart, table(["events", "median, ms", "p90, ms", "ratio"], rows), paragraph(conditions)]
    )
