"""The look of the report: one style sheet, light and dark, for the screen and for paper."""

from __future__ import annotations

STYLE = """
:root{--paper:#fbfaf7;--card:#fff;--ink:#1d2329;--soft:#565f68;--rule:#dcd9d1;--accent:#7a3b12;--link:#1f5a99;
--c0:#1f5fa8;--c1:#b4530f;--c2:#16705e;--c3:#7a2f86;--zebra:#f5f3ee}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--card:#1c2126;--ink:#e6e8ea;--soft:#a3adb6;--rule:#363d45;
--accent:#e0a878;--link:#8cbcf0;--c0:#7fb2ee;--c1:#f0a05a;--c2:#63c9ad;--c3:#d59be0;--zebra:#20262c}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2.5rem 1.25rem 4rem;max-width:60rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{margin:.1rem 0;font:600 2.3rem/1.15 Georgia,"Times New Roman",serif;overflow-wrap:anywhere}
h2{margin:0 0 1rem;font:600 1.35rem/1.3 Georgia,"Times New Roman",serif}
.over{margin:0;color:var(--accent);font-size:.8rem;font-weight:600;letter-spacing:.09em;text-transform:uppercase}
.under,.note{margin:.2rem 0 0;color:var(--soft);overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.7rem;margin:1.4rem 0 0}
.tiles div{display:flex;flex-direction:column-reverse;justify-content:flex-end;padding:.7rem .9rem;
background:var(--card);border:1px solid var(--rule);border-radius:8px}
.tiles dt{color:var(--soft);font-size:.8rem;line-height:1.3}
.tiles dd{margin:0;font-size:1.25rem;font-weight:600;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:1.4rem 0;padding:.6rem 0;border-block:1px solid var(--rule)}
a{color:var(--link)}
section{margin:0 0 1.25rem;padding:1.4rem 1.5rem;background:var(--card);border:1px solid var(--rule);border-radius:10px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(19rem,100%),1fr));gap:0 2rem}
.scroll{overflow-x:auto}
table{width:100%;margin:.4rem 0 1rem;border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
caption,figcaption{padding:.3rem 0;color:var(--soft);font-size:.85rem;font-weight:600;text-align:left}
th,td{padding:.36rem .6rem;border-top:1px solid var(--rule);text-align:right;vertical-align:top;unicode-bidi:isolate}
th{font-weight:500;text-align:left;overflow-wrap:anywhere}
thead th{color:var(--soft);font-size:.82rem;text-align:right;white-space:nowrap}
thead th:first-child{text-align:left}
tbody tr:nth-child(even){background:var(--zebra)}
.facts th{width:42%;color:var(--soft)}
.facts td{text-align:left;overflow-wrap:anywhere}
figure{margin:0 0 1.2rem}
svg{display:block;width:100%;height:auto;font-family:inherit;font-size:13px}
svg text{fill:var(--ink)}
svg .tick{fill:var(--soft);font-size:12px;paint-order:stroke;stroke:var(--card);stroke-width:4px}
svg .value{font-size:12px;font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.grid{stroke:var(--rule)}
.axis{stroke:var(--soft)}
.target{stroke:var(--c1);stroke-width:2;stroke-dasharray:4 3}
.whisker{stroke:var(--c0);stroke-width:6;stroke-opacity:.35;stroke-linecap:round}
.bar{fill:var(--c0)}
polyline{fill:none;stroke-width:2.5;stroke-linejoin:round}
.s0{fill:var(--c0)}.s0 polyline{stroke:var(--c0)}
.s1{fill:var(--c1)}.s1 polyline{stroke:var(--c1);stroke-dasharray:7 4}
.s2{fill:var(--c2)}.s2 polyline{stroke:var(--c2);stroke-dasharray:2 4}
.s3{fill:var(--c3)}.s3 polyline{stroke:var(--c3);stroke-dasharray:9 3 2 3}
pre,code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.85rem}
pre{overflow-x:auto;padding:1rem;background:var(--zebra);border-radius:6px}
summary{cursor:pointer;font-weight:500}
@media(max-width:36rem){body{padding:1.2rem .6rem}section{padding:1rem .8rem}
figure{overflow-x:auto}svg{min-width:36rem}}
@media print{body{max-width:none;padding:0}nav{display:none}section{break-inside:avoid;border:0;padding:0}}
"""
