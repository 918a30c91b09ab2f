"""A run as one HTML page that needs nothing else: no script, no font, no picture, no request.

Styles and charts stand in the page itself; a content policy in its head forbids the browser to load anything, so even a
hostile sample that slipped through the escaping could not call out. Everything that comes from files is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from nemo_automodel.components.loggers.charts import NUM_COLOURS, Series, format_number, has_values, line_chart
from nemo_automodel.components.loggers.run_record import RunRecord, Sample, extreme, points

_STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1c2430; --soft: #667085; --rule: #e4e7ec; --code: #f9fafb;
  --c0: #2563eb; --c1: #d9480f; --c2: #0b8a5f; --c3: #8b3fd1; --c4: #c2255c; --c5: #0c8599; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0f131a; --card: #181e27; --text: #e6e9ef; --soft: #98a2b3; --rule: #2a3240; --code: #11161e;
  --c0: #6ea8fe; --c1: #ff9e5e; --c2: #4fd1a1; --c3: #c69af5; --c4: #f783ac; --c5: #5cd3e3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 28px 18px 48px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 24px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 34px 0 12px; font-size: 17px; }
h3 { margin: 0; font-size: 14px; }
.soft { color: var(--soft); margin: 2px 0 0; }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.tiles { display: grid; gap: 10px; margin-top: 20px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; min-width: 0; }
.tile .soft { font-size: 13px; margin: 0; }
.tile b { display: block; font-size: 20px; line-height: 1.35; font-weight: 650; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.head { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; }
.key { color: var(--soft); font-size: 13px; white-space: nowrap; }
.key i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.chart { display: block; width: 100%; height: auto; margin-top: 4px; }
.chart .grid { stroke: var(--rule); stroke-width: 1; }
.chart text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .raw { stroke-width: 1; opacity: .35; }
.at rect { fill: transparent; }
.at line { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
.at line, .at circle, .at .tip { opacity: 0; pointer-events: none; }
.at:hover line, .at:hover circle, .at:hover .tip { opacity: 1; }
.chart .tip { fill: var(--text); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 18px; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.yaml { background: var(--code); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; }
summary { cursor: pointer; font-weight: 600; }
details[open] summary { margin-bottom: 10px; }
.sample { margin-top: 12px; }
.sample .grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); margin-top: 12px; }
.sample .label { color: var(--soft); font-size: 13px; margin-bottom: 3px; }
.answer { border-left: 3px solid var(--rule); padding-left: 12px; min-width: 0; }
.answer.after { border-color: var(--c0); }
.answer.expected { border-color: var(--c2); }
@media (max-width: 520px) { body { padding: 18px 10px 36px; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; } .card { padding: 12px; } .tile b { font-size: 18px; } }
""" + "".join(
    f".s{i} {{ stroke: var(--c{i}); }} circle.s{i} {{ fill: var(--c{i}); stroke: var(--card); }} "
    f".key .s{i} {{ background: var(--c{i}); }}\n"
    for i in range(NUM_COLOURS)
)


def render_page(run: RunRecord) -> str:
    """Return the whole page of ``run``."""
    title = f"{run.directory.resolve().name or 'run'}: training report"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            'img-src data:">',
            f'<link rel="icon" href="data:,"><title>{escape(title)}</title>',
            f"<style>{_STYLE}</style></head><body>",
            _header(run),
            _tiles(run),
            "<h2>Curves</h2>",
            f'<div class="grid">{"".join(_charts(run))}</div>',
            _samples(run),
            _facts(run),
            _configuration(run),
            "</body></html>\n",
        ]
    )


def _header(run: RunRecord) -> str:
    facts = dict(run.facts())
    line = " · ".join(facts[label] for label in ("Model", "Method", "Started") if label in facts)
    return f'<h1>{escape(run.directory.resolve().name)}</h1><p class="soft">{escape(line)}</p>'


