"""Trainers for knowledge distillation in image restoration: `kdtrain`, or `python -m trainers`."""
