"""The parts of the trainer. Nothing in here imports a top-level program."""
