"""The curves of several runs over steps, tokens or hours, and their time by stage, drawn by Bokeh.

All curves of a variant share one data source, whose column `x` the page replaces by `step`,
`tokens` or `hours`. No script is made here, so the page's content security policy need not allow
any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from megatron_real.report.variants import Run, Variant
from megatron_real.runs.metric_table import metric_of

if TYPE_CHECKING:
    from bokeh.models import ColumnDataSource
    from bokeh.plotting import figure

# Okabe and Ito's colours without black and yellow, which one of the two backgrounds swallows.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("solid", "dashed", "dotted")
_INK = "#808080"
"""Text and axes: legible on white and on black."""

MAX_POINTS = 1000
"""Points of a curve at most. Longer runs are thinned, which a curve of 400 pixels does not show."""

AXES = ("step", "tokens", "hours")
"""The axes that curves may run over: steps, response tokens so far, hours in steps so far."""

CURVES = (
    "reward_mean",
    "heldout/pass_at_1",
    "solved_share",
    "one_class_share",
    "excluded_share",
    "truncated_share",
    "response_tokens_mean",
    "entropy",
    "loss",
    "grad_norm",
    "lr",
    "kl",
    "max_abs_weight_tau",
    "score_positive_mean",
    "score_negative_mean",
    "clipped_low_share",
    "clipped_high_share",
    "skipped_updates",
    "mismatch_mean_abs",
    "mismatch_max_abs",
    "mismatch_k3",
    "mismatch_share",
    "lag",
    "seconds/sync",
    "seconds/rollout",
    "seconds/update",
    "tokens_per_second_per_rank",
)
"""Metrics with a chart, where a run has them and they are not 0 throughout."""

_LEGEND_COLUMNS = 2  # names beside each other, on a phone too
_LEGEND_ROW_PIXELS = 20

Column = NDArray[numpy.float32]


@dataclass(frozen=True)
class Charts:
    """Bokeh's part of the page."""

    script: str
    """Draws all charts; it is JavaScript, with the data in it."""
    curves: Sequence[str]
    """A div for each curve."""
    stages: str
    """A div of the time by stage; "" where no step is done."""


def draw(variants: Sequence[Variant]) -> Charts:
    """Draws the curves and the time by stage of all variants."""
    from bokeh.embed import components

    curves = _curves(variants)
    stages = _stages(variants)
    models = {f"curve-{i}": curve for i, curve in enumerate(curves)}
    if stages is not None:
        models["stages"] = stages
    if not models:
        return Charts("", [], "")
    # Without a script tag, which the template writes itself: the tag needs the page's nonce.
    script, divs = components(models, wrap_script=False)
    return Charts(script, [divs[f"curve-{i}"] for i in range(len(curves))], divs.get("stages", ""))


def curve_columns(run: Run) -> dict[str, Column]:
    """Returns the columns [steps] of a run's curves.

    They are the three axes and every metric of CURVES that the run has.
    """
    rows = run.steps
    columns = _axes(rows)
    for name in CURVES:
        if any(name in row for row in rows):
            columns[name] = _column(rows, name)
    return columns


def band_columns(variant: Variant) -> dict[str, Column]:
    """Returns the columns of a variant's curves.

    Of several runs, NAME is the mean, NAME_low and NAME_high the range, over the steps that all of
    them have done.
    """
    columns = [curve_columns(run) for run in variant.runs]
    if len(columns) == 1:
        return columns[0]

    # A metric that one of the runs lacks has no mean over all of them.
    names = [name for name in columns[0] if all(name in of_run for of_run in columns)]
    # Seeds may have come to different steps: a mean beyond the shortest would be of fewer runs.
    common = columns[0]["step"]
    for of_run in columns[1:]:
        common = numpy.intersect1d(common, of_run["step"])

    bands: dict[str, Column] = {}
    for name in names:
        of_runs = [of_run[name][numpy.isin(of_run["step"], common)] for of_run in columns]
        values = numpy.stack(of_runs)
        # A step in which one run has no figure has none here: a mean over fewer runs would jump.
        bands[name] = values.mean(axis=0)
        if name not in AXES:
            bands[f"{name}_low"] = values.min(axis=0)
            bands[f"{name}_high"] = values.max(axis=0)
    return bands


def thinned(columns: Mapping[str, Column], max_points: int = MAX_POINTS) -> dict[str, Column]:
    """Returns evenly spaced rows of the columns, the first and the last among them."""
    num_rows = len(columns["step"])
    if num_rows <= max_points:
        return dict(columns)
    # Two of the rounded numbers may be the same row.
    kept = numpy.unique(numpy.linspace(0, num_rows - 1, max_points).round().astype(int))
    return {name: column[kept] for name, column in columns.items()}


