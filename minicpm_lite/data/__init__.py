"""Data: what the chapters train and test on. Everything is committed; nothing is fetched."""
