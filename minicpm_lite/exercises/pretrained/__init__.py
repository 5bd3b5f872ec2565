"""Checks and quizzes of the chapters on pretrained models."""
