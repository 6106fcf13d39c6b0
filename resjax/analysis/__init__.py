"""What runs show: run folders become tables, figures and a report.

A run folder is the only thing that training hands over, so nothing here imports the rest of
resjax: results can be read, redrawn and checked on a machine that has no jax.
"""
