"""Networks: stem, blocks, shortcuts, stages, heads, presets, counting, conformance checks."""
