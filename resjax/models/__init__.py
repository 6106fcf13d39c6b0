"""What a network is. Imports nothing else of resjax."""
