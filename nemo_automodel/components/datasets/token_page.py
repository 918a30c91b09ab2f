"""Rows as one HTML page that needs nothing else: no script, no font, no picture, no request.

A content policy in its head forbids the browser to load anything, and everything that comes from data is escaped, so a
hostile row can neither call out nor run. Each token is isolated from its neighbours' writing direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nemo_automodel.components.datasets.token_view import ShownDocument, ShownRow, Token

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1c2430; --soft: #667085; --rule: #e4e7ec;
  --given: #eef0f4; --given2: #e3e7ee; --learned: #a7e8bf; --learned2: #86dca6; --learned-text: #06351a;
  --cut: #fbd5d5; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --page: #0f131a; --card: #181e27; --text: #e6e9ef; --soft: #98a2b3;
  --rule: #2a3240; --given: #222a36; --given2: #2b3442; --learned: #1f6b3f; --learned2: #2a8450;
  --learned-text: #eafff2; --cut: #5b2626; --bad: #ff9e8f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 28px 18px 48px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 22px; overflow-wrap: anywhere; }
h2 { margin: 0 0 8px; font-size: 14px; overflow-wrap: anywhere; }
h3 { margin: 14px 0 6px; font-size: 13px; font-weight: 500; color: var(--soft); border-top: 2px solid var(--rule);
  padding-top: 8px; overflow-wrap: anywhere; }
p { margin: 6px 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.bad { color: var(--bad); font-weight: 600; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px;
  margin-top: 16px; }
.tokens { font: 13px/1.9 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
.tokens span { unicode-bidi: isolate; white-space: pre-wrap; border-radius: 3px; padding: 2px 1px;
  background: var(--given); }
.tokens span:nth-of-type(even) { background: var(--given2); }
.tokens .learned { background: var(--learned); color: var(--learned-text); font-weight: 600; }
.tokens .learned:nth-of-type(even) { background: var(--learned2); }
.tokens .cut { background: var(--cut); text-decoration: line-through; }
"""


def render_page(title: str, notes: Sequence[str], problem: str | None, rows: Sequence[ShownRow]) -> str:
    """Return the page: ``notes`` are lines of statistics, ``problem`` is what the label gate refuses, if anything."""
    verdict = "" if problem is None else f'<p class="bad">The label gate refuses this: {escape(problem)}</p>'
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            'img-src data:">',
            f'<link rel="icon" href="data:,"><title>{escape(title)}</title>',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *(f'<p class="soft">{escape(note)}</p>' for note in notes),
            verdict,
            '<p class="tokens"><span>given</span> <span class="learned">learned</span> '
            '<span class="cut">cut off by truncation</span> <i class="soft">point at a token for its number</i></p>',
            *map(_card, rows),
            "</body></html>",
        ]
    )


def _card(row: ShownRow) -> str:
    return f'<div class="card"><h2>{escape(row.heading)}</h2>{"".join(map(_document, row.documents))}</div>'


def _document(document: ShownDocument) -> str:
    heading = f"<h3>{escape(document.heading)}</h3>" if document.heading else ""
    return f'{heading}<div class="tokens">{"".join(map(_span, document.tokens))}</div>'


def _span(token: Token) -> str:
    title = f"position {token.position}, token {token.token_id}, {token.kind.value}"
    line_break = "<br>" if token.ends_line else ""
    return f'<span class="{token.kind.value}" title="{title}">{escape(token.text)}</span>{line_break}'
