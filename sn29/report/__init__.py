"""What a validator does and what rounds decided, for people to look at. A leaf: only the command line calls it.

    snapshot   status.json, store, records and disk, read once; the alarms that follow
    pages      what each page says; `site` has their addresses, the one file and the JSON; `server` answers over HTTP
    metrics    the same for Prometheus
    page       the demo's report of its rounds; `study`: that of the packing study

They are made of the pieces in `markup`; `pictures` draws SVG text; `style` has the colours and the layout, light and dark.
"""
