"""One HTML file about one or more runs.

It has curves, time, faults, evaluations, the configuration, and a browser of rollouts.

    variants.py   what the run directories hold
    charts.py     curves and bars, drawn by Bokeh
    tables.py     time by stage, faults, evaluations, what differs between the configurations
    browser.py    the rollouts that the page carries, within a limit of bytes
    page.py       all of it as one file, by a Jinja template

The file needs no network. Its content security policy lets no script run but its own. What a model
wrote enters the file only as JSON whose angle brackets are escaped, and the page only as text.
"""
