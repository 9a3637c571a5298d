"""What every report's page is made of: style, tables, tiles, lists; everything is escaped here."""

import html
from collections.abc import Iterable, Mapping, Sequence
from string import Template

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #fff; --ink: #1c2128; --soft: #667080;
  --line: #e3e5e8; --accent: #2f8fe0; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #13161b; --card: #1a1e25; --ink: #e4e7ec; --soft: #98a2b0; --line: #2c323b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.15; margin: 0 0 .75rem;
  letter-spacing: -.02em; }
h2 { font-size: 1.1rem; margin: 3rem 0 .75rem; }
p { max-width: 46rem; margin: .5rem 0; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem;
  margin: 2rem 0; }
.tiles div, .plot, .sample { background: var(--card); border: 1px solid var(--line);
  border-radius: .75rem; }
.tiles div { padding: 1rem 1.1rem; }
.tiles b { display: block; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; max-width: 46rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child { padding-left: 0; text-align: left; }
thead th { font-weight: 600; white-space: nowrap; }
tbody th { color: var(--soft); font-weight: 400; }
.lead tbody tr:first-child * { color: var(--ink); font-weight: 600; }
i { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .5rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; }
figure { margin: 0; }
.plot { padding: 1rem 1rem .75rem; }
.plot figcaption { margin: 0 0 .5rem; color: var(--ink); font-weight: 600; }
.plot svg { display: block; width: 100%; height: auto; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  gap: 1rem; margin-bottom: 1rem; }
.sample { padding: .75rem 1rem; min-width: 0; }
pre { margin: .4rem 0 0; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre u { text-decoration: none; color: var(--accent); }
.many { max-width: none; } .many thead th { white-space: normal; vertical-align: bottom; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--soft); }
details pre { max-height: 30rem; overflow: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.5rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 36rem) {
  main { padding-top: 1.75rem; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin: 0 0 .6rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: .6rem; } .tiles b { font-size: 1.5rem; }
  .plot { padding: .75rem .5rem .5rem; } table { font-size: .82rem; }
  thead th { white-space: normal; vertical-align: bottom; }
  th, td { padding: .45rem .3rem; } i { width: .55rem; height: .55rem; margin-right: .3rem; } }
"""

MANY = 5  # columns; the heads of more are written in several lines

PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>"""
    + STYLE
    + """</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
</body>
</html>
"""
)


def dot(color: str) -> str:
    return f'<i style="background:{color}"></i>'


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """Numbers, each above what it is."""
    cells = (f"<div><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>" for a, b in values)
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    colors: Mapping[str, str] | None = None,
    lead: bool = False,
) -> str:
    """The first column names the rows; a head that has a color gets a dot of it.

    lead: the first row is what counts most.
    """
    colors = colors or {}
    head = "".join(
        f"<th>{dot(colors[name]) if name in colors else ''}{html.escape(name)}</th>"
        for name in heads
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<{tag}>{html.escape(cell)}</{tag}>"
            for tag, cell in zip(["th"] + ["td"] * (len(row) - 1), row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    kind = " ".join(["lead"] * lead + ["many"] * (len(heads) > MANY))
    parts = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{parts}</table></div>'


def figure(caption: str, svg: str) -> str:
    return f'<figure class="plot"><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>'


def definitions(values: Mapping[str, str]) -> str:
    pairs = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in values.items())
    return f"<dl>{''.join(pairs)}</dl>"
