"""What rounds decided, for people to look at. A leaf: reads records, writes files; only the command line calls it.

`page.write_page` makes one self-contained HTML file of the pieces in `markup`; `pictures` draws its pictures as SVG text;
`style` has the colours and the layout, light and dark.
"""
