"""Pretrained weights: from foreign files and back, changed for another task, frozen and thawed."""
