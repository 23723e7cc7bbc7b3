"""One HTML file about one or more runs: curves, time, faults, evaluations, configuration, and a browser of rollouts.

    variants.py   what the run directories hold
    charts.py     curves and bars, drawn by Bokeh
    tables.py     time by stage, faults, evaluations, what differs between the configurations
    browser.py    the rollouts that the page carries, within a limit of bytes
    page.py       all of it as one file, by a Jinja template

The file needs no network. It is loaded with a content security policy that runs no script but its own, and what a model
wrote enters it only as JSON whose angle brackets are escaped, and the page only as text.
"""
