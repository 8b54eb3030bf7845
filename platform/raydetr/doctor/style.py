"""The look of the page."""

STYLE = """
:root { --ink: #22262b; --soft: #69717a; --line: #e2e5e9; --paper: #fff;
  --fault: #c62828; --warning: #d98200; --note: #4a7ba6; --good: #2e7d4f; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 12px; }
h2 { font-size: 19px; margin: 36px 0 10px; }
figure { margin: 0; }
.verdict { font-size: 18px; font-weight: 600; color: #fff; padding: 10px 16px; border-radius: 8px;
  margin: 0 0 8px; }
.good { background: var(--good); } .fair { background: #b26a00; } .bad { background: var(--fault); }
.target { color: var(--soft); margin: 0 0 14px; }
table { border-collapse: collapse; background: var(--paper); font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; } td { text-align: right; white-space: nowrap; }
.summary { border: 1px solid var(--line); border-radius: 8px; }
.summary th, .summary td { padding: 4px 16px; border-top: 1px solid var(--line); }
.summary tr:first-child th { border-top: 0; font-weight: 700; text-align: right; }
.summary .inner { padding-left: 34px; color: var(--soft); }
.finding { background: var(--paper); border: 1px solid var(--line); border-left: 6px solid var(--note);
  border-radius: 8px;
  padding: 12px 16px; margin: 0 0 12px; }
.finding p { margin: 0 0 4px; }
.finding b { text-transform: uppercase; font-size: 12px; letter-spacing: .06em; color: #fff;
  background: var(--note);
  border-radius: 4px; padding: 2px 7px; margin-right: 6px; }
.fault { border-left-color: var(--fault); } .fault b { background: var(--fault); }
.warning { border-left-color: var(--warning); } .warning b { background: var(--warning); }
.what code { float: right; color: var(--soft); font-size: 12px; margin-left: 12px; }
.remedy { color: var(--soft); } .remedy::before { content: "→ "; }
.examples { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 10px; align-items: flex-start; }
.example p { font-size: 12.5px; color: var(--soft); margin: 2px 0 0; max-width: 460px;
  overflow-wrap: anywhere; }
.single { width: 250px; } .pictures { display: flex; gap: 6px; }
.pair { border: 1px solid var(--line); border-radius: 8px; padding: 8px; } .pair figure { width: 220px; }
img { display: block; width: 100%; border-radius: 5px; }
figure figcaption { font-size: 12.5px; color: var(--soft); overflow-wrap: anywhere; }
.none { display: grid; place-items: center; height: 120px; border-radius: 5px; background: #eceef1;
  color: var(--soft); }
.gallery { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; align-items: start; }
.charts { display: grid; grid-template-columns: repeat(3, 1fr); gap: 14px; }
.charts figure { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; }
.charts figcaption { color: var(--ink); font-weight: 600; font-size: 14px; margin-bottom: 4px; }
.unit { color: var(--soft); font-weight: 400; }
svg { display: block; width: 100%; } svg text { font-size: 9.5px; fill: var(--soft);
  } svg line { stroke: var(--line); }
.legend { margin: 0 0 10px; } .legend span { margin-right: 18px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; }
.scroll { max-height: 620px; overflow: auto; border: 1px solid var(--line); border-radius: 8px;
  background: var(--paper); }
.classes { width: 100%; } .classes th, .classes td { padding: 3px 12px; }
.classes thead th { position: sticky; top: 0; background: #eef0f3; font-weight: 600; text-align: right; }
.classes thead th:nth-child(2) { text-align: left;
  } .classes tbody tr:nth-child(even) { background: #f8f9fa; }
.barred { width: 18%; text-align: left; } .barred i { display: block; height: 11px; border-radius: 3px;
  min-width: 1px; }
td.absent { color: var(--fault); }
@media (max-width: 900px) { .charts, .gallery { grid-template-columns: repeat(2, 1fr); } }
"""
