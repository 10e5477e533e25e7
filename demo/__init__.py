"""The demo behind `make demo`: a small world, a tiny model that learns to talk about it, and its examination."""
