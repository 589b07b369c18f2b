"""Colours and layout of the page. Pictures are drawn in the light colours and then refer to the same variables."""

from __future__ import annotations

from collections.abc import Mapping

ROLES: Mapping[str, tuple[str, str]] = {
    "paper": ("#fdfdfc", "#16181b"),
    "panel": ("#f4f4f2", "#1e2125"),
    "ink": ("#1d2126", "#e4e6e9"),
    "muted": ("#646b74", "#98a0aa"),
    "rule": ("#dcdedf", "#343a41"),
    "more": ("#2a6fb5", "#5aa5ee"),
    "less": ("#c4651c", "#e8924c"),
    "bad": ("#b3261e", "#ff9a8d"),
    "good": ("#1b7a4a", "#5cc694"),
}
"""Name of a CSS variable -> its colour on light and on dark. Each light one is unique: pictures are recoloured by it."""

MINERS: tuple[tuple[str, str], ...] = (
    ("#0067a5", "#57ade9"),  # blue
    ("#c85200", "#f28b45"),  # vermilion
    ("#00836a", "#2cc19c"),  # green
    ("#ad4f93", "#e08cc5"),  # purple
    ("#957000", "#dcb637"),  # ochre
    ("#5847ad", "#aa9df2"),  # indigo
    ("#1f97c7", "#9bd8f7"),  # sky
    ("#8a9099", "#7b838d"),  # grey
)
"""Hues that people with any colour vision tell apart (after Okabe and Ito), darkened for light paper, lightened for dark.

The last one is for those who take part in no comparison.
"""
GREY = len(MINERS) - 1


def variables() -> dict[str, tuple[str, str]]:
    """CSS variable -> (light, dark)."""
    return {**ROLES, **{f"m{i}": pair for i, pair in enumerate(MINERS)}}


def css() -> str:
    """The page's whole style sheet."""
    light = "".join(f"--{name}:{pair[0]};" for name, pair in variables().items())
    dark = "".join(f"--{name}:{pair[1]};" for name, pair in variables().items())
    dots = "".join(f".m{i}::before{{background:var(--m{i})}}" for i in range(len(MINERS)))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{_LAYOUT}{dots}"


