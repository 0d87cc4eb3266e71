"""One file of HTML that shows a prior: what `energy-prior view` writes."""
