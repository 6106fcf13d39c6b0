"""Training: state, optimiser and schedules, the compiled step, the loop, what a run writes."""
