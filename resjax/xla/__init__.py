"""Everything specific to XLA: compile options, and convolutions that it compiles to fast code."""
