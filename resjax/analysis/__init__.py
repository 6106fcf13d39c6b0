"""Turns run folders into tables, figures and reports.

Training writes run folders and analysis reads them, and nothing else connects the two. Results can
therefore be read, redrawn and checked on a machine without JAX.
"""
