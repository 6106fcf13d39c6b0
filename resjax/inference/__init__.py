"""What a trained network is used for: predictions, features, probes, programs for elsewhere."""
