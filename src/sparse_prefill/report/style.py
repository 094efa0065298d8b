"""The style sheet of a report, for phones and screens, light and dark."""

CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d8dce1; --soft: #f4f5f7; --faint: #5c6370; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #16181c; --line: #383c44; --soft: #22252b; --faint: #9aa2af; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
h1 + p, figcaption, dt, summary { color: var(--faint); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); }
thead th { background: var(--soft); font-weight: 600; }
th:first-child { position: sticky; left: 0; background: var(--soft); text-align: left; font-weight: 600;
  max-width: 45vw; white-space: normal; overflow-wrap: break-word; }
tbody tr:last-child > * { border-bottom: 0; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; overflow-x: auto; padding: 0.5rem; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; }
figure svg { display: block; height: auto; max-width: none;
  width: max(min(100%, var(--width)), min(var(--width), 28rem)); }
figcaption { padding-top: 0.3rem; font-size: 0.85rem; color: #5c6370; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: 0.25rem 1rem; margin: 0.5rem 0; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 0.5rem; }
}
"""