def _tiles(run: RunRecord) -> str:
    seconds = run.seconds()
    tiles: list[tuple[str, str, str]] = []
    losses = [value for _, value in run.series("loss") if value is not None]
    if losses:
        tiles.append(("training loss", f"{losses[-1]:.4f}", f"first step {losses[0]:.4f}"))
    for name, records in run.validation.items():
        best = extreme(points(records, "val_loss"), min)
        if best is not None:
            what = "validation loss" if name == "default" else f"validation loss, {name}"
            tiles.append((f"best {what}", f"{best[0]:.4f}", f"at step {best[1]}"))
    tiles.append(("steps", f"{len(run.train):,}", f"last is step {run.train[-1]['step']}" if run.train else ""))
    if run.train:
        num_tokens = run.total("num_tokens_per_step")
        tiles.append(("tokens", _short_count(num_tokens), f"{run.total('num_label_tokens'):,} learned"))
        if seconds:
            tiles.append(("time", _duration(seconds), f"{num_tokens / seconds:,.0f} tokens per second"))
    memory = extreme(run.series("mem"), max)
    if memory is not None and memory[0] > 0:
        tiles.append(("peak memory", f"{memory[0]:.2f} GiB", ""))
    cards = (
        f'<div class="card tile"><p class="soft">{escape(label)}</p><b>{escape(value)}</b>'
        f'<p class="soft">{escape(note)}</p></div>'
        for label, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cards)}</div>'


def _charts(run: RunRecord) -> Iterable[str]:
    validation = [
        Series("validation" if name == "default" else name, points(records, "val_loss"), dots=True)
        for name, records in run.validation.items()
    ]
    yield _chart("Loss", [Series("train", run.series("loss"), smooth=True), *validation], "No loss was recorded.")
    yield _chart("Learning rate", [Series("lr", run.series("lr"))], "No learning rate was recorded.")
    norms = Series("norm", run.series("grad_norm"), smooth=True)
    yield _chart("Gradient norm", [norms], "No gradient norm was recorded.")
    speed = Series("tokens/s", run.series("tps"), smooth=True)
    yield _chart("Tokens per second", [speed], "No speed was recorded.", from_zero=True)
    memory = run.series("mem")
    if any(value for _, value in memory):
        yield _chart("Memory, GiB", [Series("GiB", memory)], "", from_zero=True)
    else:
        reason = "No device memory was allocated: the run was on the CPU." if memory else "No memory was recorded."
        yield _chart("Memory, GiB", [], reason)
    learned = Series("tokens", run.series("num_label_tokens"), smooth=True)
    yield _chart("Learned tokens per step", [learned], "No token count was recorded.", from_zero=True)


def _chart(title: str, series: list[Series], without_values: str, *, from_zero: bool = False) -> str:
    present = [line for line in series if has_values([line])]
    if not present:
        return f'<div class="card"><h3>{escape(title)}</h3><p class="soft">{escape(without_values)}</p></div>'
    keys = [
        f'<span class="key"><i class="s{i % NUM_COLOURS}"></i>{escape(line.name)}</span>'
        for i, line in enumerate(present)
        if len(present) > 1
    ]
    num_missing = sum(value is None for line in present for _, value in line.points)
    if num_missing:
        keys.append(f'<span class="key">{num_missing} {"value" if num_missing == 1 else "values"} not finite</span>')
    return (
        f'<figure class="card" style="margin:0"><div class="head"><h3>{escape(title)}</h3>{"".join(keys)}</div>'
        f"{line_chart(present, label=f'{title} by step', from_zero=from_zero)}</figure>"
    )


def _samples(run: RunRecord) -> str:
    note = f'<p class="soft">{escape(run.samples_note)}</p>' if run.samples_note else ""
    return f"<h2>Samples</h2>{note}" + "".join(_sample(sample) for sample in run.samples)


def _sample(sample: Sample) -> str:
    answers = [
        (css, label, text)
        for css, label, text in (
            ("expected", "expected", sample.expected),
            ("before", "before training", sample.before),
            ("after", "after training", sample.after),
        )
        if text is not None
    ]
    blocks = "".join(
        f'<div class="answer {css}"><div class="label">{label}</div><pre dir="auto">{escape(text) or "(nothing)"}</pre>'
        "</div>"
        for css, label, text in answers
    )
    return (
        '<div class="card sample"><div class="label">prompt</div>'
        f'<pre dir="auto">{escape(sample.prompt)}</pre><div class="grid">{blocks}</div></div>'
    )


def _facts(run: RunRecord) -> str:
    rows = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in run.facts())
    return f'<h2>Run</h2><div class="card"><dl>{rows}</dl></div>'


def _configuration(run: RunRecord) -> str:
    if run.config_text is None:
        return '<h2>Configuration</h2><p class="soft">No checkpoint of this run holds a config.yaml.</p>'
    return (
        '<h2>Configuration</h2><details class="card" open><summary>config.yaml</summary>'
        f'<pre class="yaml">{escape(run.config_text)}</pre></details>'
    )


def _short_count(count: int) -> str:
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= limit:
            return f"{count / limit * (10 if unit == 'k' else 1):.4g} {unit}"
    return format_number(count)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