_LAYOUT = """
:root{color-scheme:light dark}
*{box-sizing:border-box}
body{margin:0 auto;padding:2.5rem 1.25rem 4rem;max-width:58rem;background:var(--paper);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;-webkit-text-size-adjust:100%}
h1{font-size:1.75rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 .75rem}
h2{font-size:1.25rem;line-height:1.3;font-weight:650;letter-spacing:-.01em;margin:3.5rem 0 .5rem;padding-top:1rem;
 border-top:1px solid var(--rule)}
h2 small{font-size:1rem;font-weight:400;color:var(--muted);letter-spacing:0}
p{margin:.5rem 0;max-width:42rem}
.lead{font-size:1.0625rem}
.note,figcaption,caption{color:var(--muted);font-size:.875rem;line-height:1.5}
nav{margin:1.25rem 0;font-size:.9375rem}
nav a{display:inline-block;margin-right:1rem}
a{color:inherit;text-decoration-color:var(--muted);text-underline-offset:.2em}
.lead ul,ul.lead{padding-left:1.1rem;margin:.5rem 0}
.box{overflow-x:auto;margin:1rem 0;background:linear-gradient(to left,var(--paper) 50%,transparent) right/3rem 100%,
 linear-gradient(to left,color-mix(in srgb,var(--muted) 55%,transparent),transparent) right/.7rem 100%;
 background-repeat:no-repeat;background-attachment:local,scroll}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.9375rem;line-height:1.4;
 font-variant-numeric:tabular-nums lining-nums}
caption{text-align:left;caption-side:top;padding:0 0 .6rem}
th,td{text-align:left;vertical-align:baseline;padding:.45rem .9rem .45rem 0;border-bottom:1px solid var(--rule)}
th:last-child,td:last-child{padding-right:0}
thead th{font-size:.8125rem;font-weight:500;color:var(--muted);white-space:nowrap;vertical-align:bottom}
tbody th{font-weight:500;white-space:nowrap;position:sticky;left:0;background:var(--paper)}
caption span,td[colspan] span{display:block}
tfoot th,tfoot td{border-bottom:0;color:var(--muted);font-weight:400}
.n{text-align:right;white-space:nowrap}
.first td,.first th{font-weight:650}
.first .why,.why{color:var(--muted);font-weight:400;font-size:.875rem;min-width:17rem;overflow-wrap:anywhere}
.why.hash{min-width:10rem}
.n+:not(.n){padding-left:.9rem}
.why b{font-weight:600;color:var(--ink)}
.who::before{content:"";display:inline-block;width:.55rem;height:.55rem;border-radius:50%;margin-right:.5rem}
.none{color:var(--muted)}
code{font:.8125rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.whole{white-space:nowrap;user-select:all;-webkit-user-select:all}
span:target{scroll-margin-top:1rem;outline:2px solid var(--more);outline-offset:4px;border-radius:3px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1.5rem 2rem;align-items:start}
figure{margin:1rem 0 0;min-width:0}
figure h3,h3{font-size:.9375rem;font-weight:600;margin:1.25rem 0 .5rem}
figure>div{overflow-x:auto}
svg{display:block;max-width:100%;height:auto;font-family:inherit}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg.wide{max-width:none}
figure:has(svg.wide){grid-column:1/-1}
figcaption{margin-top:.5rem}
details{margin:1rem 0}
summary{cursor:pointer;color:var(--muted);font-size:.9375rem}
.skip{position:absolute;left:-99rem}
.skip:focus{position:static;display:inline-block;margin-bottom:1rem}
:focus-visible{outline:2px solid var(--more);outline-offset:2px;border-radius:3px}
.top{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;align-items:baseline;justify-content:space-between;
 padding-bottom:.75rem;border-bottom:1px solid var(--rule);margin-bottom:1.75rem}
.top .brand{font-weight:650;text-decoration:none;white-space:nowrap}
.top nav{margin:0;display:flex;flex-wrap:wrap;gap:.25rem 1.1rem}
.top nav a{margin:0;padding:.2rem 0;text-decoration:none;color:var(--muted)}
.top nav a:hover{text-decoration:underline}
.top nav a[aria-current]{color:var(--ink);font-weight:600;box-shadow:0 2px 0 var(--ink)}
.key{overflow-wrap:anywhere;font-size:.8125rem}
.state{display:inline-flex;align-items:center;gap:.5rem;font-weight:600}
.state::before{content:"";width:.6rem;height:.6rem;border-radius:50%;background:currentColor}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--less)}
.alarms{list-style:none;padding:0;margin:1rem 0;display:grid;gap:.6rem}
.alarms li{border-left:4px solid var(--less);background:var(--panel);padding:.7rem 1rem;border-radius:0 6px 6px 0}
.alarms li.critical{border-color:var(--bad)}
.alarms b{display:block}
.alarms p{margin:.15rem 0 0;color:var(--muted);font-size:.9375rem;max-width:none}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,10.4rem),1fr));gap:.75rem;margin:1.25rem 0}
.tiles>div{background:var(--panel);border-radius:8px;padding:.8rem 1rem;min-width:0}
.tiles dt{color:var(--muted);font-size:.8125rem}
.tiles dd{margin:.1rem 0 0;font-size:1.25rem;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums;
 overflow-wrap:anywhere}
.tiles small{display:block;font-size:.8125rem;font-weight:400;color:var(--muted);line-height:1.45}
.work{background:var(--panel);border-radius:8px;padding:1rem 1.1rem 1.1rem;margin:1.25rem 0}
.work>p{margin:0;max-width:none}
.work .big{font-size:1.25rem;font-weight:600;line-height:1.3}
.work .more{display:flex;flex-wrap:wrap;justify-content:space-between;gap:.1rem 1rem;color:var(--muted);font-size:.875rem;
 min-height:1.4em;overflow-wrap:anywhere}
progress{appearance:none;-webkit-appearance:none;display:block;width:100%;height:.6rem;border:0;border-radius:99px;
 background:var(--rule);overflow:hidden;margin:.7rem 0 .5rem;color:var(--more)}
progress::-webkit-progress-bar{background:var(--rule)}
progress::-webkit-progress-value{background:var(--more);border-radius:99px}
progress::-moz-progress-bar{background:var(--more);border-radius:99px}
.stages{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem;padding:0;margin:.9rem 0 0;font-size:.8125rem}
.stages li{flex:1 1 4.5rem;text-align:center;color:var(--muted);border-top:3px solid var(--rule);padding:.3rem .2rem 0}
.stages li.past{border-color:var(--more)}
.stages li[aria-current]{border-color:var(--more);color:var(--ink);font-weight:650}
.facts{display:grid;grid-template-columns:minmax(8rem,auto) 1fr;gap:.35rem 1.25rem;margin:1rem 0;font-size:.9375rem}
.facts dt{color:var(--muted)}
.facts dd{margin:0;overflow-wrap:anywhere}
.line{list-style:none;padding:0 0 0 1.25rem;margin:1rem 0 1rem .3rem;border-left:2px solid var(--rule)}
.line li{position:relative;margin:0 0 1.1rem}
.line li::before{content:"";position:absolute;left:-1.63rem;top:.45rem;width:.65rem;height:.65rem;border-radius:50%;
 background:var(--muted);box-shadow:0 0 0 3px var(--paper)}
.line li.evaluated::before{background:var(--good)}.line li.rejected::before{background:var(--bad)}
.line p{margin:.1rem 0;font-size:.9375rem;max-width:46rem;overflow-wrap:anywhere}
.line .note{font-size:.875rem}
pre{background:var(--panel);border-radius:8px;padding:.8rem 1rem;margin:.75rem 0;white-space:pre-wrap;overflow-wrap:anywhere;
 user-select:all;-webkit-user-select:all}
pre code{font-size:.875rem}
table time,.who,.crown,.event{white-space:nowrap}
footer{margin-top:3.5rem;padding-top:1rem;border-top:1px solid var(--rule);color:var(--muted);font-size:.8125rem;
 overflow-wrap:anywhere}
.page{margin-top:4rem}
@media(prefers-reduced-motion:no-preference){progress::-webkit-progress-value{transition:width .4s}}
@media(max-width:34rem){.why,.first .why{min-width:12.4rem}.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.6rem}
 .stages li{flex-basis:28%}.tiles{grid-template-columns:1fr 1fr}}
@media(max-width:34rem){.cards thead{position:absolute;clip-path:inset(50%);height:1px;overflow:hidden}
 .cards table,.cards caption,.cards tbody,.cards tfoot{display:block}
 .cards tr{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;padding:.6rem 0;border-bottom:1px solid var(--rule)}
 .cards th,.cards td{display:block;padding:0;border:0;position:static;text-align:left}
 .cards tbody th,.cards .why{flex:0 0 100%;min-width:0}.cards td:empty{display:none}.whole{white-space:normal}
 .cards .n+:not(.n){padding-left:0}
 .cards td[data-title]::before{content:attr(data-title);color:var(--muted);font-weight:400;font-size:.8125rem;margin-right:.4rem}
 .cards td.why[data-title]::before{display:block}}
@media(max-width:34rem){body{padding:1.5rem 1rem 3rem}h2{margin-top:2.5rem}table{font-size:.875rem}
 caption span{max-width:calc(100vw - 2rem)}}
@media print{body{max-width:none}details{display:block}}
""".replace("\n", "")
