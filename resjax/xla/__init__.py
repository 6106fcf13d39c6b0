"""What is specific to XLA: compile options, and convolutions in the form it compiles well."""