def _axes(rows: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Returns the columns [steps] of the three axes."""
    tokens: list[float] = []
    for row in rows:
        # Every rollout has exactly one status, so their counts add up to the rollouts of the step.
        num_rollouts = sum(row[name] or 0 for name in row if name.startswith("status/"))
        tokens.append((row.get("response_tokens_mean") or 0.0) * num_rollouts)

    # Summed as float64 and rounded at the end: 1e9 tokens are more than float32 counts singly.
    hours = numpy.cumsum([_seconds(row) for row in rows]) / 3600
    steps = [row["step"] for row in rows]
    return {
        "step": numpy.array(steps, dtype=numpy.float32),
        "tokens": numpy.cumsum(tokens).astype(numpy.float32),
        "hours": hours.astype(numpy.float32),
    }


def _seconds(row: Mapping[str, Any]) -> float:
    return math.fsum(row[name] or 0.0 for name in row if name.startswith("seconds/"))


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> Column:
    values = [row.get(name) for row in rows]
    return numpy.array([math.nan if v is None else v for v in values], dtype=numpy.float32)


def _curves(variants: Sequence[Variant]) -> list[figure]:
    from bokeh.models import ColumnDataSource, DataRange1d

    columns = [thinned(band_columns(variant)) for variant in variants]
    held = [_held_out(run) for variant in variants for run in variant.runs]
    # One source a variant, so that the page changes the axis of all its curves at once.
    sources = [
        ColumnDataSource({"x": of_variant["step"], **of_variant}, name="curves")
        for of_variant in columns
    ]
    # One range for all charts: who zooms into one sees the same steps in the others.
    x_range = DataRange1d()

    curves = []
    for name in CURVES:
        if name == "heldout/pass_at_1":
            if any(len(of_run["step"]) for of_run in held):
                curves.append(_held_out_figure(variants, held, x_range))
            continue

        # A metric that is 0 throughout says nothing; NaN counts as 0 here, infinity does not.
        drawn: list[int] = []
        for i, of_variant in enumerate(columns):
            column = of_variant.get(name)
            if column is not None and numpy.nan_to_num(column, posinf=1, neginf=1).any():
                drawn.append(i)
        if drawn:
            plot = _figure(name, x_range)
            for i in drawn:
                _add_curve(plot, sources[i], name, variants[i].name, i)
            _finish(plot)
            _legend_below(plot, len(drawn))
            curves.append(plot)
    return curves


def _figure(name: str, x_range: Any) -> figure:
    from bokeh.plotting import figure as new_figure

    metric = metric_of(name)
    unit = ""
    if metric is not None and metric.unit != name:
        unit = f" ({metric.unit})"

    plot = new_figure(
        title=f"{name}{unit}",
        height=230,
        sizing_mode="stretch_width",
        x_range=x_range,
        tools="pan,box_zoom,wheel_zoom,reset,save",
        # The wheel goes on scrolling the page until the reader turns its tool on.
        active_scroll=None,
        output_backend="canvas",
        name="curve",
    )

    plot.xaxis.axis_label = "step"
    return plot


def _add_curve(plot: figure, source: ColumnDataSource, name: str, label: str, number: int) -> None:
    from bokeh.models import HoverTool

    # Colours first, then dashes: 6 x 3 variants can be told apart.
    color = COLORS[number % len(COLORS)]
    dash = _DASHES[number // len(COLORS) % len(_DASHES)]
    # In braces, because a metric's name may have a slash.
    shown = [("run", label), ("step", "@step"), (name, f"@{{{name}}}")]

    if f"{name}_low" in source.data:
        plot.varea(
            "x", f"{name}_low", f"{name}_high", source=source, fill_color=color, fill_alpha=0.18
        )
        shown.append(("range", f"@{{{name}_low}} to @{{{name}_high}}"))

    line = plot.line(
        "x", name, source=source, color=color, line_dash=dash, line_width=1.8, legend_label=label
    )
    # As good as invisible, but for the mouse: a line has no points to hover over.
    points = plot.scatter("x", name, source=source, color=color, size=4, alpha=0.001)
    if len(source.data["x"]) < 3:
        points.glyph.update(fill_alpha=1, line_alpha=1)  # a line of one point is invisible

    # Every curve needs a tool of its own; the toolbar shows the first of them alone.
    plot.add_tools(
        HoverTool(tooltips=shown, renderers=[line, points], mode="vline", visible=number == 0)
    )


def _held_out(run: Run) -> dict[str, Any]:
    """Returns the columns [evaluations] of a run's accuracy on held-out problems.

    `low` and `high` are the ends of the error bars.
    """
    name = "heldout/pass_at_1"
    rows = [row for row in run.evaluations if row.get(name) is not None]
    value = _column(rows, name)
    # A single problem has no standard error: its bar has no length.
    error = numpy.nan_to_num(_column(rows, "heldout/standard_error"))
    of_steps = _axes(run.steps)

    steps = numpy.array([row["step"] for row in rows], dtype=numpy.float32)
    # Number of steps done by then; an evaluation before the first step is at 0 of everything.
    done = numpy.searchsorted(of_steps["step"], steps, side="right")
    tokens = numpy.append(0, of_steps["tokens"])[done]
    hours = numpy.append(0, of_steps["hours"])[done]

    return {
        "step": steps,
        "tokens": tokens,
        "hours": hours,
        "value": value,
        "low": value - error,
        "high": value + error,
    }


def _held_out_figure(
    variants: Sequence[Variant], held: Sequence[Mapping[str, Any]], x_range: Any
) -> figure:
    """Draws the accuracy on held-out problems.

    Every run has a line of its own here: a standard error is of one run's problems.
    """
    from bokeh.models import ColumnDataSource, HoverTool, Whisker

    plot = _figure("heldout/pass_at_1", x_range)
    # The runs of a variant share its colour and its name, which the legend has once.
    of_runs = [
        (number, variant.name, run)
        for number, variant in enumerate(variants)
        for run in variant.runs
    ]
    for (number, label, run), columns in zip(of_runs, held, strict=True):
        if not len(columns["step"]):
            continue
        source = ColumnDataSource({"x": columns["step"], **columns}, name="curves")
        color = COLORS[number % len(COLORS)]
        dash = _DASHES[number // len(COLORS) % len(_DASHES)]
        plot.line("x", "value", source=source, color=color, line_dash=dash, legend_label=label)
        points = plot.scatter("x", "value", source=source, color=color, size=5, legend_label=label)
        bars = Whisker(base="x", lower="low", upper="high", source=source, line_color=color)
        for head in (bars.upper_head, bars.lower_head):
            head.update(line_color=color, size=6)

        plot.add_layout(bars)
        tooltips = [("run", run.name), ("step", "@step"), ("accuracy", "@value")]
        tooltips.append(("1 standard error", "@low to @high"))
        plot.add_tools(HoverTool(tooltips=tooltips, renderers=[points], visible=False))

    _finish(plot)
    _legend_below(plot, len({label for _, label, _ in of_runs}))
    return plot


def _stages(variants: Sequence[Variant]) -> figure | None:
    """Draws the mean seconds of a step in each stage, a bar for each variant."""
    from bokeh.models import HoverTool
    from bokeh.plotting import figure as new_figure

    times = [stage_seconds(variant.runs) for variant in variants]
    stages = list(dict.fromkeys(stage for of_variant in times for stage in of_variant))
    if not stages:
        return None

    names = [variant.name for variant in variants]
    data: dict[str, Any] = {"name": names}
    data |= {stage: [of_variant.get(stage, 0.0) for of_variant in times] for stage in stages}

    plot = new_figure(
        title="mean seconds of a step, by stage",
        # Bokeh's axis grows upwards: reversed, the first variant is on top.
        y_range=list(dict.fromkeys(reversed(names))),
        height=110 + 40 * len(names),
        sizing_mode="stretch_width",
        tools="save",
        output_backend="canvas",
    )
    colors = [COLORS[i % len(COLORS)] for i in range(len(stages))]
    bars = plot.hbar_stack(
        stages,
        y="name",
        height=0.6,
        color=colors,
        source=data,
        legend_label=stages,
        name=stages,
        line_color=_INK,
    )

    # Bokeh fills in the stage under the mouse for $name, and that column of the row for @$name.
    plot.add_tools(HoverTool(tooltips="@name, $name: @$name{0.00} s", renderers=bars))
    plot.x_range.start = 0
    _finish(plot)
    plot.legend.orientation = "horizontal"
    plot.legend.spacing = 12
    plot.add_layout(plot.legend[0], "below")
    return plot


def stage_seconds(runs: Sequence[Run]) -> dict[str, float]:
    """Returns the mean seconds of a step in each stage, over all steps of the runs."""
    rows = [row for run in runs for row in run.steps]
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("seconds/"))
    # Over all rows: a stage that some steps do without took 0 s of them.
    return {
        name.removeprefix("seconds/"): math.fsum(row.get(name) or 0.0 for row in rows) / len(rows)
        for name in names
    }


def _legend_below(plot: figure, num_names: int) -> None:
    """Puts the legend under the chart: within it, it covers the ends of the curves."""
    if not plot.legend:
        return
    plot.legend.ncols = _LEGEND_COLUMNS
    plot.legend.padding = 2
    plot.legend.margin = 2
    plot.legend.spacing = 6
    # The height includes the legend: without more of it the chart itself would shrink.
    plot.height += _LEGEND_ROW_PIXELS * math.ceil(num_names / _LEGEND_COLUMNS)
    plot.add_layout(plot.legend[0], "below")


def _finish(plot: figure) -> None:
    """Sets colours that are legible on light and dark backgrounds, and removes the frame."""
    # Transparent: the page's background shows, which the reader may switch.
    plot.background_fill_alpha = 0
    plot.border_fill_alpha = 0
    plot.outline_line_color = None
    plot.title.text_color = _INK
    plot.grid.grid_line_color = _INK
    plot.grid.grid_line_alpha = 0.2
    plot.toolbar.autohide = True
    plot.toolbar.logo = None

    for axis in plot.axis:
        axis.axis_line_color = _INK
        axis.axis_label_text_color = _INK
        axis.major_label_text_color = _INK
        axis.major_tick_line_color = _INK
        axis.minor_tick_line_color = None

    plot.legend.background_fill_alpha = 0
    plot.legend.border_line_color = None
    plot.legend.label_text_color = _INK
    plot.legend.label_text_font_size = "11px"
    plot.legend.click_policy = "hide"
    plot.legend.spacing = 0
