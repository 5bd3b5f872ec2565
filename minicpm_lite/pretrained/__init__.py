"""Pretrained models: read and written in the formats that other programs read and write."""
