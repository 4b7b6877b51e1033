"""Ablations: from a file of switches to trained models, tables with intervals, a plot, a strip and a page."""
