"""The page's style sheet: the look of a paper's supplement, in daylight and at night."""

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1b1b; --soft: #5c5c5c; --rule: #d4d4d4;
  --faint: #ececec; --heat: 31, 111, 139; --c0: #1f6f8b; --c1: #b5541c; --c2: #4a7a2c;
  --c3: #7b4a9e; --c4: #9a7b00; --c5: #a3305c; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #151618; --ink: #e4e2dd; --soft: #a3a19b; --rule: #3d3f43; --faint: #27292c;
    --heat: 38, 118, 146; --c0: #63b3d0; --c1: #e8935c; --c2: #93c373; --c3: #bd93dd;
    --c4: #d4b840; --c5: #e67fa6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 Charter, "Bitstream Charter", "Iowan Old Style", Georgia, "DejaVu Serif", serif; }
header, main, footer { max-width: 62rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 2rem; }
footer { margin: 3rem auto 2rem; color: var(--soft); font-size: .85rem; }
h1 { font-size: 1.6rem; font-weight: 600; line-height: 1.2; margin: 0 0 .4rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 2.6rem 0 .7rem; padding-top: .5rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; font-weight: 600; font-style: italic; margin: 1.5rem 0 .4rem;
  overflow-wrap: anywhere; }
p, dl { max-width: 44rem; margin: .5rem 0; }
a { color: var(--c0); }
:focus-visible { outline: 2px solid var(--c1); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; }
.skip:focus { position: static; display: inline-block; margin: .5rem 1rem; }
nav ul { list-style: none; margin: .8rem 0 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: 0 1.1rem; font-size: .9rem; }
nav a { display: inline-block; padding: .15rem 0; }
.note { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
dt { font-weight: 600; margin-top: .7rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .8rem 0; max-width: 100%; }
table { border-collapse: collapse; font-size: .88rem;
  font-variant-numeric: tabular-nums lining-nums;
  min-width: min(100%, 34rem); border-top: 1.5px solid var(--ink);
  border-bottom: 1.5px solid var(--ink); }
caption { text-align: left; color: var(--soft); padding: 0 0 .35rem; position: sticky; left: 0;
  max-width: min(44rem, 100vw - 2rem); }
th, td { padding: .16rem .8rem .16rem 0; text-align: left; vertical-align: top; font-weight: 400; }
th + td, td + td, thead th + th { padding-left: .4rem; }
tbody th, thead th:first-child { position: sticky; left: 0; background: var(--paper); }
thead th { border-bottom: 1px solid var(--ink); font-style: italic; }
td data, .number td { white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 5rem; }
.bar { display: inline-block; width: 9rem; height: .62rem; margin-left: .7rem;
  background: var(--faint); }
.fill { fill: none; stroke-width: 7; }
@media (max-width: 30rem) { .bar { width: 4.4rem; margin-left: .4rem; }
  table { font-size: .8rem; } th, td { padding-right: .5rem; } td { min-width: 3.4rem; }
  tbody th { overflow-wrap: anywhere; min-width: 5.5rem; } }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
  gap: 1.2rem 1.6rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .88rem; color: var(--soft); margin-bottom: .2rem; overflow-wrap: anywhere; }
figcaption b { color: var(--ink); font-weight: 600; }
.legend { display: inline-flex; flex-wrap: wrap; gap: 0 .9rem; margin-left: .4rem; }
.key svg { width: 22px; height: 10px; margin-right: .3rem; }
.chart > svg { display: block; width: 100%; height: auto; }
.chart text { font: 12px Charter, "Bitstream Charter", Georgia, "DejaVu Serif", serif;
  fill: var(--soft); }
.grid { stroke: var(--faint); } .axis { stroke: var(--rule); } .tick { stroke: var(--soft); }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.dashed { stroke-dasharray: 5 3; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
.dot { fill: var(--paper); stroke-width: 2; }
.confusion td { text-align: right; padding: .2rem .45rem; min-width: 2.6rem; }
.confusion thead th { padding: .2rem .45rem; text-align: right; font-size: .8rem; }
.confusion tbody th { padding-right: .6rem; min-width: 0; overflow-wrap: normal; }
.confusion .zero { color: var(--soft); }
@media (max-width: 30rem) { .confusion td { padding: .2rem .3rem; min-width: 0; } }
.confusion .true { font-weight: 700; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.4rem, 1fr));
  gap: .9rem .7rem; list-style: none; padding: 0; margin: .8rem 0; }
.images img { display: block; width: 64px; height: 64px; object-fit: contain;
  image-rendering: pixelated; background: var(--faint); }
.images li { font-size: .78rem; line-height: 1.3; color: var(--soft); overflow-wrap: anywhere; }
@media print { .scroll { overflow: visible; } nav, .skip { display: none; } }
"""
