"""A report as one file of HTML, made of its parts by a Jinja template that escapes every value.

Text of a model is in the page only as JSON, in which `<`, `>`, `&` and `'` are escaped, and the
page's script shows it as text. The content security policy names the scripts that may run by a
random number of this page.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_real.report import tables
from megatron_real.report.browser import Sample, sample_of
from megatron_real.report.charts import draw
from megatron_real.report.tables import Table
from megatron_real.report.variants import Run, variants_of

_HERE = Path(__file__).parent


def report_page(
    runs: Sequence[Run],
    *,
    evaluations: Sequence[str] = (),
    steps: Sequence[int] = (),
    max_bytes: int = 5_000_000,
) -> str:
    """Returns the page.

    Args:
        runs: [1..] runs, the first being what the others are compared with.
        evaluations: directories of results of `megatron-real eval`.
        steps: the steps whose rollouts are shown; none for a choice of them.
        max_bytes: how many bytes the page may have. Rollouts take what the charts leave.

    Raises:
        ValueError: results or rollouts cannot be read, or there is no room for the charts.
    """
    sections = {
        "overview": tables.overview(runs),
        "differences": tables.differences(runs),
        "ranks": tables.rank_times(runs),
        "exchange": tables.exchange(runs),
        "events": tables.events(runs),
        "held_out": tables.held_out(runs),
        "benchmarks": tables.benchmarks(evaluations),
    }

    charts = draw(variants_of(runs))
    # Rendered once without rollouts, to know the bytes that are left for them.
    size_without_rollouts = len(_render(runs, sections, charts, []).encode())
    room = max_bytes - size_without_rollouts
    if room < 0:
        raise ValueError(
            f"the charts alone take {size_without_rollouts / 1e6:.1f} MB; "
            f"give --megabytes more than that, or fewer runs"
        )

    # A tenth is left for the escapes of JSON within HTML. Texts with many angle brackets need more:
    # they are halved until they fit.
    share = int(room * 0.9) // len(runs)
    samples = [sample_of(run, max_bytes=share, steps=steps) for run in runs]
    page = _render(runs, sections, charts, samples)
    while len(page.encode()) > max_bytes and any(sample.groups for sample in samples):
        samples = [_halved(sample) for sample in samples]
        page = _render(runs, sections, charts, samples)
    return page


def _render(
    runs: Sequence[Run], sections: dict[str, Table], charts: Any, samples: Sequence[Sample]
) -> str:
    from bokeh.resources import Resources
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # StrictUndefined: a name that the template misspells is an error and no empty text.
    jinja = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)

    library = ""
    if charts.script:
        # Bokeh's other components (widgets, tables, formulas) would double the page.
        library = "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)

    return jinja.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        runs=runs,
        configs=[(run.name, sorted(tables.flattened(run.config).items())) for run in runs],
        charts=charts,
        library=library,
        samples=[dataclasses.asdict(sample) for sample in samples],
        # New for each page: a text that knew it could bring a script that the policy lets run.
        nonce=secrets.token_hex(16),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
        **sections,
    )


def _halved(sample: Sample) -> Sample:
    """Returns a sample with every second group; a single group is dropped."""
    groups = sample.groups[::2]
    # Half of one is one: without this the page would be halved for ever.
    if len(sample.groups) == 1:
        groups = []
    shown = sum(len(group["rollouts"]) for group in groups)
    return dataclasses.replace(sample, groups=groups, num_rollouts=shown)
