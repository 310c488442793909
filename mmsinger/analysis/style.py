"""The style sheet of the report."""

STYLE = '''
:root{--page:#fff;--card:#f4f5f7;--ink:#1a1c20;--soft:#555b66;--line:#d9dce1;
--first:#0072b2;--second:#c04b00;--third:#6b7280;--good:#0a7d55;
--warn:#8a6100;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--page:#15171b;--card:#20242b;
--ink:#e8eaee;--soft:#a8afbb;--line:#3a404a;--first:#56b4e9;--second:#f0a050;
--third:#9aa1ad;--good:#4cc79a;--warn:#e6bb4e;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
overflow-wrap:anywhere}
main{max-width:60rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0 0}
h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--line)}
p{margin:.5rem 0}.subtitle,figcaption,.legend{color:var(--soft)}
.card{background:var(--card);border-left:6px solid var(--third);
border-radius:4px;padding:.5rem 1rem}
.card.clean{border-color:var(--good)}.card.unclear{border-color:var(--warn)}
.card.artifacts{border-color:var(--bad)}.headline{font-size:1.1rem;
font-weight:600}
.card.clean .headline{color:var(--good)}
.card.unclear .headline{color:var(--warn)}
.card.artifacts .headline{color:var(--bad)}
ul{padding-left:1.2rem;margin:.5rem 0}
pre{background:var(--card);padding:.75rem 1rem;border-radius:4px;
overflow-x:auto;font:.9rem/1.4 ui-monospace,Menlo,Consolas,monospace;
overflow-wrap:normal}
figure{margin:0}figcaption{font-size:.85rem}
.figures{display:grid;gap:1.5rem;align-items:start;
grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
.maps{display:grid;gap:.75rem;margin:.75rem 0;align-items:start;
grid-template-columns:repeat(auto-fill,minmax(6.5rem,1fr))}
img{width:100%;height:auto;display:block;image-rendering:pixelated}
img.small{max-width:12rem}
.chart{width:100%;max-width:34rem;height:auto;display:block}
text{fill:var(--soft);font:10px system-ui,sans-serif}
.grid{stroke:var(--line);fill:none}
.mark{stroke:var(--bad);stroke-dasharray:3 3;fill:none}
.line{fill:none;stroke-width:1.8}
.line.first,circle.first{stroke:var(--first)}
.line.second,circle.second{stroke:var(--second)}
.line.third,circle.third{stroke:var(--third)}
.line.first{stroke-dasharray:7 3}.line.third{stroke-dasharray:2 3}
.line.faint{stroke:var(--third);stroke-width:.8;opacity:.6}
circle{fill:var(--page)}
.ridge{stroke-width:1;fill-opacity:.35}
.ridge.first{stroke:var(--first);fill:var(--first)}
.ridge.second{stroke:var(--second);fill:var(--second)}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.85rem;margin:0}
.key{width:24px;height:8px;margin-right:.35rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;margin:.5rem 0;
overflow-wrap:normal}
th,td{padding:.25rem .6rem;text-align:right;white-space:nowrap;
border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--soft)}
dt{font-weight:600}dd{margin:0 0 .5rem}
'''
